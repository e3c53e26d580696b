"""Runs a decode graph as captured units: launches instead of calls, one launch for many kernels.

Steps of one runner run one after the other: a second thread waits for the first one's step to be launched, and what the
caller gets are copies, so nobody's result is overwritten by the next step.

Whether a token stays at a check is the host's answer: it waits for the score before it launches what follows.

Not handled (the log says so, and it runs uncaptured): dynamic caches, prompts, passes of more rows than the device
captures, operations that read sizes from the device.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

from torch import Tensor

from river_compile.capture.capture_cache import CaptureCache
from river_compile.capture.units import Partition, copy_into
from river_compile.passes.capture_safety import fixed_inputs
from river_compile.passes.nodes import value_of
from river_compile.passes.program import RiverProgram, Segment
from river_compile.runtime.runner import Runner, Step
from river_compile.runtime.slots import SCORE, Slots, size_of_pass

# Slots, as `begin` returned them. (The interface of runners takes any list.)
OwnSlots: TypeAlias = Any


class CapturedRunner(Runner):
    """Launches the units of a decode graph on a static cache.

    Args:
        program: the rewritten graph.
        steps: the compiled step of each segment that can be reached.
        launcher: has the captures.
        plain: runs the passes of a graph of several tokens that the device does not take.

    Attributes:
        flags: ``[L]`` float32 values in host memory, where the scores of checks arrive.
    """

    binds = True

    def __init__(
        self,
        program: RiverProgram,
        steps: Mapping[Segment, Step],
        launcher: CaptureCache,
        plain: Runner | None = None,
    ) -> None:
        super().__init__(program, steps)
        self._plain, self._size_of = plain, size_of_pass(program)
        plan, slots = program.plan, program.slots
        self.launcher, self.device = launcher, launcher.device
        self.flags = self.device.flags(plan.num_blocks)
        self.units = Partition(program, steps, self.flags, self.device.obstacle)
        fixed = fixed_inputs(plan)
        self._copied = [i for node, i in slots.items() if node.op == "placeholder" and node not in fixed]
        self._returned = [slots[node] for node in program.returned]
        self._lock = threading.Lock()
        launcher.log.device = self.device.name

    def for_pass(self, args: Sequence) -> Runner:
        plan = self._program.plan
        if plan.is_decode or self._plain is None:
            return self
        dtype = value_of(plan.blocks[0].hidden_in).dtype
        takes = self._size_of is not None and self.device.takes_pass(dtype, *self._size_of(args))
        return self if takes else self._plain

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self.device.end()
            else:
                self.device.abandon()
        finally:
            self._lock.release()

    def begin(self, args: Sequence, slots: Slots | None = None) -> Slots:
        self.device.begin(self._buffers, self.flags)
        if slots is None:
            slots = self.launcher.bind(args, self._copied)
        bound = slots.bound
        for index in bound.numbers:
            slots[index] = args[index]
        self.device.run(functools.partial(copy_into, bound.targets, bound.take(args)))
        if self.units.prologue is not None:
            self.launcher.launch(self.units.prologue, slots)
        return slots

    def _buffers(self) -> list[Tensor]:
        """Returns the slots that a step leaves behind and the next one must not read."""
        return [buffer for _, buffer in self.launcher.buffers()]

    def blocks(self, slots: OwnSlots, start: int, end: int) -> None:
        for unit in self.units.spans(start, end):
            self.launcher.launch(unit, slots)

    def through(self, slots: OwnSlots, depth: int) -> None:
        for unit in self.units.way(depth):
            self.launcher.launch(unit, slots)

    def read_score(self, slots: OwnSlots, depth: int) -> float:
        self.device.wait()
        return self.flags[depth - 1].item()

    def tail(self, slots: OwnSlots, depth: int) -> None:
        for unit in self.units.tail(depth):
            self.launcher.launch(unit, slots)

    def head_score(self, slots: OwnSlots) -> Tensor:
        return self.launcher.fresh([slots[SCORE]])[0]

    def finish(self, slots: OwnSlots) -> tuple:
        return self.launcher.fresh(slots[i] for i in self._returned)
