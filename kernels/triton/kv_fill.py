"""From a merged projection to the query and filled cache slots, in one launch.

Takes q|k|v of one token per sequence, or of several, and applies, each where the spec asks for it: the RMSNorm of every
query and key head (qk-norm) and the rotary embedding (Su et al. 2021) of a head's first features, half-split or
interleaved. Of the caches exactly the slots change whose indices lie in a device tensor, one for each position or the
first one's alone; an index outside writes nothing.

One program handles one head of one token. Not handled: a norm over all heads together.

Legend: B sequences, T positions, H query heads, J key-value heads, D features of a head, R rotated features, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from river_compile.kernels.checks import check_choice
from river_compile.kernels.triton.spec import ACTIVATION_DTYPES, Buffer, CacheSpec, Cost, Stage

HEAD_NORMS = ("none", "rms", "rms_plus_one")


@dataclass(frozen=True)
class Part:
    """Features start, start + step, ... of a head, `size` of them, as one vector of the kernel."""

    name: str
    start: int
    size: int
    step: int = 1


@dataclass(frozen=True)
class KvFillSpec(CacheSpec):
    """One shape of the q|k|v step."""

    family: ClassVar[str] = "kv_fill"

    rotary_dim: int = 0  # R, an even number up to D; 0 for no rotary embedding
    rotary_dtype: str = "bfloat16"  # of cos and sin
    interleaved: bool = False  # whether rotated pairs are neighbours instead of R / 2 apart
    rotary_rows: int = 1  # sequences of cos and sin: B, or 1 where all share their positions
    head_norm: str = "none"  # "rms" or "rms_plus_one" for queries and keys
    eps: float = 1e-6  # as in torch
    index_dtype: str = "int64"  # of the slot index
    counts: bool = False  # whether the slots follow one another, and only the first one's index is there

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rotary_dtype", self.rotary_dtype, ACTIVATION_DTYPES)
        check_choice("head_norm", self.head_norm, HEAD_NORMS)
        check_choice("rotary_rows", self.rotary_rows, (1, self.batch))
        check_choice("index_dtype", self.index_dtype, ("int32", "int64"))
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim={self.rotary_dim} is not an even number up to head_dim={self.head_dim}")

    @property
    def all_heads(self) -> int:
        return self.heads + 2 * self.kv_heads

    def parts(self, head: str) -> tuple[Part, ...]:
        """Returns the parts of head "q", "k" or "v" that rotation tells apart: first and second turn each other."""
        half, rest = self.rotary_dim // 2, self.head_dim - self.rotary_dim
        if not half or head == "v":
            return (Part(head, 0, self.head_dim),)
        start, step = (1, 2) if self.interleaved else (half, 1)
        parts = Part(f"{head}_first", 0, half, step), Part(f"{head}_second", start, half, step)
        return (*parts, Part(f"{head}_rest", self.rotary_dim, rest)) if rest else parts

    def buffers(self, rows: int | None = None) -> dict[str, Buffer]:
        lines, positions = self.lines(rows), self.at_once(rows)
        found = {"qkv": Buffer(self.dtype, (lines, self.all_heads, self.head_dim))}
        if self.head_norm != "none":
            found["q_norm"] = found["k_norm"] = Buffer(self.dtype, (self.head_dim,))
        if self.rotary_dim:
            tables = (self.rotary_rows * positions, self.rotary_dim)
            found["cos"] = found["sin"] = Buffer(self.rotary_dtype, tables)
        found["slot"] = Buffer(self.index_dtype, (1 if self.counts else positions,))
        found["k_cache"] = found["v_cache"] = self.cache
        return {**found, "q": Buffer(self.dtype, (lines, self.heads, self.head_dim))}

    def stages(self) -> tuple[Stage, ...]:
        def grid(rows: int) -> tuple[int, int, int]:
            return self.lines(rows), self.all_heads, 1  # (a prompt may have more tokens than the second axis takes)

        return (Stage(self.family, (*self.buffers(1), *self.scalars), grid, 1),)

    def flops(self, rows: int | None = None) -> int:
        per_head = 3 * self.rotary_dim + 4 * self.head_dim * (self.head_norm != "none")
        return self.lines(rows) * (self.heads + self.kv_heads) * per_head

    def cost(self, rows: int | None = None) -> Cost:
        """Returns what a call costs: of the caches it writes a slot for each position."""
        untouched = 2 * self.cache.bytes // self.slots * (self.slots - self.at_once(rows))
        return Cost(super().cost(rows).bytes - untouched, self.flops(rows))
