"""From a merged projection to the query and a filled cache slot, in one launch at one query position.

Takes q|k|v of one token per sequence and applies, each where the spec asks for it: a bias, the RMSNorm of every query
and key head (qk-norm), the rotary embedding (Su et al. 2021) of a head's first features, half-split or interleaved.
Writes the key and the value into the slot whose index lies in a device tensor, and returns the query. Exactly that slot
changes; an index outside the cache writes nothing.

One program handles one head of one sequence. Not handled: more than one position, a norm over all heads together.

Legend: B sequences, H query heads, J key-value heads, D features of a head, R rotated features, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import sympy

from river_compile.kernels.checks import check_choice, check_positive

from .expressions import Expression, code, symbol
from .linear_source import TRITON_TYPES, masked
from .spec import (
    ACTIVATION_DTYPES,
    ITEM_BYTES,
    Argument,
    KernelSpec,
    Lines,
    Stage,
    next_power_of_two,
)

B, H, J, D, R = (symbol(name) for name in "BHJDR")
HEAD_NORMS = ("none", "rms", "rms_plus_one")

batch, head = symbol("batch"), symbol("head")


@dataclass(frozen=True)
class KvFillSpec(KernelSpec):
    """One shape of the q|k|v step.

    Attributes:
        batch, heads, kv_heads, head_dim: B, H, J, D.
        slots: S, of the cache ``[B, J, S, D]``.
        dtype: of all floating tensors but cos and sin.
        rotary_dim: R, an even number up to D; 0 for no rotary embedding.
        rotary_dtype: of cos and sin.
        interleaved: whether pairs are neighbours instead of R / 2 apart.
        rotary_rows: rows of cos and sin: B, or 1 where all sequences share a position.
        bias: whether q|k|v has a bias.
        head_norm: "none", "rms" or "rms_plus_one" for queries and keys; `eps` as in torch.
        cache_strides: elements from one sequence, head and slot to the next; empty for a contiguous cache.
        index_dtype: of the slot index.
    """

    family: ClassVar[str] = "kv_fill"

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    dtype: str = "bfloat16"
    rotary_dim: int = 0
    rotary_dtype: str = "bfloat16"
    interleaved: bool = False
    rotary_rows: int = 1
    bias: bool = False
    head_norm: str = "none"
    eps: float = 1e-6
    cache_strides: tuple[int, ...] = ()
    index_dtype: str = "int64"

    def __post_init__(self) -> None:
        check_positive(batch=self.batch, heads=self.heads, kv_heads=self.kv_heads, slots=self.slots)
        check_positive(head_dim=self.head_dim)
        check_choice("dtype", self.dtype, ACTIVATION_DTYPES)
        check_choice("rotary_dtype", self.rotary_dtype, ACTIVATION_DTYPES)
        check_choice("head_norm", self.head_norm, HEAD_NORMS)
        check_choice("rotary_rows", self.rotary_rows, (1, self.batch))
        check_choice("index_dtype", self.index_dtype, ("int32", "int64"))
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim={self.rotary_dim} is not an even number up to head_dim={self.head_dim}")
        if len(self.cache_strides) not in (0, 3):
            raise ValueError(f"cache_strides={self.cache_strides} are not those of sequence, head and slot")

    @property
    def strides(self) -> tuple[int, int, int]:
        row = self.slots * self.head_dim
        return self.cache_strides or (self.kv_heads * row, row, self.head_dim)

    @property
    def all_heads(self) -> int:
        return self.heads + 2 * self.kv_heads

    def stages(self) -> tuple[Stage, ...]:
        buffers = [Argument("qkv", self.dtype)]
        if self.bias:
            buffers.append(Argument("bias", self.dtype))
        if self.head_norm != "none":
            buffers += [Argument("q_norm", self.dtype), Argument("k_norm", self.dtype)]
        if self.rotary_dim:
            buffers += [Argument("cos", self.rotary_dtype), Argument("sin", self.rotary_dtype)]
        caches = [Argument("slot", self.index_dtype), Argument("k_cache", self.dtype), Argument("v_cache", self.dtype)]
        arguments = (*buffers, *caches, Argument("q", self.dtype))
        return (Stage(self.family, arguments, lambda _rows: (self.all_heads, self.batch, 1), 1),)

    def values(self) -> Mapping[sympy.Symbol, int]:
        return {B: self.batch, H: self.heads, J: self.kv_heads, D: self.head_dim, R: self.rotary_dim}

    def bytes(self) -> sympy.Expr:
        item, features = ITEM_BYTES[self.dtype], (H + 2 * J) * D
        tables = 2 * self.rotary_rows * R * ITEM_BYTES[self.rotary_dtype]
        weights = features * int(self.bias) + 2 * D * int(self.head_norm != "none")
        return item * (2 * B * features + weights) + tables + ITEM_BYTES[self.index_dtype]

    def flops(self) -> sympy.Expr:
        norm = 4 * D if self.head_norm != "none" else 0
        return B * ((H + J) * (3 * R + norm) + int(self.bias) * (H + 2 * J) * D)

    def write(self, lines: Lines) -> None:
        self.stages()[0].define(lines)
        with lines.indented():
            lines.add(
                "head = tl.program_id(0)",
                "batch = tl.program_id(1).to(tl.int64)  # a cache may hold more than 2^31 elements",
                "slot = tl.load(slot_ptr).to(tl.int64)",
                f"inside = (slot >= 0) & (slot < {self.slots})",
            )
            with lines.indented(f"if head < {self.heads}:"):
                self._write_head(lines, "q", "q_ptr", code((batch * self.heads + head) * self.head_dim))
            with lines.indented(f"elif inside & (head < {self.heads + self.kv_heads}):"):
                lines.add(f"kv_head = head - {self.heads}")
                self._write_head(lines, "k", "k_cache_ptr", self._slot_address())
            with lines.indented("elif inside:"):
                lines.add(f"kv_head = head - {self.heads + self.kv_heads}")
                self._write_head(lines, "v", "v_cache_ptr", self._slot_address())

    def _slot_address(self) -> str:
        per_batch, per_head, per_slot = self.strides
        return code(batch * per_batch + symbol("kv_head") * per_head + symbol("slot") * per_slot)

    def _write_head(self, lines: Lines, name: str, target: str, base: str) -> None:
        """Loads the parts of a head that rotation tells apart, transforms them, and stores them at target + base."""
        parts = self._parts(name)
        for part in parts:
            source = code((batch * self.all_heads + head) * self.head_dim + part.feature)
            lines.add(f"{part.lane} = tl.arange(0, {next_power_of_two(part.size)})")
            lines.add(f"{part.name} = tl.load(qkv_ptr + {source}{masked(part.live)}).to(tl.float32)")
            if self.bias:
                address = code(head * self.head_dim + part.feature)
                lines.add(f"{part.name} += tl.load(bias_ptr + {address}{masked(part.live)}).to(tl.float32)")
        if self.head_norm != "none" and name != "v":
            self._write_norm(lines, name, parts)
        if self.rotary_dim and name != "v":
            self._write_rotation(lines, name, *parts[:2])
        for part in parts:
            value = f"{part.name}.to({TRITON_TYPES[self.dtype]})"
            address = f"{target} + {base} + {code(part.feature)}"
            lines.add(f"tl.store({address}, {value}{masked(part.live, other=None)})")

    def _parts(self, name: str) -> list[_Part]:
        half, rest = self.rotary_dim // 2, self.head_dim - self.rotary_dim
        if not half or name == "v":
            return [_Part(f"{name}_all", 1, 0, self.head_dim)]
        parts = [_Part(f"{name}_first", 1, 0, half), _Part(f"{name}_second", 1, half, half)]
        if self.interleaved:
            parts = [_Part(f"{name}_first", 2, 0, half), _Part(f"{name}_second", 2, 1, half)]
        return parts + ([_Part(f"{name}_rest", 1, self.rotary_dim, rest)] if rest else [])

    def _write_norm(self, lines: Lines, name: str, parts: list[_Part]) -> None:
        squares = " + ".join(f"tl.sum({part.name} * {part.name}, axis=0)" for part in parts)
        lines.add(f"{name}_rstd = tl.rsqrt(({squares}) / {float(self.head_dim)} + {self.eps!r})")
        one = "1.0 + " if self.head_norm == "rms_plus_one" else ""
        for part in parts:
            weight = f"tl.load({name}_norm_ptr + {code(part.feature)}{masked(part.live)}).to(tl.float32)"
            lines.add(f"{part.name} = {part.name} * {name}_rstd * ({one}{weight})")

    def _write_rotation(self, lines: Lines, name: str, first: _Part, second: _Part) -> None:
        row = batch * self.rotary_dim if self.rotary_rows > 1 else 0
        for part in (first, second):
            for table in ("cos", "sin"):
                address = f"{table}_ptr + {code(row + part.feature)}"
                lines.add(f"{part.name}_{table} = tl.load({address}{masked(part.live)}).to(tl.float32)")
        lines.add(
            f"{name}_turned = {first.name} * {first.name}_cos - {second.name} * {first.name}_sin",
            f"{second.name} = {second.name} * {second.name}_cos + {first.name} * {second.name}_sin",
            f"{first.name} = {name}_turned",
        )


@dataclass(frozen=True)
class _Part:
    """Features start, start + step, ... of a head, `size` of them, as one vector of the generated code."""

    name: str
    step: int
    start: int
    size: int

    @property
    def lane(self) -> sympy.Symbol:
        return symbol(f"{self.name}_lane")

    @property
    def feature(self) -> Expression:
        return self.step * self.lane + self.start

    @property
    def live(self) -> str:
        return "" if self.size == next_power_of_two(self.size) else f"{self.lane} < {self.size}"
