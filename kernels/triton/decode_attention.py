"""Attention of one query position over a static cache, split over the cache and combined by log-sum-exp, in one launch.

A mask of slots, boolean or added to the scores, and a soft cap on the scores are optional. Grouped queries share one
program: their heads are the rows of a `tl.dot`, filled up to 16, and keys and values are read once for all of them.
Each of `splits` programs takes every `splits`-th block of slots, which keeps them equally busy wherever the slots that
take part lie, and writes its sum, maximum and denominator. The last of them to do so, which a counter tells, combines
them and sets the counter back (online softmax: Milakov and Gimelshein 2018; split over the keys: Flash-Decoding, Dao et
al. 2023; the last block of a grid: the sample threadFenceReduction of CUDA). In which order the others came does not
show in the bits. Keys and values of slots that take no part are never read, and a block of nothing else costs its mask.

Not handled: more than one query position, masks that differ between heads, windows and lengths (a mask says the same).

Legend: B sequences, H query heads, J key-value heads, D features of a head, S slots, P splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from river_compile.kernels.checks import check_choice, check_positive

from .spec import ACTIVATION_DTYPES, Buffer, CacheSpec, Stage, is_power_of_two


@dataclass(frozen=True)
class DecodeAttentionSpec(CacheSpec):
    """One shape of decode attention; J divides H."""

    family: ClassVar[str] = "decode_attention"

    scale: float  # of the scores
    softcap: float = 0.0  # c in c tanh(score / c); 0 for none
    mask: bool = False  # whether a mask [B, S] says which slots take part
    mask_dtype: str = "bool"  # or that of a mask which is added to the scores
    splits: int = 8  # P, programs that share the slots of one head
    block: int = 32  # slots of one step
    num_warps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(splits=self.splits)
        check_choice("mask_dtype", self.mask_dtype, ("bool", *ACTIVATION_DTYPES))
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.softcap < 0:
            raise ValueError(f"softcap={self.softcap} must not be negative; 0 turns it off")
        if not is_power_of_two(self.block) or self.block < 16:
            raise ValueError(f"block={self.block} is not a power of two of at least 16")

    def buffers(self, rows: int | None = None) -> dict[str, Buffer]:
        query = Buffer(self.dtype, (self.batch, self.heads, self.head_dim))
        found = {"q": query, "k_cache": self.cache, "v_cache": self.cache}
        if self.mask:
            found["mask"] = Buffer(self.mask_dtype, (self.batch, self.slots))
        if self.splits > 1:
            parts = (self.batch, self.kv_heads, self.splits, self.group)
            found["part_sum"] = Buffer("float32", (*parts, self.head_dim), workspace=True)
            found["part_scale"] = Buffer("float32", (*parts, 2), workspace=True)
            found["arrived"] = Buffer("int32", (self.batch, self.kv_heads), workspace=True, kept_for="k_cache")
        return {**found, "out": query}

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    def stages(self) -> tuple[Stage, ...]:
        def grid(_rows: int) -> tuple[int, int, int]:
            return self.kv_heads, self.batch, self.splits

        return (Stage(self.family, tuple(self.buffers()), grid, self.num_warps),)

    def flops(self, rows: int | None = None) -> int:
        return 4 * self.batch * self.heads * self.slots * self.head_dim
