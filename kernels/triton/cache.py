"""Specs of the kernels on a static cache (fill and attention), and of the exit score.

Legend: B sequences, T positions, H query heads, J key-value heads, D features of a head, R rotated features, S slots,
P splits. Not handled: a norm over all heads together, masks that differ between heads, windows and lengths (a mask can
express them), a `fill` with open positions, strided rows of the exit score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from river_compile.kernels.checks import check_choice, check_positive
from river_compile.kernels.triton.spec import (
    ACTIVATION_DTYPES,
    Buffer,
    CacheSpec,
    Cost,
    KernelSpec,
    Stage,
    is_power_of_two,
)


@dataclass(frozen=True)
class DecodeAttentionSpec(CacheSpec):
    """Attention of one query position or a few over a static cache, split over it; J divides H."""

    # Heads of a group are the rows of a `tl.dot`, padded to 16, so keys and values are read once for all of them. Each
    # of `splits` programs takes every `splits`-th block of slots, for equal work wherever the slots of the mask lie.
    # The last program to finish, by a counter, combines the sums, maxima and denominators, so bits do not depend on the
    # order. Sources: online softmax (Milakov and Gimelshein 2018), split keys (Flash-Decoding, Dao et al. 2023), the
    # last block (CUDA's sample threadFenceReduction). Keys and values of masked slots are never read; a masked block
    # costs its mask.
    #
    # With `fill`, every program computes its heads of q from q|k|v, which is cheap compared with the cache. The program
    # whose blocks hold the new slot writes its key and value and attends to them in registers, so none waits for
    # another.
    #
    # With open positions the kernel does not know T, so a position's bits do not depend on the others. With `advance`
    # the last program of all adds T to the counter, or with open positions the first: the launch before has read it.
    family: ClassVar[str] = "decode_attention"

    scale: float  # of the scores
    softcap: float = 0.0  # c in c tanh(score / c); 0 for none
    mask: bool = False  # whether there is a mask [B, T, S]
    mask_rows: int = 0  # sequences of the mask: B (0), or 1 for a shared mask with open positions
    mask_dtype: str = "bool"  # or that of a mask that is added to the scores
    splits: int = 8  # P, programs that share the slots of one head
    block: int = 32  # slots of one step
    num_warps: int = 4
    fill: KvFillSpec | None = None  # from q|k|v to q and the new slot of the same cache; None: already done
    advance: bool = False  # whether T is added to the slot index of `fill`, or of the launch before
    sinks_dtype: str | None = None  # of the sinks [H], each head's score of one more key, whose value is 0; None: none
    index_dtype: str = "int64"  # of the slot index, with open positions

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(splits=self.splits)
        check_choice("mask_dtype", self.mask_dtype, ("bool", *ACTIVATION_DTYPES))
        check_choice("sinks_dtype", self.sinks_dtype, (None, *ACTIVATION_DTYPES))
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
            raise ValueError("mask_rows=1 goes with positions=None; with one position every sequence has a mask")
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
        if self.sinks_dtype:
            found["sinks"] = Buffer(self.sinks_dtype, (self.heads,))
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
        """Positions of one sequence in a program: as many as fill the 16 rows of a dot with heads."""
        return 1 if self.positions else max(1, 16 // self.group)

    @property
    def members(self) -> int:
        """Query heads of a program, of all its positions."""
        return self.program_positions * self.group

    def groups(self, rows: int | None = None) -> int:
        """Return the groups of `splits` programs, each for one key-value head and some positions."""
        return self.kv_heads * self.batch * math.ceil(self.at_once(rows) / self.program_positions)

    def stages(self) -> tuple[Stage, ...]:
        def grid(rows: int) -> tuple[int, int, int]:
            return self.kv_heads, self.groups(rows) // self.kv_heads, self.splits

        return (Stage(self.family, (*self.buffers(1), *self.scalars), grid, self.num_warps),)

    def flops(self, rows: int | None = None) -> int:
        filled = 0 if self.fill is None else self.fill.flops()
        return 4 * self.lines(rows) * self.heads * self.slots * self.head_dim + filled


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
    """The step from q|k|v to the query and filled cache slots; one program for each head of a token."""

    family: ClassVar[str] = "kv_fill"

    # Optional per head: RMSNorm of q and k (qk-norm), then the rotary embedding (Su et al. 2021) of the first features.
    # Only the indexed slots change; an index outside of the cache writes nothing.
    rotary_dim: int = 0  # R, an even number up to D; 0 for no rotary embedding
    rotary_dtype: str = "bfloat16"  # of cos and sin
    interleaved: bool = False  # whether rotated pairs are neighbors instead of R / 2 apart
    half_tables: bool = False  # whether cos and sin have one angle for each pair, R / 2
    rotary_rows: int = 1  # sequences of cos and sin: B, or 1 for shared positions
    head_norm: str = "none"  # "rms" or "rms_plus_one" for queries and keys
    eps: float = 1e-6  # as in torch
    index_dtype: str = "int64"  # of the slot index
    counts: bool = False  # whether the slots are consecutive, and only the first one's index is given

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

    @property
    def angles(self) -> int:
        """Columns of cos and sin."""
        return self.rotary_dim // 2 if self.half_tables else self.rotary_dim

    def angle_of(self, feature: str) -> str:
        """Return the expression of a feature's column in cos and sin."""
        if not self.half_tables:
            return feature
        return f"{feature} // 2" if self.interleaved else f"{feature} % {self.angles}"

    def parts(self, head: str) -> tuple[Part, ...]:
        """Return the parts of head "q", "k" or "v" for the rotation, which combines first and second."""
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
            tables = (self.rotary_rows * positions, self.angles)
            found["cos"] = found["sin"] = Buffer(self.rotary_dtype, tables)
        found["slot"] = Buffer(self.index_dtype, (1 if self.counts else positions,))
        found["k_cache"] = found["v_cache"] = self.cache
        return {**found, "q": Buffer(self.dtype, (lines, self.heads, self.head_dim))}

    def stages(self) -> tuple[Stage, ...]:
        def grid(rows: int) -> tuple[int, int, int]:
            return self.lines(rows), self.all_heads, 1  # the second axis is too short for a prompt's tokens

        return (Stage(self.family, (*self.buffers(1), *self.scalars), grid, 1),)

    def flops(self, rows: int | None = None) -> int:
        per_head = 3 * self.rotary_dim + 4 * self.head_dim * (self.head_norm != "none")
        return self.lines(rows) * (self.heads + self.kv_heads) * per_head

    def cost(self, rows: int | None = None) -> Cost:
        """Return the cost of a call, which writes one slot of the caches for each position."""
        untouched = 2 * self.cache.bytes // self.slots * (self.slots - self.at_once(rows))
        return Cost(super().cost(rows).bytes - untouched, self.flops(rows))


@dataclass(frozen=True)
class ExitScoreSpec(KernelSpec):
    """Residual add, two norms and a dot in one pass: the smallest cosine of hidden and previous over all rows."""

    family: ClassVar[str] = "exit_score"

    rows: int  # the batch of a decode step; one program visits all rows, so that their minimum needs no atomics
    features: int  # the hidden size
    dtype: str = "bfloat16"  # of update, residual, previous and hidden
    num_warps: int = 8

    def __post_init__(self) -> None:
        check_positive(rows=self.rows, features=self.features)
        check_choice("dtype", self.dtype, ACTIVATION_DTYPES)

    def buffers(self, rows: int | None = None) -> dict[str, Buffer]:
        states = Buffer(self.dtype, (self.rows, self.features))
        score = Buffer("float32", (1,))
        # hidden = residual + update. A zero row, overflow or NaN makes the score NaN, which exceeds no threshold.
        return {"update": states, "residual": states, "previous": states, "hidden": states, "score": score}

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.family, tuple(self.buffers()), lambda _rows: (1, 1, 1), self.num_warps),)

    def flops(self, rows: int | None = None) -> int:
        return 7 * self.rows * self.features
