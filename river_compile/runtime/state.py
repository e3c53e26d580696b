"""Everything of one program that is bound to one KV cache: input buffers, values between units, and their captures.

A state lives as long as its cache. Its inputs are its own buffers, which whoever made it writes in place; its outputs
are buffers that hold until the next run.

Not handled: two steps at a time on one state; inputs of other sizes than those it was made with.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from river_compile.exits import ExitPolicy, Memories, Memory, bars_of
from river_compile.passes.program import Program
from river_compile.runtime.captures import (
    CaptureDevice,
    CaptureFailed,
    CaptureLog,
    CaptureRecord,
    buffer_like,
    copy_into,
)
from river_compile.runtime.stats import ExitStats, Observers, StepRecord
from river_compile.runtime.tensor_parallel import ALONE, Ranks
from river_compile.runtime.units import SCORE, WANTED, Unit, Units

log = logging.getLogger("river_compile.runtime.captures")
_steps: Observers[[StepState, StepRecord]] = Observers()


class Taken(NamedTuple):
    """The way that a step took: blocks executed, scores that were read after blocks, and the entropy that decided."""

    depth: int
    scores: tuple[float, ...] = ()
    entropy: float | None = None


class Weights(Protocol):
    """Packed weights of a program."""

    def stand_for(self, inputs: Sequence[Any]) -> bool:
        """Whether they are made from the parameters among a program's inputs."""
        ...


@dataclass(eq=False)
class CompiledProgram:
    """What all states of one program share. `policy` may be replaced between two steps.

    Attributes:
        plain: units that run as plain calls.
        units: cut for what captures them, None where nothing does.
        policy: when tokens leave.
        stats: counts the model's steps.
        memories: what is known of KV caches, shared by the model's programs.
        remembers: whether exits read the entropy of the previous logits.
        all_logits: the list of all blocks of the vocabulary, as `wanted` of `river::linear` has it; None where the
            river's head takes none.
        log: of captures.
        weights: its packed ones; None where it has none.
        on_close: called after each step; None: nothing is.
        ranks: that share the model; of each score the first one's counts.
    """

    program: Program
    plain: Units
    units: Units | None
    policy: ExitPolicy
    stats: ExitStats
    memories: Memories
    remembers: bool
    all_logits: Tensor | None
    log: CaptureLog
    weights: Weights | None
    on_close: Callable[[], None] | None
    ranks: Ranks = ALONE

    def agreed(self, score: Tensor) -> Tensor:
        """Returns the first rank's score."""
        return self.ranks.first(score)


class StepState:
    """One program on one KV cache.

    Args:
        compiled: the program.
        args: the program's inputs. Tensors among them are read in place.
        device: captures units; None: they run as plain calls.
        last_token: nobody reads other logits than the last token's, and there may be no others. For plain calls.
        executor: that bound it.

    Attributes:
        slots: the inputs, what units exchange, the list of wanted logits and the latest score.
        buffers: of the values that units exchange, by slot.
        cache: the tensor of keys that the KV cache is known by; None where the pass makes the cache.
        memory: what is known of the cache.
        flags: ``[L + 1]`` float32 values in host memory, where the scores of checks and of the head (at L) arrive.
    """

    def __init__(
        self,
        compiled: CompiledProgram,
        args: Sequence[Any],
        device: CaptureDevice | None,
        last_token: bool = False,
        executor: Any = None,
    ) -> None:
        program = compiled.program
        self.compiled, self.device, self.executor = compiled, device, executor
        self._units = compiled.plain if device is None or compiled.units is None else compiled.units
        self._late = device is not None and device.runs_late
        self._narrowed = program.last_token if last_token else None
        self.slots: list[Any] = [*args, *[None] * (len(program.examples) - len(args) + 2)]
        self.slots[WANTED] = compiled.all_logits
        self._wanted: Tensor | None = None
        self.buffers: dict[int, Tensor] = {}
        self._replays: dict[Unit, Callable[[], object]] = {}
        self._warm: set[Unit] = set()
        self._ways: dict[int, tuple[Unit, ...]] = {}
        before, _ = program.keys
        self.cache: Tensor | None = None if before is None else self.slots[before]
        self.memory = Memory() if self.cache is None else compiled.memories.of(self.cache)
        self.flags = torch.empty(0) if device is None else device.flags(program.num_blocks + 1)

    @property
    def args(self) -> Sequence[Any]:
        """The program's inputs."""
        return self.slots[: len(self.compiled.program.inputs)]

    @property
    def inputs(self) -> dict[Any, Tensor]:
        """The inputs that are arguments of the model's forward, by their names, which whoever bound them may write."""
        given = enumerate(self.compiled.program.inputs)
        return {known.source.name: self.slots[i] for i, known in given if known.source and known.source.kind == "call"}

    @property
    def logits(self) -> Tensor:
        """The logits of the latest run, which the next one overwrites."""
        program = self.compiled.program
        assert program.logits is not None, "whoever asks has located them"
        logits: Tensor = self.slots[program.returned[program.logits]]
        return logits

    def outputs(self) -> tuple[Any, ...]:
        """Returns what the graph returns, which the next run overwrites."""
        return tuple(self.slots[slot] for slot in self.compiled.program.returned)

    def copied_outputs(self) -> tuple[Any, ...]:
        """Returns what the graph returns, which nobody overwrites."""
        outputs = self.outputs()
        if self.device is None:
            return outputs
        fresh = tuple(torch.empty_like(value) if isinstance(value, Tensor) else value for value in outputs)
        copy_into(zip(fresh, outputs, strict=True))
        return fresh

    def load(self, args: Sequence[Any], numbers: Sequence[int]) -> None:
        """Copies inputs of these numbers into the state's."""
        if self._late and self.device is not None:
            self.device.begin(())
        copy_into((self.slots[i], args[i]) for i in numbers)

    def only_logits(self, blocks: Tensor | None) -> None:
        """Has the river's head compute the logits of these blocks of the vocabulary alone, of all for None.

        The others are `river_compile.kernels.ops.UNWANTED`. Heads without a list compute all.
        """
        everything = self.compiled.all_logits
        if everything is None or blocks is self._wanted:
            return
        if self.slots[WANTED] is everything:
            self.slots[WANTED] = buffer_like(everything)
        wanted, self._wanted = self.slots[WANTED], blocks
        if blocks is None:
            wanted.copy_(everything)
        else:
            wanted[0] = len(blocks)
            wanted[1 : 1 + len(blocks)] = blocks

    def step(self, depth: int | None = None) -> None:
        """Runs a pass and counts it.

        Args:
            depth: blocks that a decode step executes, `WHOLE` for all; None leaves it to the thread and the policy.

        Raises:
            ValueError: the program lacks the segments for that depth.
        """
        compiled, started = self.compiled, time.perf_counter()
        decodes, policy = compiled.program.is_decode, compiled.policy
        if decodes:
            policy = policy.in_this_thread() if depth is None else policy.at(depth)
        try:
            taken = self.run(policy)
        except BaseException as error:
            compiled.ranks.raise_if_lost(error)
            raise
        compiled.stats.count(taken.depth, decodes)
        if _steps:
            seconds, thread, model = time.perf_counter() - started, threading.get_ident(), compiled.stats.model_id
            _steps(self, StepRecord(taken.depth, taken.scores, decodes, thread, model, taken.entropy, seconds))
        if compiled.on_close is not None:
            compiled.on_close()

    def run(self, policy: ExitPolicy) -> Taken:
        """Runs a pass, whose token leaves as the policy says."""
        program, memory = self.compiled.program, self.memory if self.compiled.remembers else None
        bars = bars_of(policy, program.candidates, program.num_blocks)
        if not bars.stops and memory is None:
            way = self._ways.get(bars.last) or self._ways.setdefault(bars.last, self._units.way(bars.last))
            if self._late:
                self._begin()
            self._launch(way)
            if self._late:
                self._end()
            return Taken(bars.last)
        last, done, entropy = bars.last, 0, None
        scores: list[float] = []
        if memory is not None and bars.early is not None:
            depth, least = bars.early
            entropy = None if memory.entropy is None else memory.entropy.item()
            if entropy is not None and -entropy > least:
                last = depth
        self._begin()
        for depth, bar in bars.stops:
            self._launch(self._units.span(done, depth))
            done = depth
            if bar is None:
                continue
            scores.append(self._score(depth))
            if scores[-1] > bar:
                last = depth
                break
        else:
            self._launch(self._units.span(done, last))
        self._launch(self._units.tail(last))
        if memory is not None:
            memory.entropy = self._kept_score()
        self._end()
        return Taken(last, tuple(scores), entropy)

    def _begin(self) -> None:
        if self.device is not None:
            self.device.begin((*self.buffers.values(), self.flags))

    def _end(self) -> None:
        if self.device is not None:
            self.device.end()

    def _launch(self, units: Sequence[Unit]) -> None:
        """Replays units, captures those first that have no capture and may have one, and runs the others."""
        for unit in units:
            replay = self._replays.get(unit) or self._captured_or_run(unit)
            if replay is not None:
                replay()

    def _captured_or_run(self, unit: Unit) -> Callable[[], object] | None:
        """Returns what replays a unit; None where it cannot be captured now, and has run."""
        device = self.device
        with torch._C._DisableAutocast():  # (compiled code has its casts)
            if device is None:
                self._run_plainly(unit)
                return None
            replay = self._capture(unit, device) if self._may_capture(unit, device) else None
            if replay is None:
                self._run_into_buffers(unit, device)
            return replay

    def _may_capture(self, unit: Unit, device: CaptureDevice) -> bool:
        reasons = self.compiled.log.uncaptured_units
        if unit.obstacle is not None:
            reasons.setdefault(unit.name, str(unit.obstacle))
        if unit.name in reasons:
            return False
        return unit in self._warm or not device.needs_a_run

    def _capture(self, unit: Unit, device: CaptureDevice) -> Callable[[], object] | None:
        compiled, start = self.compiled, time.perf_counter()
        try:
            replay, size = device.capture(unit, self.slots, self.flags, self._buffer)
        except CaptureFailed as error:
            compiled.log.uncaptured_units[unit.name] = str(error)
            log.warning("%s runs uncaptured: %s", unit.name, error)
            return None
        before, _ = compiled.program.keys
        rows = 0 if before is None else self.slots[before].shape[0]
        record = CaptureRecord(unit.name, unit.depth, rows, time.perf_counter() - start, size)
        log.info("captured %s: depth %d, batch %d, %.3f s, %d bytes", *vars(record).values())
        compiled.log.add(record)
        self._replays[unit] = replay
        return replay

    def _run_plainly(self, unit: Unit) -> None:
        if self._narrowed is None:
            unit.run(self.slots)
            return
        for step in unit.steps:
            if step.segment.depth > self.compiled.program.num_blocks:
                self._narrow()
            step(self.slots)

    def _narrow(self) -> None:
        """Makes the last hidden state that of the last token, and the number of tokens one."""
        last = self._narrowed
        assert last is not None
        hidden = self.slots[last.hidden]
        self.slots[last.hidden] = hidden.narrow(last.axis, hidden.shape[last.axis] - 1, 1).contiguous()
        self.slots[last.size] = 1

    def _run_into_buffers(self, unit: Unit, device: CaptureDevice) -> None:
        """Runs a unit as plain code and leaves what others read in its buffers."""
        own = list(self.slots)
        device.wait()
        unit.run(own, self.flags)
        pairs = [(self._buffer(index, own[index]), own[index]) for index in unit.writes]
        device.run(lambda: copy_into(pairs))
        self._warm.add(unit)

    def _buffer(self, index: int, value: Any) -> Any:
        """Returns the buffer of a slot, made for a value like this one; of a number, itself."""
        if isinstance(value, Tensor) and index not in self.buffers:
            self.buffers[index] = buffer_like(value)
            self.compiled.log.buffer_bytes += self.buffers[index].nbytes
        self.slots[index] = self.buffers.get(index, value)
        return self.slots[index]

    def _score(self, depth: int) -> float:
        """Waits for the score after a block that ran last."""
        if self.device is None:
            return float(self.compiled.agreed(self.slots[SCORE]).item())
        self.device.wait()
        return float(self.flags[depth].item())

    def _kept_score(self) -> Tensor | None:
        """Returns the head's score, which no later run overwrites; None where it has none."""
        score = self.slots[SCORE]
        if score is None or self.device is None:
            return None if score is None else self.compiled.agreed(score)
        kept = buffer_like(score)
        self.device.run(lambda: kept.copy_(score))
        return kept


def on_step(observer: Callable[[StepState, StepRecord], object]) -> AbstractContextManager[None]:
    """Inside, calls `observer(state, record)` after every step in the process."""
    return _steps.added(observer)
