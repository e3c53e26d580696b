"""Attention of one query position or a few over a static cache, split over it and combined by log-sum-exp.

A mask of slots, boolean or added to the scores, and a soft cap on the scores are optional. Grouped queries share one
program: their heads are the rows of a `tl.dot`, filled up to 16, and keys and values are read once for all of them.
Each of `splits` programs takes every `splits`-th block of slots, which keeps them equally busy wherever the slots that
take part lie, and writes its sum, maximum and denominator. The last of them to do so, which a counter tells, combines
them and sets the counter back (online softmax: Milakov and Gimelshein 2018; split over the keys: Flash-Decoding, Dao et
al. 2023; the last block of a grid: the sample threadFenceReduction of CUDA). In which order the others came does not
show in the bits. Keys and values of slots that take no part are never read, and a block of nothing else costs its mask.

With `fill` the query is not there yet: every program makes its heads of q from q|k|v (norm, rotary embedding), which is
little beside reading the cache, and the one whose blocks hold the new slot makes key and value, writes them, and
attends to what it has in registers. No program reads the new slot, so none waits for another. With `advance` the slot
is a counter of tokens, which the last program of all advances when every other one has read it.

Where the positions are open (`positions` None), a program takes as many of them as fill the 16 rows with their heads.
The kernel does not know how many there are, so a position has the same bits whichever others stand beside it; keys and
values are in the cache already, and a slot that any position of a program sees is read for all of them. With `advance`
the first program counts the tokens: the launch before, which fills the slots, has read the counter.

Not handled: masks that differ between heads, windows and lengths (a mask says the same); a `fill` with open positions.

Legend: B sequences, T positions, H query heads, J key-value heads, D features of a head, S slots, P splits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from river_compile.kernels.checks import check_choice, check_positive
from river_compile.kernels.triton.kv_fill import KvFillSpec
from river_compile.kernels.triton.spec import ACTIVATION_DTYPES, Buffer, CacheSpec, Stage, is_power_of_two


@dataclass(frozen=True)
class DecodeAttentionSpec(CacheSpec):
    """One shape of decode attention; J divides H."""

    family: ClassVar[str] = "decode_attention"

    scale: float  # of the scores
    softcap: float = 0.0  # c in c tanh(score / c); 0 for none
    mask: bool = False  # whether a mask [B, T, S] says which slots take part
    mask_rows: int = 0  # sequences of the mask: B (0), or 1 where all share it and positions are open
    mask_dtype: str = "bool"  # or that of a mask which is added to the scores
    splits: int = 8  # P, programs that share the slots of one head
    block: int = 32  # slots of one step
    num_warps: int = 4
    fill: KvFillSpec | None = None  # how q comes from q|k|v and the new slot into the same cache; None: both are done
    advance: bool = False  # whether T is added to what says which slot `fill`, or the launch before, writes
    index_dtype: str = "int64"  # of that, with open positions

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(splits=self.splits)
        check_choice("mask_dtype", self.mask_dtype, ("bool", *ACTIVATION_DTYPES))
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.softcap < 0:
            raise ValueError(f"softcap={self.softcap} must not be negative; 0 turns it off")
        shared = [field.name for field in fields(CacheSpec)]
        if self.fill is not None and any(getattr(self.fill, name) != getattr(self, name) for name in shared):
            raise ValueError(f"fill={self.fill} is for another cache")
        check_choice("mask_rows", self.mask_rows, (0, 1, self.batch))
        check_choice("index_dtype", self.index_dtype, ("int32", "int64"))
        if self.advance and self.fill is None and self.positions:
            raise ValueError("advance=True needs a fill, whose slot it advances, or positions=None")
        if self.mask_rows == 1 < self.batch and self.positions:
            raise ValueError("mask_rows=1 goes with positions=None; of one position every sequence has a mask")
        if not is_power_of_two(self.block) or self.block < 16:
            raise ValueError(f"block={self.block} is not a power of two of at least 16")

    def buffers(self, rows: int | None = None) -> dict[str, Buffer]:
        query = Buffer(self.dtype, (self.lines(rows), self.heads, self.head_dim))
        if self.fill is None:
            found = {"q": query, "k_cache": self.cache, "v_cache": self.cache}
        else:
            found = {name: buffer for name, buffer in self.fill.buffers().items() if name != "q"}
        if self.advance and self.fill is None:
            found["slot"] = Buffer(self.index_dtype, (1,))
        if self.mask:
            sequences, positions = self.mask_rows or self.batch, () if self.positions else (self.at_once(rows),)
            found["mask"] = Buffer(self.mask_dtype, (sequences, *positions, self.slots))
        groups = self.groups(rows)
        if self.splits > 1:
            parts = (groups, self.splits, self.members)
            found["part_sum"] = Buffer("float32", (*parts, self.head_dim), workspace=True)
            found["part_scale"] = Buffer("float32", (*parts, 2), workspace=True)
        counts_groups = self.advance and self.fill is not None and groups > 1
        if self.splits > 1 or counts_groups:  # a counter for each group of programs, and one for all
            found["arrived"] = Buffer("int32", (groups + 1,), workspace=True, kept_for="k_cache")
        return {**found, "out": query}

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    @property
    def program_positions(self) -> int:
        """Positions of one sequence that a program attends from."""
        return 1 if self.positions else max(1, 16 // self.group)

    @property
    def members(self) -> int:
        """Query heads of a program, of all its positions."""
        return self.program_positions * self.group

    def groups(self, rows: int | None = None) -> int:
        """Returns how many groups of `splits` programs there are, each for one key-value head and some positions."""
        return self.kv_heads * self.batch * math.ceil(self.at_once(rows) / self.program_positions)

    def stages(self) -> tuple[Stage, ...]:
        def grid(rows: int) -> tuple[int, int, int]:
            return self.kv_heads, self.groups(rows) // self.kv_heads, self.splits

        return (Stage(self.family, (*self.buffers(1), *self.scalars), grid, self.num_warps),)

    def flops(self, rows: int | None = None) -> int:
        filled = 0 if self.fill is None else self.fill.flops()
        return 4 * self.lines(rows) * self.heads * self.slots * self.head_dim + filled
