"""Predicts tokens/s, memory and disk from the bytes of weights that a token reads.

Not handled: attention over long contexts, the KV cache, texts whose drafts are accepted more or less often than most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PLAIN, EXACT, FAST, ALL_4BIT = "plain", "exact", "fast", "all_4bit"
# Share of the memory's bandwidth that a token reaches: the geometric mean over the machines and models of
# benchmarks/results (docs/guides/machines.md has each of them; a test compares).
EFFICIENCY: Mapping[str, float] = {PLAIN: 0.29, EXACT: 0.88, FAST: 0.82, ALL_4BIT: 0.84}
DRAFTED, EMITTED = 3, 3.3  # tokens of a cycle in exact mode, as measured with Qwen2.5-Coder-1.5B
FAST_LAYERS = 2  # 16-bit layers of a token with quality="fast": the mean exit depth of SmolLM2 is 2.05
_IN_12_BITS = 12 / 16  # of the bytes of bfloat16 weights
_IN_4_BITS = 4.5 / 16  # with a scale and a zero point for each group


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights of a model in 16 bits that a token reads, and of its twins."""

    parameters: int
    layers: int
    blocks: float  # bytes of all layers
    twins: float  # bytes of all twins
    head: float  # bytes

    @property
    def head_twin(self) -> float:
        """Bytes of the head in 4 bits."""
        return _IN_4_BITS * self.head

    @property
    def packed(self) -> float:
        """Bytes of layers and head in 12 bits."""
        return _IN_12_BITS * (self.blocks + self.head)


def bytes_per_token(sizes: Sizes) -> dict[str, float]:
    """Return the bytes of weights that a token reads in transformers, with both qualities and all in 4 bits."""
    share = FAST_LAYERS / sizes.layers
    drafts = DRAFTED * (sizes.twins + sizes.head_twin)
    return {
        PLAIN: sizes.blocks + sizes.head,
        EXACT: (sizes.packed + drafts) / EMITTED,
        FAST: share * _IN_12_BITS * sizes.blocks + (1 - share) * sizes.twins + sizes.head_twin,
        ALL_4BIT: sizes.twins + sizes.head_twin,
    }


def tokens_per_s(sizes: Sizes, bandwidth: float) -> dict[str, float]:
    """Return the predicted speeds for a memory bandwidth in bytes per second."""
    return {name: EFFICIENCY[name] * bandwidth / count for name, count in bytes_per_token(sizes).items()}


def memory_bytes(sizes: Sizes) -> float:
    """Return the bytes of weights that River keeps in memory: in 12 bits, in 4 bits, and other ones in 16."""
    others = 2 * sizes.parameters - (sizes.blocks + sizes.head)  # embeddings that are no head
    return disk_bytes(sizes) + max(others, 0)


def disk_bytes(sizes: Sizes) -> float:
    """Return the bytes of the compile cache: 12-bit and 4-bit weights."""
    return sizes.packed + sizes.twins + sizes.head_twin
