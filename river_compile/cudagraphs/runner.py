"""Runs a decode graph as captured units: launches instead of calls, one launch for many kernels.

The first time that a unit meets its inputs' addresses it runs uncaptured, which is also the warm-up that a capture
needs. The second time it is captured, and from then on replayed. A unit whose inputs never repeat (a mask that grows
with every token) therefore stays uncaptured, and the log says on which input's account.

A capture is found by the addresses of what it reads and by the sizes among its inputs. A new KV cache elsewhere
leads to new captures; the executor holds no cache and no parameter, so the old ones are free to go. The oldest capture
gives way when there are `max_captures`.

Steps of one executor run one after the other: a second thread waits for the first one's step to be launched, and what
the caller gets are copies, so nobody's result is overwritten by the next step.

Not handled (told in the log, and run uncaptured): dynamic caches, prompts, operations that read sizes from the device.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from river_compile.exits import Memories, Memory
from river_compile.passes.graph_safety import fixed_inputs, runs_once
from river_compile.passes.nodes import input_name, is_tensor, source_of, value_of
from river_compile.passes.program import DecoderPlan, RiverProgram, Segment
from river_compile.runtime.executor import ExitRule, RiverExecutor, Step
from river_compile.runtime.slots import gather
from river_compile.runtime.trace import ExitStats, Outcome

from .device import CaptureDevice, CaptureFailed, CaptureLog, CaptureRecord
from .launch_ahead import LaunchAhead
from .partition import Unit, UnitMaker, copy_into

log = logging.getLogger("river_compile.cudagraphs.device")

_SEEN = 16  # sets of inputs that are remembered per unit until they come a second time
_SHAPES = 8  # shapes of one value for which buffers are kept
_CHANGES = 4  # uses without one repetition before the log calls an input changing


@dataclass(frozen=True)
class Capturing:
    """How an executor captures.

    Attributes:
        device: what captures.
        max_captures: captures kept at the same time.
        log: where to write down what happens.
        ahead: when the next piece is launched before the flag is known.
    """

    device: CaptureDevice
    max_captures: int
    log: CaptureLog
    ahead: LaunchAhead


@dataclass(frozen=True)
class _Entry:
    graph: object
    outputs: dict[int, Tensor]


class CapturedExecutor(RiverExecutor):
    """A RiverExecutor for decode graphs on a static cache whose units are captured.

    Args:
        program, steps, rule, stats, memories: as for :class:`RiverExecutor`.
        how: the device, its limits, and where to tell of it.
    """

    def __init__(
        self,
        program: RiverProgram,
        steps: Mapping[Segment, Step],
        rule: ExitRule,
        stats: ExitStats,
        memories: Memories,
        how: Capturing,
    ) -> None:
        super().__init__(program, steps, rule, stats, memories)
        plan = program.plan
        register = program.slots
        self.device, self.log, self.ahead, self._max_captures = how.device, how.log, how.ahead, how.max_captures
        self.flags = self.device.flags(plan.num_blocks + 1)
        self.units = UnitMaker(program, steps, self.flags, rule.deepest)
        self.size = len(register) + 1  # (one more for the head's score)
        self._nodes = list(register)
        fixed = fixed_inputs(plan)
        self._copied = [i for node, i in register.items() if node.op == "placeholder" and node not in fixed]
        self._cache = next(
            i for node, i in register.items() if node in fixed and is_tensor(node) and value_of(node).dim() == 4
        )
        self._returned = [register[node] for node in program.returned]
        self._buffers: dict[int, OrderedDict[tuple, Tensor]] = {}
        self._captures: OrderedDict[tuple, _Entry] = OrderedDict()
        self._seen: dict[Unit, OrderedDict[tuple, dict[int, Tensor]]] = {}
        self._failed: set[Unit] = set()
        self._reads: dict[Unit, Callable] = {}
        self._lock = threading.Lock()
        self.log.device = self.device.name
        self._note_order(plan)

    def __call__(self, *args: object) -> tuple:
        rule = self._rule_of_step()
        with self._lock, torch._C._DisableAutocast():
            try:
                outcome, outputs = self._step(args, rule)
            except BaseException:
                self.device.abandon()
                raise
        self._close(outcome)
        return outputs

    def buffers(self) -> list[tuple[str, Tensor]]:
        """Returns the buffers at the units' borders, each with the name of its value in the traced graph."""
        names = [*(node.name for node in self._nodes), "score of the head"]
        return [(names[i], b) for i, kept in sorted(self._buffers.items()) for b in kept.values()]

    def _step(self, args: Sequence, rule: ExitRule) -> tuple[Outcome, tuple]:
        self.device.begin(lambda: [buffer for _, buffer in self.buffers()], self.flags)
        registers = [*args, *[None] * (self.size - len(args))]
        if self._check_capacity is not None:
            self._check_capacity(registers, 1)
        memory = self._recall(registers)
        for index in self._copied:
            if isinstance(args[index], Tensor):
                registers[index] = self._copy(index, args[index])
        if self.units.prologue is not None:
            self._launch(self.units.prologue, registers)
        outcome = self._run_blocks(registers, rule, memory)
        if rule.threshold is not None and rule.criterion.may_doubt and outcome.depth < len(self.blocks):
            outcome = self._finish_or_doubt(registers, outcome, rule)
        else:
            self._keep(registers, memory, self._finish(registers, outcome.depth))
        outputs = self._fresh(registers[i] for i in self._returned)
        self.device.end()
        return outcome, outputs

    def _run_blocks(self, registers: list, rule: ExitRule, memory: Memory) -> Outcome:
        """Launches the pieces up to the exit; the last one runs the head too."""
        depth, entropy = self._depth_before(rule, memory)
        if depth is None:
            return self._run_pieces(registers, rule, memory)
        if depth or self.units.prologue is None:  # (otherwise there is nothing before the tail)
            self._launch_blocks(0, depth, registers)
        return Outcome(depth, entropy=entropy)

    def _launch_blocks(self, start: int, end: int, registers: list) -> None:
        """Launches blocks start+1..end, whatever their checks say."""
        for piece in self.units.pieces(start, end):
            self._launch(piece, registers)

    def _run_pieces(self, registers: list, rule: ExitRule, memory: Memory) -> Outcome:
        """Launches pieces until a flag says to leave."""
        ends = self.units.ends
        pieces = [self.units.piece(a, b) for a, b in zip((0, *ends), ends, strict=False)]
        scores: list[float] = []
        launched = 0
        for place, piece in enumerate(pieces[:-1]):
            alone = launched == place
            if alone:
                started, before = time.perf_counter(), self.device.mark()
                replayed = self._launch(piece, registers)
                launched += 1
            if piece.flag is None or piece.depth < rule.first_exit:
                continue
            flag_sent = self.device.mark()
            if self._starts_ahead(piece, pieces[place + 1], registers):
                self._launch(pieces[place + 1], registers)
                launched += 1
            self.device.wait(flag_sent)
            scores.append(self.flags[piece.depth].item())
            leaves = rule.criterion.leaves(piece.depth, scores[-1], rule.threshold, memory)
            self.ahead.saw(piece.depth, leaves)
            if alone and replayed and launched == place + 1:
                seconds = self.device.seconds_between(before, flag_sent)
                if seconds is not None:
                    self.ahead.timed(piece.depth, seconds, time.perf_counter() - started)
            if leaves:
                if launched > place + 1:  # the next piece ran for this token too, and so will its twins
                    self._take_back(registers, piece.depth, pieces[place + 1].depth)
                return Outcome(piece.depth, scores)
        if launched < len(pieces):
            self._launch(pieces[-1], registers)
        return Outcome(ends[-1], scores)

    def _starts_ahead(self, piece: Unit, following: Unit, registers: list) -> bool:
        return (
            following.name not in self.log.not_ahead
            and self.ahead.pays(piece.depth, following.depth)
            and self._signature(following, registers) in self._captures
        )

    def _take_back(self, registers: list, depth: int, end: int, saved: Sequence[tuple[int, Tensor]] = ()) -> None:
        """Makes blocks depth+1..end ready to run once more for this token."""
        self.device.run(lambda: self._rewind.back(registers, depth, saved, end))

    def _finish(self, registers: list, depth: int) -> tuple:
        """Launches the tail, where the head has not run yet; returns a copy of the head's score, where it has one."""
        if depth < len(self.blocks):
            self._launch(self.units.tail(depth), registers)
        score = registers[self.units.score]
        return () if score is None else self._fresh([score])

    def _finish_or_doubt(self, registers: list, outcome: Outcome, rule: ExitRule) -> Outcome:
        """Finishes through the river and, where its logits leave doubt, once more through the backbone."""
        num_blocks = len(self.blocks)
        self.device.settle()
        moved = self._rewind.save(registers, outcome.depth)
        self._launch(self.units.tail(outcome.depth), registers)
        self.device.wait(self.device.mark())
        entropy = self.flags[num_blocks].item()
        if not rule.criterion.doubts(entropy, rule.threshold):
            return Outcome(outcome.depth, entropy=entropy)
        self._take_back(registers, outcome.depth, num_blocks, moved)
        self._launch_blocks(outcome.depth, num_blocks, registers)
        return Outcome(num_blocks, entropy=entropy, doubted=True, river_from=outcome.depth)

    def _launch(self, unit: Unit, registers: list) -> bool:
        """Replays a unit, or runs it where it has no capture, and leaves its results in the registers.

        Returns:
            True where an existing capture was replayed.
        """
        if unit.obstacle is not None or unit in self._failed:
            if unit.obstacle is not None:
                self.log.uncaptured.setdefault(unit.name, str(unit.obstacle))
            self._run_uncaptured(unit, registers)
            return False
        signature = self._signature(unit, registers)
        entry = self._captures.get(signature)
        is_new = entry is None
        if is_new:
            outputs = self._seen.get(unit, {}).get(signature)
            entry = self._capture(unit, signature, registers, outputs) if outputs is not None else None
        if entry is None:
            self._remember(unit, signature, self._run_uncaptured(unit, registers))
            return False
        self._captures.move_to_end(signature)
        self.device.launch(entry.graph, registers)
        for index, buffer in entry.outputs.items():
            registers[index] = buffer
        unit.count(registers)
        return not is_new

    def _signature(self, unit: Unit, registers: list) -> tuple:
        """Returns the unit, the address of every tensor that it reads, and every number."""
        if unit not in self._reads:
            self._reads[unit] = gather(unit.keys)
        return (unit, *[v.data_ptr() if isinstance(v, Tensor) else v for v in self._reads[unit](registers)])

    def _remember(self, unit: Unit, signature: tuple, outputs: dict[int, Tensor]) -> None:
        """Notes the inputs that a unit ran on and the buffers of its results, so that it is captured the next time."""
        seen = self._seen.setdefault(unit, OrderedDict())
        if len(seen) >= _CHANGES and unit.name not in self.log.uncaptured:
            latest = next(reversed(seen))
            pairs = zip(unit.keys, latest[1:], signature[1:], strict=True)
            differing = [self._nodes[index] for index, before, now in pairs if before != now]
            names = [input_name(node) if node.op == "placeholder" else source_of(node) for node in differing]
            self.log.uncaptured[unit.name] = (
                f"its inputs have not come twice so far; the latest differ at {', '.join(dict.fromkeys(names))}"
            )
        seen[signature] = outputs
        if len(seen) > _SEEN:
            seen.popitem(last=False)

    def _run_uncaptured(self, unit: Unit, registers: list) -> dict[int, Tensor]:
        """Runs a unit as plain code; returns the buffers that its results were copied to."""
        own = [None] * self.size
        for index in unit.reads:
            own[index] = registers[index]
        self.device.settle()
        unit.run(own)
        outputs = {}
        for index in unit.writes:
            registers[index] = outputs[index] = self._copy(index, own[index])
        unit.count(registers)
        return outputs

    def _capture(self, unit: Unit, signature: tuple, registers: list, outputs: dict[int, Tensor]) -> _Entry | None:
        """Captures a unit; None where that failed, which the log then says."""
        start = time.perf_counter()
        try:
            graph, size = self.device.capture(unit, registers, outputs)
        except CaptureFailed as error:
            self._failed.add(unit)
            self.log.uncaptured[unit.name] = str(error)
            log.warning("%s runs uncaptured: %s", unit.name, error)
            return None
        seconds = time.perf_counter() - start
        record = CaptureRecord(unit.name, unit.depth, registers[self._cache].shape[0], seconds, size)
        log.info("captured %s: depth %d, batch %d, %.3f s, %d bytes", *vars(record).values())
        while len(self._captures) >= self._max_captures:
            self._captures.popitem(last=False)
            self.log.dropped += 1
        self._captures[signature] = entry = _Entry(graph, outputs)
        del self._seen[unit][signature]
        self.log.add(record)
        self.log.alive = len(self._captures)
        self.log.uncaptured.pop(unit.name, None)
        return entry

    def _copy(self, index: int, value: Tensor) -> Tensor:
        """Copies a value into the buffer of its register and returns the buffer."""
        kept = self._buffers.setdefault(index, OrderedDict())
        key = (value.shape, value.stride(), value.dtype, value.device)
        buffer = kept.get(key)
        if buffer is None:
            buffer = kept[key] = self.device.buffer(value)
            if len(kept) > _SHAPES:
                kept.popitem(last=False)
            self.log.buffer_bytes = sum(b.nbytes for k in self._buffers.values() for b in k.values())
        kept.move_to_end(key)
        self.device.run(lambda: copy_into(buffer, value))
        return buffer

    def _fresh(self, values: Iterable[object]) -> tuple:
        """Returns copies that no later step overwrites, in order with the launches."""
        values = list(values)
        fresh = [torch.empty_like(v) if isinstance(v, Tensor) else v for v in values]
        pairs = [(a, b) for a, b in zip(fresh, values, strict=True) if isinstance(a, Tensor)]
        self.device.run(lambda: [a.copy_(b) for a, b in pairs])
        return tuple(fresh)

    def _note_order(self, plan: DecoderPlan) -> None:
        """Writes down which pieces cannot be launched ahead, and why."""
        for start, end in zip(self.units.ends, self.units.ends[1:], strict=False):
            reason = next(filter(None, (runs_once(plan, block) for block in plan.blocks[start:end])), None)
            if reason is not None:
                self.log.not_ahead[self.units.piece(start, end).name] = str(reason)
