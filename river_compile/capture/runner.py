"""Runs a decode graph as captured units: launches instead of calls, one launch for many kernels.

Steps of one runner run one after the other: a second thread waits for the first one's step to be launched, and what the
caller gets are copies, so nobody's result is overwritten by the next step.

A device that runs late is idle while the host reads an exit check. :class:`LaunchAhead` starts the next span before the
check's result is known, if that pays.

Not handled (the log says so, and it runs uncaptured): dynamic caches, prompts, passes of more rows than the device
captures, operations that read sizes from the device.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from river_compile.capture.capture_cache import CaptureCache
from river_compile.capture.cpu_tape import Tapes
from river_compile.capture.cuda import CudaGraphs
from river_compile.capture.device import CaptureDevice, CaptureLog, stand_in
from river_compile.capture.units import CaptureUnit, Partition, copy_into
from river_compile.config import RiverConfig
from river_compile.distributed.ranks import ALONE, Ranks
from river_compile.distributed.support import NOT_CAPTURED
from river_compile.errors import OptionError
from river_compile.lowering.choose import choose_lowering
from river_compile.passes.capture_safety import fixed_inputs, runs_once
from river_compile.passes.nodes import is_tensor, mutated_inputs, source_of, value_of
from river_compile.passes.program import DecoderPlan, RiverProgram, Segment
from river_compile.runtime.runner import ReplayedStep, Runner, Step
from river_compile.runtime.slots import SCORE, Saved, gather, new_slots, size_of_pass


class CapturedRunner(Runner):
    """Launches the units of a decode graph on a static cache.

    Args:
        plain: runs the passes of a graph of several tokens that the device does not take.
        ahead: says when the next span is launched before the flag is known; may be replaced between two steps.
        deepest: blocks that a token executes at most, None for all.

    Attributes:
        flags: ``[L + 1]`` float32 values in host memory, where the scores of checks and heads arrive.
    """

    def __init__(
        self,
        program: RiverProgram,
        steps: Mapping[Segment, Step],
        launcher: CaptureCache,
        ahead: LaunchAhead,
        deepest: int | None = None,
        plain: Runner | None = None,
    ) -> None:
        super().__init__(program, steps)
        self._plain, self._size_of = plain, size_of_pass(program)
        plan, slots = program.plan, program.slots
        self.launcher, self.device, self.ahead = launcher, launcher.device, ahead
        self.flags = self.device.flags(plan.num_blocks + 1)
        self.units = Partition(program, steps, self.flags, self.device.obstacle, deepest)
        fixed = fixed_inputs(plan)
        self._copied = [i for node, i in slots.items() if node.op == "placeholder" and node not in fixed]
        self._returned = [slots[node] for node in program.returned]
        self._lock = threading.Lock()
        # Of the step that runs: the check that was read last, and the unit after it that was launched ahead.
        self._checked: int | None = None
        self._launched_ahead: CaptureUnit | None = None
        launcher.log.device = self.device.name
        self._note_order(plan)

    def for_pass(self, args: Sequence) -> Runner:
        plan = self._program.plan
        if plan.is_decode or self._plain is None:
            return self
        dtype = value_of(plan.blocks[0].hidden_in).dtype
        takes = self._size_of is not None and self.device.takes_pass(dtype, *self._size_of(args))
        return self if takes else self._plain

    def __enter__(self) -> None:
        self._lock.acquire()
        self._checked = self._launched_ahead = None
        self.launcher.prepare()

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self.device.end()
            else:
                self.device.abandon()
        finally:
            self._lock.release()

    def begin(self, args: Sequence) -> list:
        self.device.begin(self._buffers, self.flags)
        slots = new_slots(self._program, args)
        given = {index: args[index] for index in self._copied if isinstance(args[index], Tensor)}
        for index, buffer in self.launcher.copies(given).items():
            slots[index] = buffer
        if self.units.prologue is not None:
            self.launcher.launch(self.units.prologue, slots)
        return slots

    def replay(self, args: Sequence, depth: int) -> ReplayedStep | None:
        with self._lock:  # (others' steps use the same buffers)
            return self._replay(args, depth)

    def _replay(self, args: Sequence, depth: int) -> ReplayedStep | None:
        slots = new_slots(self._program, args)
        copied = [i for i in self._copied if isinstance(args[i], Tensor)]
        buffers = {i: self.launcher.buffer(i, args[i]) for i in copied}
        for index, buffer in buffers.items():
            slots[index] = buffer
        numbers = {i for i, arg in enumerate(args) if isinstance(arg, int)}
        units = [] if self.units.prologue is None else [self.units.prologue]
        units += self.units.spans(0, depth)
        units += self.units.tail(depth) if depth < self._program.plan.num_blocks else []
        launches: list[Callable[[], object]] = []
        changing = set(numbers)
        for unit in units:
            launch = self.launcher.replay(unit, slots, changing)
            if launch is None:
                return None
            launches.append(launch)

        targets, take = [*buffers.values()], gather(copied)

        def begin(args: Sequence) -> None:
            self.device.begin(self._buffers, self.flags)
            self.device.run(functools.partial(copy_into, targets, take(args)))
            for index in numbers:
                slots[index] = args[index]

        # (Copies: another thread's step on the same captures would overwrite them.)
        return ReplayedStep(self, begin, launches, lambda: self.launcher.fresh(map(slots.__getitem__, self._returned)))

    def _buffers(self) -> list[Tensor]:
        """Returns the slots that a step leaves behind and the next one must not read."""
        return [buffer for _, buffer in self.launcher.buffers()]

    def blocks(self, slots: list, start: int, end: int) -> None:
        self._note_verdict(left=False)
        for unit in self.units.spans(start, end):
            self._launch_once(unit, slots)

    def score(self, slots: list, start: int, end: int) -> float:
        self._note_verdict(left=False)
        *before, unit = self.units.spans(start, end)
        for other in before:
            self._launch_once(other, slots)
        started: tuple[float, object] | None = None  # by the clocks of host and device, where a replay starts now
        if unit is self._launched_ahead:
            self._launched_ahead = None
        else:
            now = (time.perf_counter(), self.device.mark())
            started = now if self.launcher.launch(unit, slots) else None
        sent = self.device.mark()
        if self.device.runs_late:  # while it works, the host finds out what either verdict launches
            self.launcher.prepare(self.units.next_units(end), slots)
        self._launch_ahead(end, slots)
        self.device.wait(sent)
        if started is not None and self._launched_ahead is None:  # a wait that nothing hid
            seconds = self.device.seconds_between(started[1], sent)
            if seconds is not None:
                self.ahead.timed(end, seconds, time.perf_counter() - started[0])
        self._checked = end
        return self.flags[end].item()

    def tail(self, slots: list, depth: int) -> None:
        self._note_verdict(left=True)
        ahead, self._launched_ahead = self._launched_ahead, None
        if ahead is not None:  # it ran for this token too, and so will its twins
            self.rewind(slots, ahead.start, ahead.end)
        for unit in self.units.tail(depth):
            self.launcher.launch(unit, slots)

    def read_head(self, slots: list) -> float:
        self.device.wait(self.device.mark())
        return self.flags[-1].item()

    def head_score(self, slots: list) -> Tensor:
        return self.launcher.fresh([slots[SCORE]])[0]

    def save(self, slots: list, depth: int) -> Saved:
        self.device.settle()
        return super().save(slots, depth)

    def rewind(self, slots: list, start: int, end: int, saved: Saved = ()) -> None:
        rewind = super().rewind
        self.device.run(lambda: rewind(slots, start, end, saved))

    def finish(self, slots: list) -> tuple:
        return self.launcher.fresh(slots[i] for i in self._returned)

    def _note_verdict(self, left: bool) -> None:
        """Notes the executor's decision at the check that was read last."""
        if self._checked is not None:
            self.ahead.saw(self._checked, left)
            self._checked = None

    def _launch_once(self, unit: CaptureUnit, slots: list) -> None:
        """Launches a unit that was not launched ahead."""
        if self._launched_ahead is None:
            self.launcher.launch(unit, slots)
        assert self._launched_ahead in (None, unit)
        self._launched_ahead = None

    def _launch_ahead(self, depth: int, slots: list) -> None:
        """Launches the unit after a check before the check's result is known, if that pays."""
        unit = self.units.after(depth)
        if (
            unit.name not in self.launcher.log.never_launched_ahead
            and self.ahead.pays(depth, unit.end)
            and self.launcher.is_captured(unit, slots)
        ):
            self.launcher.launch(unit, slots)
            self._launched_ahead = unit

    def _note_order(self, plan: DecoderPlan) -> None:
        """Writes down which spans cannot be launched ahead, and why."""
        for start, end in zip(self.units.ends, self.units.ends[1:], strict=False):
            reason = next(filter(None, (runs_once(plan, block) for block in plan.blocks[start:end])), None)
            if reason is not None:
                self.launcher.log.never_launched_ahead[self.units.after(start).name] = str(reason)


def captures_expected(config: RiverConfig, device: torch.device, ranks: Ranks = ALONE) -> bool:
    """Whether steps on a static cache will be captured, as far as is known before a graph is traced.

    Kernels that are not there yet compile from now on, while the graph is traced.
    """
    if ranks.several or config.cudagraphs is False:
        return False
    if device.type == "cuda" or stand_in(config.cudagraphs, device) is not None:
        return True
    try:
        return choose_lowering(config, device, wait=False).native
    except OptionError:  # (whoever lowers a graph raises it)
        return False


def choose_device(
    program: RiverProgram, config: RiverConfig, captures: CaptureLog, native: bool = False, ranks: Ranks = ALONE
) -> CaptureDevice | None:
    """Returns the device that captures a program's decode steps; None if none does, and `captures` says why.

    No pass needs to have run. `native` says whether twins become C++ calls, which a CPU captures; `ranks` are those
    that share the model.

    Raises:
        OptionError: captures are asked for, and the model does not lie on a device that has them.
    """
    device = program.plan.device
    plugged_in = stand_in(config.cudagraphs, device)
    if config.cudagraphs is True and device.type != "cuda" and not native and plugged_in is None:
        raise OptionError(
            f"cudagraphs=True needs a model on a GPU or lowering='native', and this one lies on {device}; move it "
            "there, or leave cudagraphs out"
        )
    if ranks.several:
        captures.not_captured = NOT_CAPTURED
    elif config.cudagraphs is False:
        captures.not_captured = "cudagraphs=False"
    elif config.cudagraphs is None and device.type != "cuda" and not native:
        captures.not_captured = f"the model lies on {device}; CUDA graphs need a GPU, tapes lowering='native'"
    else:
        captures.not_captured = _unsupported(program, native and plugged_in is None)
    if captures.not_captured:
        return None
    return plugged_in or (CudaGraphs(device) if device.type == "cuda" else Tapes())


def _unsupported(program: RiverProgram, several: bool) -> str | None:
    """Returns why no unit of a graph can be captured, with the node if there is one; None if some can.

    `several` says whether the device captures passes of several tokens.
    """
    plan = program.plan
    if not plan.is_decode and not several:
        return "a prompt's length differs from call to call; decode steps are captured"
    for block in plan.blocks:
        if block.kv.kind != "static":
            where = source_of(block.kv.writes[0])
            return f'the cache grows with every token; cache_implementation="static" keeps it in place (at {where})'
    for block in plan.blocks:
        made = next((c for w in block.kv.writes for c in mutated_inputs(w) if c.op != "placeholder"), None)
        if made is not None:
            return f"the cache is made in this pass (at {source_of(made)})"
    for node in (n for segment in program.segments for n in segment.outputs):
        if not isinstance(value_of(node), (Tensor, int, torch.SymInt)):
            return f"a value that is neither tensor nor number goes from block to block (at {source_of(node)})"
    written = {node for block in plan.blocks for node in block.kv.writes}
    for node in program.returned:
        if node in written or (node.op == "placeholder" and is_tensor(node)):
            return f"the graph returns a tensor of the caller's, which must not become a copy (at {source_of(node)})"
    return None


_MEMORY = 0.95  # weight that an older observation keeps at each new one: about 20 tokens count


@dataclass
class LaunchAhead:
    """Learns from every check and answers for the next."""

    always: bool | None = None  # True or False to answer the same every time, None to decide by measurement
    # by depth, the share of recent tokens that left there
    left: dict[int, float] = field(default_factory=lambda: defaultdict(lambda: 0.5))
    _round_trip: float | None = None
    _span: dict[int, float] = field(default_factory=dict)

    def pays(self, depth: int, next_depth: int) -> bool:
        """Says whether to launch the span that ends at `next_depth` before the check after `depth` is read.

        False until both times are known: a wait that is not hidden is what measures them.
        """
        if self.always is not None:
            return self.always
        if self._round_trip is None or next_depth not in self._span:
            return False
        left = self.left[depth]
        return (1 - left) * self._round_trip > left * self._span[next_depth]

    def saw(self, depth: int, left: bool) -> None:
        """Notes whether a token left at a depth."""
        self.left[depth] = _mix(self.left[depth], left)

    def timed(self, depth: int, span: float, waited: float) -> None:
        """Notes the device's seconds for the span that ends at `depth`, and the host's from its launch to the flag."""
        self._span[depth] = _mix(self._span.get(depth), span)
        self._round_trip = _mix(self._round_trip, max(waited - span, 0.0))


def _mix(old: float | None, new: float) -> float:
    return new if old is None else _MEMORY * old + (1 - _MEMORY) * new
