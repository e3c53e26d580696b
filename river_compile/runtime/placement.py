"""Where a model's weights lie; here in device memory, where its owner put them.

Not handled: other places. A part that moves weights puts its own placement into the model's record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from river_compile.config import RiverConfig
from river_compile.lowering.native import Callee
from river_compile.passes.program import DecoderPlan, Program, SegmentSpec
from river_compile.runtime.units import Step


class Steps(NamedTuple):
    """How one graph's segments run."""

    make: Callable[[SegmentSpec, Callee, Sequence[Tensor]], Step] = Step  # of a segment, its callee and packed weights
    on_close: Callable[[], None] | None = None  # called after each pass


class Placement:
    """The place of one model's weights; nothing moves."""

    def check(self, plan: DecoderPlan, config: RiverConfig) -> None:
        """Raise an OptionError, before weights are packed, if they cannot lie where the options say."""

    def arrange(self, program: Program, inputs: Sequence[Any], config: RiverConfig, packed_bytes: int) -> None:
        """Move a decode graph's weights to where the options say; raise an OptionError before any moves."""

    def steps(self, program: Program, inputs: Sequence[Any], config: RiverConfig) -> Steps:
        """Return the steps of a graph, which reach its weights wherever they lie."""
        return Steps()

    def restore(self, weights: Iterable[Tensor]) -> int:
        """Move weights back into device memory; return their bytes."""
        return 0

    def to_dict(self) -> dict[str, object]:
        """Return entries for the report."""
        return {}

    def lines(self) -> Iterator[str]:
        """Yield lines for the report."""
        yield from ()
