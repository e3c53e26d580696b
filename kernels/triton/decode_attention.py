"""Attention of one query position over a static cache, split over the cache and combined by log-sum-exp.

The cache holds S slots, of which the first `length` count; `length` lies in a device tensor, or all count. A sliding
window, a soft cap on the scores and a mask of slots are optional. A mask says which slots take part (bool), or is added
to the scores (a floating dtype: 0, what a model likes, or its least number for a slot that takes no part). Grouped
queries share one program: their heads are the rows of a `tl.dot`, filled up to 16. Each of `splits` programs takes
every `splits`-th block of slots, which keeps them equally busy wherever the slots that take part lie, and writes its
sum, maximum and denominator; a second launch combines them (online softmax: Milakov and Gimelshein 2018; split over the
keys: Flash-Decoding, Dao et al. 2023). Keys and values of slots that take no part are never read.

Not handled: more than one query position, masks that differ between heads.

Legend: B sequences, H query heads, J key-value heads, D features of a head, S slots, L slots that are read, P splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import sympy

from river_compile.kernels.checks import check_choice, check_positive

from .expressions import code, symbol
from .linear_source import TRITON_TYPES, masked
from .spec import (
    ACTIVATION_DTYPES,
    ITEM_BYTES,
    Argument,
    KernelSpec,
    Lines,
    Stage,
    Workspace,
    is_power_of_two,
    next_power_of_two,
)

B, H, J, D, L, P = (symbol(name) for name in "BHJDLP")
LOG2E = 1.4426950408889634
# Half the least number of each dtype: what a mask adds to the scores below it leaves nothing of a slot.
LEAST = {"float32": -1.7e38, "bfloat16": -1.69e38, "float16": -32752.0}

batch, kv_head, split, row, lane, position = (
    symbol(name) for name in ("batch", "kv_head", "split", "row", "lane", "position")
)


@dataclass(frozen=True)
class DecodeAttentionSpec(KernelSpec):
    """One shape of decode attention.

    Attributes:
        batch, heads, kv_heads, head_dim: B, H, J, D; J divides H.
        slots: S, of the caches ``[B, J, S, D]``.
        scale: of the scores.
        dtype: of q, the caches and the result.
        window: slots that a query sees, its own included; 0 for all.
        softcap: c in c tanh(score / c); 0 for none.
        mask: whether a mask ``[B, S]`` says which slots take part.
        mask_dtype: "bool", or that of a mask which is added to the scores.
        counted: whether a device tensor says how many slots count; False for all S.
        splits: P, programs that share the slots of one head; 1 needs no second launch.
        block: slots of one step.
        cache_strides: elements from one sequence, head and slot to the next; empty for a contiguous cache.
        index_dtype: of the length.
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
    window: int = 0
    softcap: float = 0.0
    mask: bool = False
    mask_dtype: str = "bool"
    counted: bool = True
    splits: int = 8
    block: int = 32
    cache_strides: tuple[int, ...] = ()
    index_dtype: str = "int64"
    num_warps: int = 4

    def __post_init__(self) -> None:
        check_positive(batch=self.batch, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        check_positive(slots=self.slots, splits=self.splits)
        check_choice("dtype", self.dtype, ACTIVATION_DTYPES)
        check_choice("index_dtype", self.index_dtype, ("int32", "int64"))
        check_choice("mask_dtype", self.mask_dtype, ("bool", *ACTIVATION_DTYPES))
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.window < 0 or self.softcap < 0:
            raise ValueError(f"window={self.window} and softcap={self.softcap} must not be negative; 0 turns them off")
        if self.window and not self.counted:
            raise ValueError(f"window={self.window} needs counted=True: it ends at the last slot that counts")
        if not is_power_of_two(self.block) or self.block < 16:
            raise ValueError(f"block={self.block} is not a power of two of at least 16")
        if len(self.cache_strides) not in (0, 3):
            raise ValueError(f"cache_strides={self.cache_strides} are not those of sequence, head and slot")

    @property
    def strides(self) -> tuple[int, int, int]:
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

    def stages(self) -> tuple[Stage, ...]:
        inputs = [Argument(name, self.dtype) for name in ("q", "k_cache", "v_cache")]
        if self.counted:
            inputs.append(Argument("length", self.index_dtype))
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

    def values(self) -> Mapping[sympy.Symbol, int]:
        read = min(self.slots, self.window) if self.window else self.slots
        return {B: self.batch, H: self.heads, J: self.kv_heads, D: self.head_dim, L: read, P: self.splits}

    def bytes(self) -> sympy.Expr:
        item = ITEM_BYTES[self.dtype]
        parts = 2 * 4 * B * H * P * (D + 2) if self.splits > 1 else 0
        mask = B * L * ITEM_BYTES[self.mask_dtype] * int(self.mask)
        length = ITEM_BYTES[self.index_dtype] * int(self.counted)
        return item * (2 * B * J * L * D + 2 * B * H * D) + mask + length + parts

    def flops(self) -> sympy.Expr:
        return 4 * B * H * L * D

    def write(self, lines: Lines) -> None:
        stages = self.stages()
        stages[0].define(lines)
        with lines.indented():
            self._write_start(lines)
            with lines.indented(f"for start in range(first, length, {self.splits * self.block}):"):
                self._write_step(lines)
            self._write_end(lines)
        if self.splits > 1:
            stages[1].define(lines)
            with lines.indented():
                self._write_combine(lines)

    def _masks(self) -> tuple[str, str]:
        live_row = "" if self.group == self.group_block else f"row[:, None] < {self.group}"
        live_lane = "" if self.head_dim == self.dim_block else f"lane[None, :] < {self.head_dim}"
        return live_row, live_lane

    def _write_start(self, lines: Lines) -> None:
        query = code((batch * self.heads + kv_head * self.group) * self.head_dim)
        oldest = f"tl.maximum(length - {self.window}, 0)" if self.window else "0"
        lines.add(
            "kv_head = tl.program_id(0)",
            "batch = tl.program_id(1).to(tl.int64)  # a cache may hold more than 2^31 elements",
            f"row = tl.arange(0, {self.group_block})",
            f"lane = tl.arange(0, {self.dim_block})",
            f"query = q_ptr + {query} + row[:, None] * {self.head_dim} + lane[None, :]",
            f"q = tl.load(query{masked(*self._masks())})",
            f"length = tl.minimum(tl.load(length_ptr).to(tl.int32), {self.slots})"
            if self.counted
            else f"length = {self.slots}",
        )
        if self.splits == 1:
            lines.add(f"first = {oldest}")
        else:
            lines.add("split = tl.program_id(2)", f"first = {oldest} + split * {self.block}")
        lines.add(
            f"total = tl.zeros(({self.group_block}, {self.dim_block}), tl.float32)",
            f'highest = tl.full(({self.group_block},), float("-inf"), tl.float32)',
            f"weight = tl.zeros(({self.group_block},), tl.float32)",
        )

    def _write_step(self, lines: Lines) -> None:
        per_batch, per_head, per_slot = self.strides
        lines.add(f"slot = start + tl.arange(0, {self.block})", "live = slot < length")
        adds = self.mask and self.mask_dtype != "bool"
        if self.mask:
            loaded = f"tl.load(mask_ptr + {code(batch * self.slots)} + slot, mask=live, other=0)"
            if adds:
                lines.add(f"bias = {loaded}.to(tl.float32)", f"live = live & (bias > {LEAST[self.mask_dtype]!r})")
            else:
                lines.add(f"live = live & {loaded}")
        base = code(batch * per_batch + kv_head * per_head)
        cell = f"{base} + slot[:, None].to(tl.int64) * {per_slot} + lane[None, :]"
        mask = masked("live[:, None]", self._masks()[1])
        precision = ', input_precision="ieee"' if self.dtype == "float32" else ""
        lines.add(f"cell = {cell}", f"k = tl.load(k_cache_ptr + cell{mask})", f"v = tl.load(v_cache_ptr + cell{mask})")
        zeros = f"tl.zeros(({self.group_block}, {self.block}), tl.float32)"
        lines.add(f"score = tl.dot(q, tl.trans(k), {zeros}{precision}) * {self.scale!r}")
        if self.softcap:  # tanh(u) = 1 - 2 / (exp(2 u) + 1)
            cap = self.softcap
            lines.add(f"score = {cap!r} * (1.0 - 2.0 / (tl.exp(score * {2.0 / cap!r}) + 1.0))")
        if adds:
            lines.add("score = score + bias[None, :]")
        lines.add(
            'score = tl.where(live[None, :], score, float("-inf"))',
            "new_highest = tl.maximum(highest, tl.max(score, axis=1))",
            # While no slot has counted yet, the maximum is -inf and must not be subtracted from itself.
            'shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)',
            f"probability = tl.exp2((score - shift[:, None]) * {LOG2E})",
            f"decay = tl.exp2((highest - shift) * {LOG2E})",
            "weight = weight * decay + tl.sum(probability, axis=1)",
            f"total = tl.dot(probability.to({TRITON_TYPES[self.dtype]}), v, total * decay[:, None]{precision})",
            "highest = new_highest",
        )

    def _write_end(self, lines: Lines) -> None:
        heads = batch * self.heads + kv_head * self.group + row
        store = masked(*self._masks(), other=None)
        if self.splits == 1:
            lines.add(
                "total = total / tl.where(weight > 0.0, weight, 1.0)[:, None]",
                f"cell = {code(heads * self.head_dim)}".replace("row", "row[:, None]") + " + lane[None, :]",
                f"tl.store(out_ptr + cell, total.to({TRITON_TYPES[self.dtype]}){store})",
            )
            return
        live_row = self._masks()[0].replace("row[:, None]", "row")
        lines.add(
            f"part = {code(heads * self.splits + split)}",
            f"tl.store(part_sum_ptr + part[:, None] * {self.head_dim} + lane[None, :], total{store})",
            f"tl.store(part_scale_ptr + part * 2, highest{masked(live_row, other=None)})",
            f"tl.store(part_scale_ptr + part * 2 + 1, weight{masked(live_row, other=None)})",
        )

    def _write_combine(self, lines: Lines) -> None:
        padded = next_power_of_two(self.splits)
        live_split = "" if padded == self.splits else f"split < {self.splits}"
        live_lane = "" if self.head_dim == self.dim_block else f"lane < {self.head_dim}"
        wide = masked(live_split.replace("split", "split[:, None]"), live_lane.replace("lane", "lane[None, :]"))
        minus_infinity = masked(live_split, other='float("-inf")')
        lines.add(
            f"head = {code(symbol('batch') * self.heads)} + tl.program_id(0)".replace("batch", "tl.program_id(1)"),
            f"split = tl.arange(0, {padded})",
            f"lane = tl.arange(0, {self.dim_block})",
            f"part = head * {self.splits} + split",
            f"highest = tl.load(part_scale_ptr + part * 2{minus_infinity})",
            f"weight = tl.load(part_scale_ptr + part * 2 + 1{masked(live_split)})",
            f"total = tl.load(part_sum_ptr + part[:, None] * {self.head_dim} + lane[None, :]{wide})",
            "overall = tl.max(highest, axis=0)",
            'shift = tl.where(overall == float("-inf"), 0.0, overall)',
            f"decay = tl.exp2((highest - shift) * {LOG2E})",
            "denominator = tl.sum(weight * decay, axis=0)",
            "result = tl.sum(total * decay[:, None], axis=0) / tl.where(denominator > 0.0, denominator, 1.0)",
            f"cell = head * {self.head_dim} + lane",
            f"tl.store(out_ptr + cell, result.to({TRITON_TYPES[self.dtype]}){masked(live_lane, other=None)})",
        )
