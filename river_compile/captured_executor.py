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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from river_compile.passes.capturable import counters_of, fixed_inputs, source_of
from river_compile.passes.decoder_layers import input_name, mutated_inputs
from river_compile.passes.types import Refusal, RiverProgram

from .capture import CaptureDevice, CaptureFailed, CaptureLog, CaptureRecord
from .capture_units import Unit, UnitMaker, copy_into
from .launch_ahead import LaunchAhead
from .runtime import ExitRule, RiverExecutor, Step, gather, registers_of
from .stats import ExitStats, record_step

log = logging.getLogger("river_compile.capture")

_SEEN = 16  # sets of inputs that are remembered per unit until they come a second time
_SHAPES = 8  # shapes of one value for which buffers are kept
_CHANGES = 4  # uses without one repetition before the log calls an input changing


@dataclass(frozen=True)
class _Entry:
    graph: object
    outputs: dict[int, Tensor]


class CapturedExecutor(RiverExecutor):
    """A RiverExecutor for decode graphs on a static cache whose units are captured.

    Args:
        program, steps, rule, stats: as for :class:`RiverExecutor`.
        device: what captures.
        max_captures: captures kept at the same time.
        captures: where to write down what happens.
        ahead: when the next piece is launched before the flag is known.
    """

    def __init__(
        self,
        program: RiverProgram,
        steps: dict[str, Step],
        rule: ExitRule,
        stats: ExitStats,
        device: CaptureDevice,
        max_captures: int,
        captures: CaptureLog,
        ahead: LaunchAhead,
    ) -> None:
        super().__init__(program, steps, rule, stats)
        plan = program.plan
        register = registers_of(program)
        self.device = device
        self.log = captures
        self.ahead = ahead
        self.flags = device.flags(plan.num_blocks + 1)
        self.units = UnitMaker(program, steps, register, self.flags)
        self._max_captures = max_captures
        self._nodes = list(register)
        fixed = fixed_inputs(plan)
        self._copied = [i for node, i in register.items() if node.op == "placeholder" and node not in fixed]
        self._cache = register[mutated_inputs(plan.blocks[0].kv.writes[0])[0]]
        self._counters = [counters_of(plan, block) for block in plan.blocks]
        self._register = register
        self._returned = [register[node] for node in program.returned]
        self._buffers: dict[int, OrderedDict[tuple, Tensor]] = {}
        self._captures: OrderedDict[tuple, _Entry] = OrderedDict()
        self._seen: dict[Unit, OrderedDict[tuple, dict[int, Tensor]]] = {}
        self._failed: set[Unit] = set()
        self._reads: dict[Unit, Callable] = {}
        self._lock = threading.Lock()
        captures.device = device.name
        self._note_order()

    def __call__(self, *args: object) -> tuple:
        with self._lock, torch._C._DisableAutocast():
            try:
                depth, scores, outputs = self._step(args)
            except BaseException:
                self.device.abandon()
                raise
        self._stats.count(depth, self._decode)
        record_step(self._stats, depth, scores, self._decode)
        return outputs

    def buffers(self) -> list[tuple[str, Tensor]]:
        """Returns the buffers at the units' borders, each with the name of its value in the traced graph."""
        return [(self._nodes[i].name, b) for i, kept in sorted(self._buffers.items()) for b in kept.values()]

    def _step(self, args: Sequence) -> tuple[int, list[float], tuple]:
        self.device.begin(lambda: [buffer for _, buffer in self.buffers()], self.flags)
        registers = [*args, *[None] * (self.size - len(args))]
        if self._check_capacity is not None:
            self._check_capacity(registers, 1)
        for index in self._copied:
            if isinstance(args[index], Tensor):
                registers[index] = self._copy(index, args[index])
        if self.units.prologue is not None:
            self._launch(self.units.prologue, registers)
        threshold, fixed_depth, first_exit = self._rule_now()
        scores: list[float] = []
        if threshold is None:
            depth = fixed_depth
            if depth or self.units.prologue is None:  # (otherwise there is nothing before the tail)
                self._launch(self.units.piece(0, depth), registers)
        else:
            depth = self._run_pieces(registers, threshold, first_exit, scores)
        if depth < len(self.blocks):
            self._launch(self.units.tail(depth), registers)
        outputs = self._take_outputs(registers)
        self.device.end()
        return depth, scores, outputs

    def _run_pieces(self, registers: list, threshold: float, first_exit: int, scores: list[float]) -> int:
        """Launches pieces until a flag says to leave; returns the blocks executed and fills in the scores."""
        ends = self.units.ends
        pieces = [self.units.piece(a, b) for a, b in zip((0, *ends), ends, strict=False)]
        launched = 0
        for place, piece in enumerate(pieces[:-1]):
            alone = launched == place
            if alone:
                started, before = time.perf_counter(), self.device.mark()
                replayed = self._launch(piece, registers)
                launched += 1
            if piece.depth < first_exit:
                continue
            flag_sent = self.device.mark()
            if self._starts_ahead(piece, pieces[place + 1], registers):
                self._launch(pieces[place + 1], registers)
                launched += 1
            self.device.wait(flag_sent)
            scores.append(self.flags[piece.depth].item())
            leaves = scores[-1] > threshold  # false for NaN: a token whose score is no number stays
            self.ahead.saw(piece.depth, leaves)
            if alone and replayed and launched == place + 1:
                seconds = self.device.seconds_between(before, flag_sent)
                if seconds is not None:
                    self.ahead.timed(piece.depth, seconds, time.perf_counter() - started)
            if leaves:
                if launched > place + 1:
                    self._take_back(pieces[place + 1], registers)
                return piece.depth
        if launched < len(pieces):
            self._launch(pieces[-1], registers)
        return len(self.blocks)

    def _starts_ahead(self, piece: Unit, following: Unit, registers: list) -> bool:
        return (
            following.name not in self.log.not_ahead
            and self.ahead.pays(piece.depth, following.depth)
            and self._signature(following, registers) in self._captures
        )

    def _take_back(self, unit: Unit, registers: list) -> None:
        """Rewinds the counters that a piece advanced for a token that then left before it."""
        pairs = [pair for block in unit.blocks for pair in self._counters[block - 1]]
        tensors = [registers[self._register[node]] for node, _ in pairs]
        steps = [step for _, step in pairs]
        if tensors:
            self.device.run(lambda: torch._foreach_sub_(tensors, steps))

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
            node = self._nodes[next(index for index, before, now in pairs if before != now)]
            name = input_name(node) if node.op == "placeholder" else source_of(node)
            self.log.uncaptured[unit.name] = f"its inputs have not come twice so far; the latest differ at {name}"
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
        self.log.captures.append(record)
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

    def _take_outputs(self, registers: list) -> tuple:
        """Returns copies of what the graph returns, in order with the launches."""
        outputs = [registers[i] for i in self._returned]
        fresh = [torch.empty_like(v) if isinstance(v, Tensor) else v for v in outputs]
        pairs = [(a, b) for a, b in zip(fresh, outputs, strict=True) if isinstance(a, Tensor)]
        self.device.run(lambda: [a.copy_(b) for a, b in pairs])
        return tuple(fresh)

    def _note_order(self) -> None:
        """Writes down which pieces cannot be launched ahead, and why."""
        for start, end in zip(self.units.ends, self.units.ends[1:], strict=False):
            unit = self.units.piece(start, end)
            reasons = [c for c in self._counters[start:end] if isinstance(c, Refusal)]
            if reasons:
                self.log.not_ahead[unit.name] = str(reasons[0])
