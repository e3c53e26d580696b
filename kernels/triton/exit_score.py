"""The exit score in one launch: residual add, two norms and a dot in one pass over the hidden state.

For every row: hidden = residual + update, rounded to the activations' dtype, and similarity = hidden . previous /
(|hidden| |previous|) in float32. The score is the smallest similarity. A row whose similarity is NaN (a zero row,
overflow, NaN) makes the score NaN, which exceeds no threshold.

One program visits all rows, the batch at decode, so their minimum needs no atomics. Not handled: strided rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from river_compile.kernels.checks import check_choice, check_positive
from river_compile.kernels.triton.spec import ACTIVATION_DTYPES, Buffer, KernelSpec, Stage


@dataclass(frozen=True)
class ExitScoreSpec(KernelSpec):
    """One shape of the exit score."""

    family: ClassVar[str] = "exit_score"

    rows: int  # the batch at decode
    features: int  # the hidden size
    dtype: str = "bfloat16"  # of update, residual, previous and hidden
    num_warps: int = 8

    def __post_init__(self) -> None:
        check_positive(rows=self.rows, features=self.features)
        check_choice("dtype", self.dtype, ACTIVATION_DTYPES)

    def buffers(self, rows: int | None = None) -> dict[str, Buffer]:
        states = Buffer(self.dtype, (self.rows, self.features))
        score = Buffer("float32", (1,))
        return {"update": states, "residual": states, "previous": states, "hidden": states, "score": score}

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.family, tuple(self.buffers()), lambda _rows: (1, 1, 1), self.num_warps),)

    def flops(self, rows: int | None = None) -> int:
        return 7 * self.rows * self.features
