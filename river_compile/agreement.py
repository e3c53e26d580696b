"""How the processes that run one model come to the same values; here for a process that runs its model alone.

Processes that exchange tensors within a step must take the same path, so the first one's values decide.
Not handled: how they exchange values. A part that can puts its own agreement into the model's record.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")
PARTS = "rank-*-of-*"  # folders of saved twins, in the folder of a model that several processes share


class Agreement:
    """The same value in every process: a single process has it already."""

    several = False  # whether other processes run the same model
    not_captured = ""  # why steps are not captured; empty if they may be

    @property
    def name(self) -> str:
        """The name of this process among them."""
        return ""

    def first(self, value: Tensor) -> Tensor:
        """Return the first process's tensor, whose shape and dtype all processes have."""
        return value

    def every(self, condition: bool) -> bool:
        """Whether a condition holds in all processes."""
        return condition

    def gather(self, value: T) -> list[T]:
        """Return each process's value, which must be picklable."""
        return [value]

    def part_of(self, folder: Path) -> Path:
        """Return the folder of this process's part of saved twins."""
        return folder

    def explain(self, error: BaseException) -> None:
        """Raise a RankError in the place of an error that another process's end has caused."""


ALONE = Agreement()
