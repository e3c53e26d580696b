"""Captures on a CPU: a unit of C++ calls is recorded on a tape, and replayed by one call.

What a replay saves is everything between two kernels: Python, torch's dispatch, and waking the threads, which meet at
barriers instead. It returns when its work is done.

Not handled: units in which Inductor's code runs, which stay uncaptured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from river_compile.capture.device import CaptureDevice, CaptureFailed
from river_compile.capture.units import CaptureUnit
from river_compile.kernels.native.load import few_rows
from river_compile.kernels.native.tape import Tape
from river_compile.lowering.native import CannotRecord, NativeSegment
from river_compile.passes.program import Refusal
from river_compile.runtime.runner import Step
from river_compile.runtime.slots import SCORE


class Tapes(CaptureDevice):
    """The device that records calls of the C++ operators."""

    name = "tapes of C++ calls"
    needs_a_run = False

    def obstacle(self, step: Step) -> Refusal | None:
        if isinstance(step.callee, NativeSegment):
            return None
        return Refusal("it is not made of C++ kernels alone", step.segment.name)

    def takes_pass(self, dtype: torch.dtype, sequences: int, positions: int) -> bool:
        return sequences * positions <= few_rows(dtype, positions)

    def flags(self, count: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.full((count,), float("nan"))

    def begin(self, buffers: Callable[[], Iterable[Tensor]], flags: Tensor) -> None:
        """Does nothing: replays have run when they return."""

    def run(self, work: Callable[[], object]) -> None:
        work()

    def settle(self) -> None:
        """Does nothing: replays have run when they return."""

    def capture(
        self, unit: CaptureUnit, slots: list, outputs: dict[int, Tensor], buffer: Callable[[int, Tensor], Tensor]
    ) -> tuple[Tape, int]:
        tape, own = Tape(), list(slots)
        try:
            with tape.recording():
                for step in unit.steps:
                    assert isinstance(step.callee, NativeSegment), "units with other code have an obstacle"
                    step.run_as(functools.partial(step.callee.record, tape=tape), own)
                if unit.flag is not None:
                    torch.ops.river_native.copy(own[SCORE], unit.flag)
                for index in unit.writes:
                    outputs[index] = outputs.get(index, buffer(index, own[index]))
                    torch.ops.river_native.copy(own[index], outputs[index])
        except (CannotRecord, RuntimeError) as error:
            raise CaptureFailed(str(error).partition("\n")[0]) from error
        return tape, tape.bytes

    def launch(self, graph: Tape, slots: list) -> None:
        graph.replay()

    def replayer(self, graph: Tape, slots: list) -> Callable[[], object]:
        return graph.replay

    def wait(self) -> None:
        """Does nothing: replays have run when they return."""

    def end(self) -> None:
        """Does nothing: replays have run when they return."""
