"""The processes that run one model: how they come to the same values, and which part each computes.

Here for a process that runs its model alone. Processes that exchange tensors within a step must take the same path, so
the first one's values decide. Not handled: how they exchange values, which a subclass in the model's record knows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, fx

if TYPE_CHECKING:
    from river_compile.config import RiverConfig
    from river_compile.passes.program import Program

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

    def fitted(self, config: RiverConfig, given: Collection[str]) -> RiverConfig:
        """Return a config for this process; `given`: the options that the user set. May raise an OptionError."""
        return config

    def take_shards(self, traced: fx.GraphModule, values: dict[fx.Node, Any], mode: str | None) -> frozenset[fx.Node]:
        """Rewrite a traced graph, and its inputs' values, for this process's part; return the inputs that are parts.

        May raise an OptionError for a graph, or a ``mode`` of torch.compile, that does not work in several processes.
        """
        return frozenset()

    def wrap(
        self,
        executor: Callable[..., Any],
        program: Program,
        placeholders: Sequence[fx.Node],
        local: frozenset[fx.Node],
    ) -> Callable[..., Any]:
        """Return an executor as Dynamo calls it, which passes whole tensors for the placeholders in `local`."""
        return executor

    def explain(self, error: BaseException) -> None:
        """Raise a RankError in the place of an error that another process's end has caused."""


ALONE = Agreement()
