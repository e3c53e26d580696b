"""A peer's suite: accelerated `generate` compared with transformers' own, argument by argument."""
