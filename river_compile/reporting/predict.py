"""Predicts tokens/s, memory and disk from the bytes of weights that a token reads.

Not handled: attention over long contexts, the KV cache, texts whose drafts are accepted more or less often than most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PLAIN, EXACT, ASSISTED, FAST, ALL_4BIT = "plain", "exact", "assistant", "fast", "all_4bit"
# Share of the memory's bandwidth that a token reaches: the geometric mean over the machines and models of
# benchmarks/results (docs/guides/machines.md has each of them; a test compares).
EFFICIENCY: Mapping[str, float] = {PLAIN: 0.29, EXACT: 0.88, FAST: 0.82, ALL_4BIT: 0.84}
DRAFTED, EMITTED = 3, 3.3  # tokens of a cycle in exact mode, as measured with Qwen2.5-Coder-1.5B
# Share of an assistant's tokens that are its model's own, if those before were: Qwen2.5-Coder-0.5B for the 1.5B
# (docs/guides/assistant.md has it by kind of text).
AGREES = 0.83
_LONGEST = 15
# 16-bit layers of a token with quality="fast" and threshold=0.7: the mean exit depth of SmolLM2 is 2.05.
FAST_LAYERS = 2
# Bits of a weight as loaded, and as verification reads it: only bfloat16 is packed.
_BITS: Mapping[str, tuple[int, int]] = {"bfloat16": (16, 12), "float16": (16, 16), "float32": (32, 32)}
_TWIN_BITS = 4.5  # with a scale and a zero point for each group
_IN_MXFP4 = 4.25 / 16  # of the bytes of bfloat16 weights, with a scale for each group


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights of a model that a token reads, in a dtype but for experts in MXFP4, and of its twins."""

    parameters: int
    layers: int
    blocks: float  # bytes of all layers
    twins: float  # bytes of all twins
    head: float  # bytes
    dtype: str = "bfloat16"  # or float16, float32
    experts: float = 0.0  # bytes of chosen experts in MXFP4, which layers and twins share
    all_experts: float = 0.0  # bytes of all of them
    inactive: float = 0.0  # bytes of other experts that a token does not choose
    inactive_twins: float = 0.0  # bytes of their twins
    merged: float = 0.0  # bytes of stacks that transformers made from a checkpoint's matrices

    @property
    def head_twin(self) -> float:
        """Bytes of the head in 4 bits."""
        return _TWIN_BITS / _BITS[self.dtype][0] * self.head

    @property
    def made_twins(self) -> float:
        """Bytes of all twins and the head's, but for experts in MXFP4, which are the checkpoint's."""
        return self.twins - self.experts + self.head_twin

    @property
    def read_share(self) -> float:
        """Share of the bytes of layers and head that verification reads: in 12 bits if they can be packed."""
        loaded, read = _BITS[self.dtype]
        return read / loaded

    @property
    def packed(self) -> float:
        """Bytes of layers and head as verification reads them, but for experts in MXFP4."""
        return self.read_share * (self.blocks - self.experts + self.head)

    @property
    def full_depth(self) -> float:
        """Bytes of layers and head as verification reads them."""
        return self.packed + self.experts

    @property
    def unpacked(self) -> float:
        """Bytes of the parameters as loaded, but for experts in MXFP4."""
        return _BITS[self.dtype][0] / 8 * self.parameters - self.all_experts / _IN_MXFP4


def sizes_of(found: Mapping[str, Any], dtype: str) -> Sizes | None:
    """Return the sizes of what a dry run of a model in a dtype found; None if its graphs are unsupported."""
    if found["bytes"] is None:
        return None
    experts, inactive = found["experts"] or {"chosen": 0, "all": 0}, found["inactive"]
    return Sizes(
        found["parameters"],
        found["blocks"],
        **found["bytes"],
        dtype=dtype,
        experts=experts["chosen"],
        all_experts=experts["all"],
        inactive=inactive["blocks"],
        inactive_twins=inactive["twins"],
        merged=found["merged"],
    )


def bytes_per_token(sizes: Sizes) -> dict[str, float]:
    """Return the bytes of weights that a token reads in transformers, with both qualities and all in 4 bits."""
    share = FAST_LAYERS / sizes.layers
    drafts = DRAFTED * (sizes.twins + sizes.head_twin)
    layers = sizes.read_share * (sizes.blocks - sizes.experts) + sizes.experts
    return {
        PLAIN: sizes.blocks + sizes.head + sizes.experts * (1 / _IN_MXFP4 - 1),  # which it dequantizes
        EXACT: min(sizes.full_depth, (sizes.full_depth + drafts) / EMITTED),  # it drafts only while that pays
        FAST: share * layers + (1 - share) * sizes.twins + sizes.head_twin,
        ALL_4BIT: sizes.twins + sizes.head_twin,
    }


def bytes_with_assistant(sizes: Sizes, assistant: Sizes) -> float:
    """Return the bytes of weights that a token reads if an assistant drafts, at the best length of drafts."""
    # A cycle emits 1 + a + a^2 + ... tokens (Leviathan et al. 2023, arXiv 2211.17192, equation 1).
    step = assistant.twins + assistant.head_twin
    emitted = {n: (1 - AGREES ** (n + 1)) / (1 - AGREES) for n in range(1, _LONGEST + 1)}
    return min((sizes.full_depth + n * step) / tokens for n, tokens in emitted.items())


def tokens_per_s(reads: Mapping[str, float], bandwidth: float) -> dict[str, float]:
    """Return the predicted speeds for bytes a token and a memory bandwidth in bytes per second."""
    shares = {**EFFICIENCY, ASSISTED: EFFICIENCY[EXACT]}
    return {name: shares[name] * bandwidth / count for name, count in reads.items()}


def memory_bytes(sizes: Sizes) -> float:
    """Return the bytes of weights that stay in memory: River's copies, and what is read as loaded.

    A checkpoint's pages leave memory once copies are read in their place; `resident_originals` do not.
    """
    layers = sizes.blocks - sizes.experts + sizes.head + sizes.inactive
    others = sizes.unpacked - layers  # embeddings that are no head
    loaded = resident_originals(sizes) if sizes.read_share < 1 else layers
    return disk_bytes(sizes) + loaded + max(others, 0) + sizes.all_experts


def resident_originals(sizes: Sizes) -> float:
    """Return the bytes of loaded weights that stay in memory after they are packed: no file backs them."""
    return sizes.merged if sizes.read_share < 1 else 0


def disk_bytes(sizes: Sizes) -> float:
    """Return the bytes of the compile cache: 4-bit weights, and 12-bit ones if they can be packed; no MXFP4 experts."""
    packed = sizes.packed + sizes.read_share * sizes.inactive
    return (packed if sizes.read_share < 1 else 0) + sizes.made_twins + sizes.inactive_twins
