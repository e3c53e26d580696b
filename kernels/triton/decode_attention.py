"""Attention of one query position over a static cache, split over the cache and combined by log-sum-exp.

A mask of slots and a soft cap on the scores are optional. A mask says which of the cache's S slots take part (bool), or
is added to the scores (a floating dtype: 0, what a model likes, or its least number for a slot that takes no part).
Grouped queries share one program: their heads are the rows of a `tl.dot`, filled up to 16. Each of `splits` programs
takes every `splits`-th block of slots, which keeps them equally busy wherever the slots that take part lie, and writes
its sum, maximum and denominator; a second launch combines them (online softmax: Milakov and Gimelshein 2018; split over
the keys: Flash-Decoding, Dao et al. 2023). Keys and values of slots that take no part are never read.

Not handled: more than one query position, masks that differ between heads, windows and lengths (a mask says the same).

Legend: B sequences, H query heads, J key-value heads, D features of a head, S slots, P splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from river_compile.kernels.checks import check_choice, check_positive

from .spec import (
    ACTIVATION_DTYPES,
    ITEM_BYTES,
    Argument,
    Cost,
    KernelSpec,
    Stage,
    Workspace,
    is_power_of_two,
    next_power_of_two,
)


@dataclass(frozen=True)
class DecodeAttentionSpec(KernelSpec):
    """One shape of decode attention.

    Attributes:
        batch, heads, kv_heads, head_dim: B, H, J, D; J divides H.
        slots: S, of the caches ``[B, J, S, D]``.
        scale: of the scores.
        dtype: of q, the caches and the result.
        softcap: c in c tanh(score / c); 0 for none.
        mask: whether a mask ``[B, S]`` says which slots take part.
        mask_dtype: "bool", or that of a mask which is added to the scores.
        splits: P, programs that share the slots of one head; 1 needs no second launch.
        block: slots of one step.
        cache_strides: elements from one sequence, head and slot to the next; empty for a contiguous cache.
        num_warps: warps of a program.
    """

    family: ClassVar[str] = "decode_attention"

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    scale: float
    dtype: str = "bfloat16"
    softcap: float = 0.0
    mask: bool = False
    mask_dtype: str = "bool"
    splits: int = 8
    block: int = 32
    cache_strides: tuple[int, ...] = ()
    num_warps: int = 4

    def __post_init__(self) -> None:
        check_positive(batch=self.batch, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        check_positive(slots=self.slots, splits=self.splits)
        check_choice("dtype", self.dtype, ACTIVATION_DTYPES)
        check_choice("mask_dtype", self.mask_dtype, ("bool", *ACTIVATION_DTYPES))
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.softcap < 0:
            raise ValueError(f"softcap={self.softcap} must not be negative; 0 turns it off")
        if not is_power_of_two(self.block) or self.block < 16:
            raise ValueError(f"block={self.block} is not a power of two of at least 16")
        if len(self.cache_strides) not in (0, 3):
            raise ValueError(f"cache_strides={self.cache_strides} are not those of sequence, head and slot")

    @property
    def strides(self) -> tuple[int, ...]:
        line = self.slots * self.head_dim
        return self.cache_strides or (self.kv_heads * line, line, self.head_dim)

    @property
    def group(self) -> int:
        """Query heads of one key-value head."""
        return self.heads // self.kv_heads

    @property
    def group_block(self) -> int:
        return max(16, next_power_of_two(self.group))

    @property
    def dim_block(self) -> int:
        return max(16, next_power_of_two(self.head_dim))

    @property
    def split_block(self) -> int:
        return next_power_of_two(self.splits)

    def stages(self) -> tuple[Stage, ...]:
        inputs = [Argument(name, self.dtype) for name in ("q", "k_cache", "v_cache")]
        if self.mask:
            inputs.append(Argument("mask", self.mask_dtype))
        out = Argument("out", self.dtype)

        def grid(_rows: int) -> tuple[int, int, int]:
            return self.kv_heads, self.batch, self.splits

        if self.splits == 1:
            return (Stage(self.family, (*inputs, out), grid, self.num_warps),)
        parts = (Argument("part_sum", "float32"), Argument("part_scale", "float32"))
        return (
            Stage(f"{self.family}_split", (*inputs, *parts), grid, self.num_warps),
            Stage(f"{self.family}_combine", (*parts, out), lambda _rows: (self.heads, self.batch, 1), 1, 1),
        )

    def workspaces(self) -> tuple[Workspace, ...]:
        if self.splits == 1:
            return ()
        rows = (self.batch, self.heads, self.splits)
        return (
            Workspace("part_sum", "float32", lambda _rows: (*rows, self.head_dim)),
            Workspace("part_scale", "float32", lambda _rows: (*rows, 2)),
        )

    def cost(self, rows: int | None = None) -> Cost:
        entries = 2 * self.batch * self.kv_heads * self.slots * self.head_dim
        queries = self.batch * self.heads
        mask = self.batch * self.slots * ITEM_BYTES[self.mask_dtype] * self.mask
        parts = 2 * 4 * queries * self.splits * (self.head_dim + 2) if self.splits > 1 else 0
        moved = ITEM_BYTES[self.dtype] * (entries + 2 * queries * self.head_dim) + mask + parts
        return Cost(moved, 4 * queries * self.slots * self.head_dim)
