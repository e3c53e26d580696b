"""The exit decision in one launch: residual add, two norms and a dot in one pass over the hidden state.

For every row: hidden = residual + update, rounded to the activations' dtype, and similarity = hidden . previous /
(|hidden| |previous|) in float32. The score is the smallest similarity; where the kernel decides itself, the flag says
whether it exceeds the threshold. A row whose similarity is NaN (a zero row, overflow, NaN) makes the score NaN, which
exceeds no threshold.

One program visits all rows, since their minimum needs no atomics then: made for decode, where the rows are the batch.
Not handled: strided rows.
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
    M,
    Stage,
    next_power_of_two,
)

D = symbol("D")
MAX_BLOCK = 4096


@dataclass(frozen=True)
class ExitScoreSpec(KernelSpec):
    """The exit score of `rows` rows of `features` features in `dtype`.

    Attributes:
        rows: M, the batch at decode.
        features: D, the hidden size.
        dtype: of update, residual, previous and hidden.
        decides: whether the rows' similarities and the flag are written too, or the score alone.
        num_warps: warps of the one program.
    """

    family: ClassVar[str] = "exit_score"

    rows: int
    features: int
    dtype: str = "bfloat16"
    decides: bool = True
    num_warps: int = 8

    def __post_init__(self) -> None:
        check_positive(rows=self.rows, features=self.features)
        check_choice("dtype", self.dtype, ACTIVATION_DTYPES)

    @property
    def block(self) -> int:
        return min(next_power_of_two(self.features), MAX_BLOCK)

    @property
    def steps(self) -> int:
        return -(-self.features // self.block)

    def stages(self) -> tuple[Stage, ...]:
        rows = [Argument(name, self.dtype) for name in ("update", "residual", "previous", "hidden")]
        names = ("threshold", "similarity", "score") if self.decides else ("score",)
        flag = (Argument("flag", "bool"),) if self.decides else ()
        arguments = (*rows, *(Argument(name, "float32") for name in names), *flag)
        return (Stage(self.family, arguments, lambda _rows: (1, 1, 1), self.num_warps),)

    def values(self) -> Mapping[sympy.Symbol, int]:
        return {M: self.rows, D: self.features}

    def bytes(self) -> sympy.Expr:
        return 4 * M * D * ITEM_BYTES[self.dtype] + (4 * M + 9 if self.decides else 4)

    def flops(self) -> sympy.Expr:
        return 7 * M * D

    def write(self, lines: Lines) -> None:
        self.stages()[0].define(lines)
        with lines.indented():
            lines.add(
                "lowest = 2.0", "invalid = 0.0  # turns NaN with the first similarity that is; a minimum skips NaN"
            )
            with lines.loop("row", self.rows):
                self._write_row(lines)
            lines.add(
                "score = lowest + invalid",
                "tl.store(score_ptr, score)",
            )
            if self.decides:
                lines.add("tl.store(flag_ptr, score > tl.load(threshold_ptr))")

    def _write_row(self, lines: Lines) -> None:
        row, k, step = (symbol(name) for name in ("row", "k", "step"))
        first_row = row if self.rows > 1 else 0
        first = step * self.block if self.steps > 1 else 0
        live = f"k < {self.features}" if self.features % self.block else ""
        address = code(first_row * self.features + k)
        sums = ("dot", "hidden_square", "previous_square")
        lines.add(*(f"{name} = tl.zeros(({self.block},), tl.float32)" for name in sums))
        with lines.loop("step", self.steps):
            lines.add(f"k = {code(first) + ' + ' if self.steps > 1 else ''}tl.arange(0, {self.block})")
            for name in ("update", "residual", "previous"):
                lines.add(f"{name} = tl.load({name}_ptr + {address}{masked(live)}).to(tl.float32)")
            lines.add(
                f"hidden = (update + residual).to({TRITON_TYPES[self.dtype]})",
                f"tl.store(hidden_ptr + {address}, hidden{masked(live, other=None)})",
                "hidden = hidden.to(tl.float32)",
                "dot += hidden * previous",
                "hidden_square += hidden * hidden",
                "previous_square += previous * previous",
            )
        lines.add(
            "norms = tl.sqrt(tl.sum(hidden_square, axis=0)) * tl.sqrt(tl.sum(previous_square, axis=0))",
            "similarity = tl.sum(dot, axis=0) / norms",
            *([f"tl.store(similarity_ptr + {code(first_row)}, similarity)"] if self.decides else []),
            "lowest = tl.minimum(lowest, similarity)",
            "invalid += similarity * 0.0",
        )
