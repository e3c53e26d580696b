"""Decode steps that decide by themselves: one captured graph for each cache, with the exits in it.

    prologue, blocks up to the first fork, its score against the rule's bar
        where it leaves: the twins of the others and the river's head; where that leaves doubt, the backbone once more
        where it stays: blocks up to the next fork, ... and after the last one the head

A *fork* is a depth at which tokens may part. Its bar lies on the device, so another threshold or a forced depth is a
copy and no capture. An exit check's kernel compares by itself (:mod:`river_compile.capture.verdicts`). A step is one
launch and no wait: nothing runs in vain, and nothing is taken back. How it went is copied to the host, which reads it
when somebody asks, or at the next but one step.

The first step on a cache runs in pieces, as :mod:`river_compile.capture.runner` runs them. Before the capture both
ways are rehearsed, as a capture can load no kernel; the blocks' writes are taken back. What the graph cannot do keeps
running in pieces: rules that only the host can follow, depths that are no fork, and graphs that cannot be captured
whole (the log says why).

Not handled: devices whose captures hold no decisions (`CaptureDevice.why_undecided`).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from river_compile.capture.capture_cache import CaptureCache
from river_compile.capture.device import CaptureDevice
from river_compile.capture.device_exit_state import DeviceExitState
from river_compile.capture.runner import Ahead, CapturedRunner, OwnSlots
from river_compile.capture.units import CaptureUnit, When, copy_into
from river_compile.exits import ALWAYS, NEVER, ExitBars, ExitPolicy
from river_compile.passes.program import RiverProgram, Segment
from river_compile.runtime.runner import Outcome, PlainRunner, Runner, Step
from river_compile.runtime.slots import SCORE, Slots
from river_compile.runtime.walk import Walk

_PLACES = 2  # steps whose outcomes may wait to be read
_RULES = 64  # whose rows are kept on the device


@dataclass(frozen=True, eq=False)
class WholeStep(CaptureUnit):
    """A step as a unit, which runs by a :class:`DeviceWalk`.

    Attributes:
        program: with twins for every fork.
        runner: runs the segments.
        state: what the forks read and write.
        prologue: comes before the first block; None where it runs on its own.
        forks: depths at which tokens may part, ascending.
        last: blocks that a token executes at most.
        doubts: whether the backbone may have to run after the river.
    """

    program: RiverProgram
    runner: PlainRunner
    state: DeviceExitState
    prologue: Step | None
    forks: tuple[int, ...]
    last: int
    doubts: bool

    def run_into(self, slots: list, outputs: Mapping[int, Tensor], when: When) -> None:
        if self.prologue is not None:
            self.prologue(slots)
        DeviceWalk(self, outputs, when).run(slots, self.forks, self.last)

    def rehearse(self, slots: list) -> None:
        """Runs every segment, in vain: as a token that leaves at once and is doubted, and as one that never leaves."""
        num_blocks, rules = self.program.plan.num_blocks, self.state.rules
        saved = self.runner.save(slots, 0)
        for first, answer in ((ALWAYS, NEVER), (NEVER, ALWAYS)):
            self.state.forbid()
            rules[0, 0], rules[num_blocks, 0] = first, answer
            self.run_into(list(slots), {}, _now)
            self.runner.rewind(slots, 0, num_blocks, saved)

    def read(self, outcome: Tensor) -> list[float]:
        """Returns what :meth:`ExitBars.taken` takes, given a copy of the outcome in host memory."""
        return self.state.read(outcome, self.forks, self.last, self.doubts)


class DeviceWalk(Walk):
    """A step that leaves its decisions to `when`, and copies its results into buffers, by slot."""

    def __init__(self, step: WholeStep, outputs: Mapping[int, Tensor], when: When) -> None:
        self.runner, self.num_blocks, self.doubts = step.runner, step.program.plan.num_blocks, step.doubts
        self._blocks, self._state, self._outputs, self._when = step.program.blocks, step.state, outputs, when

    def fork(self, slots: list, done: int, depth: int, rest: tuple[int, ...], last: int) -> None:
        self.runner.blocks(slots, done, depth)
        block, state = self._blocks[depth - 1] if depth else None, self._state
        if block is None or not block.decides:
            state.decide(depth, slots[SCORE] if block is not None and block.has_score else state.given)
        self._when(state.leaves(depth), lambda own: self.run(own, (), depth, depth), slots)
        self._when(state.stays(depth), lambda own: self.run(own, rest, last, depth), slots)

    def doubt(self, slots: list, once_more: Callable[[list], None]) -> None:
        self._state.doubt(slots[SCORE])
        self._when(self._state.stays(self.num_blocks), once_more, slots)

    def hand_over(self, slots: list) -> None:
        copy_into([*self._outputs.values()], [slots[index] for index in self._outputs])


class DeviceExits(CapturedRunner):
    """Launches one graph for a step whose rule a device can follow, and pieces for any other.

    Args:
        policy: of the graph, for its forks. (What a step does, its rule says.)
        verdicts: what the program's checks note their verdicts in, where their kernels do.
    """

    decides = True

    def __init__(
        self,
        program: RiverProgram,
        steps: Mapping[Segment, Step],
        launcher: CaptureCache,
        ahead: Ahead | None,
        policy: ExitPolicy,
        verdicts: DeviceExitState,
        plain: Runner | None = None,
    ) -> None:
        super().__init__(program, steps, launcher, ahead, policy.deepest, plain)
        last = policy.last(program.plan.num_blocks) if policy.fixed_depth is None else policy.fixed_depth
        self.verdicts = verdicts
        self.step = WholeStep(
            **vars(self.units.step(last)),
            program=program,
            runner=PlainRunner(program, steps),
            state=verdicts,
            prologue=steps[program.prologue] if self.units.prologue is None else None,
            forks=policy.forks(program.plan),
            last=last,
            doubts=policy.fixed_depth is None and policy.criterion.reads == "answer",
        )
        self._kept: OrderedDict[tuple[float, ...], Tensor | None] = OrderedDict()
        self._outcomes = _Outcomes(self.device, verdicts.outcome, self.step.read)
        # What the device has: the bars, and whether a score was given.
        self._bars: tuple[float, ...] | None = None
        self._was_given = True
        # Of the step that runs: whether it is the first one on its inputs, its rule and its outcome.
        self._is_first = False
        self._rule: ExitBars | None = None
        self._sent: Outcome | None = None

    def __enter__(self) -> None:
        super().__enter__()
        self._is_first, self._rule, self._sent = False, None, None

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if kind is not None:
            self._bars, self._was_given = None, True
            self._outcomes.forget(self._sent)
        super().__exit__(kind, error, traceback)

    def _buffers(self) -> list[Tensor]:
        return [*super()._buffers(), self.verdicts.given, self.verdicts.outcome]

    def whole(self, slots: OwnSlots, rule: ExitBars) -> Outcome | None:
        rules = self._follows(rule)
        if rules is None:
            return None
        if not self.launcher.capture(self.step, slots, lambda: self._rehearse(slots)):
            self._is_first = True
            return None
        self._tell(rule, rules)
        self.launcher.launch(self.step, slots)
        self._rule, self._sent = rule, self._outcomes.send()
        return self._sent

    def finish(self, slots: OwnSlots) -> tuple:
        if self._is_first:
            self.launcher.note_run(self.step, slots)
        return super().finish(slots)

    def _follows(self, rule: ExitBars) -> Tensor | None:
        """Returns a rule's rows on the device, None if a token may leave at a depth that is no fork.

        To bring new ones there the host waits for what was launched; they are kept for the next time.
        """
        bars = rule.bars
        if bars not in self._kept:
            step, leaving = self.step, [depth for depth, bar in enumerate(bars[:-1]) if bar != NEVER]
            here, rules = {*step.forks, step.last}.issuperset(leaving), self.verdicts.rules
            rows = [[bar, 0.0] for bar in bars]
            self._kept[bars] = torch.tensor(rows, dtype=rules.dtype, device=rules.device) if here else None
            if len(self._kept) > _RULES:
                self._kept.popitem(last=False)
        return self._kept[bars]

    def _tell(self, rule: ExitBars, rules: Tensor) -> None:
        """Copies a rule to the device for the next launch."""
        verdicts, given = self.verdicts, rule.given
        if rule.bars != self._bars:
            self.device.run(lambda: verdicts.rules.copy_(rules))
            self._bars = rule.bars
        if given is not None:
            self.device.run(lambda: torch.neg(given, out=verdicts.given))
        elif self._was_given:
            self.device.run(lambda: verdicts.given.fill_(math.nan))
        self._was_given = given is not None

    def _rehearse(self, slots: Slots) -> None:
        if self.step.forks and self.device.needs_a_run:
            own, self._bars = list(slots), None
            self.device.run(lambda: self.step.rehearse(own))


class _Outcomes:
    """Brings outcomes to places in host memory, in turn; each is read before another step's takes its place."""

    def __init__(self, device: CaptureDevice, outcome: Tensor, read: Callable[[Tensor], list[float]]) -> None:
        self._device, self._outcome, self._read = device, outcome.view(-1), read
        self._places: deque[tuple[Tensor, _Reading | None]] = deque()
        self._places += [(device.flags(outcome.numel()), None) for _ in range(_PLACES)]

    def send(self) -> Outcome:
        """Copies the outcome of the last launch; returns a function that waits for the copy and reads it."""
        place, before = self._places.popleft()
        if before is not None:
            before()
        self._device.run(lambda: place.copy_(self._outcome, non_blocking=True))
        reading = _Reading(self._device, place, self._read)
        self._places.append((place, reading))
        return reading

    def forget(self, failed: Outcome | None) -> None:
        """Gives up the outcome of a step that failed after it was sent."""
        self._places = deque((place, None if reading is failed else reading) for place, reading in self._places)


class _Reading:
    """Reads a place once the device has written to it, and remembers the value."""

    def __init__(self, device: CaptureDevice, place: Tensor, read: Callable[[Tensor], list[float]]) -> None:
        self._device, self._place, self._mark, self._read = device, place, device.mark(), read
        self._values: list[float] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> list[float]:
        with self._lock:
            if self._values is None:
                self._device.wait(self._mark)
                self._values = self._read(self._place)
                self._place.fill_(math.nan)  # (nobody takes it for a later step's)
            return self._values


def _now(holds: Tensor, work: Callable[[list], object], slots: list) -> None:
    """Runs work where a boolean holds, for which this waits."""
    if holds.item():
        work(slots)
