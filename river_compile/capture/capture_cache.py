"""Launches units: replays captures, makes them when inputs recur, and owns the buffers between units.

The first time that a unit meets its inputs' addresses it runs uncaptured, which is also the warm-up that a capture
needs; the second time it is captured, and from then on replayed. (A device that needs no warm-up captures at once.) A
unit whose inputs never repeat (a mask that grows) stays uncaptured, and the log names the input that changes.

A capture is found by the addresses of what it reads and by the sizes among its inputs; shapes and strides follow from
those. A step on an earlier one's slots finds it there: nothing has moved. A new KV cache leads to new captures, or
takes over those of a freed one whose addresses it got. No cache and no parameter is held here. The oldest capture gives
way when there are `max_captures`.

Not handled: when what is launched, which :mod:`river_compile.capture.runner` says; two steps at a time.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from river_compile.capture.device import CaptureDevice, CaptureFailed, CaptureLog, CaptureRecord
from river_compile.capture.units import CaptureUnit, buffer_like, copy_into
from river_compile.passes.capture_safety import fixed_inputs
from river_compile.passes.nodes import input_name, is_tensor, source_of, value_of
from river_compile.passes.program import RiverProgram
from river_compile.runtime.slots import SCORE, Slots, gather, new_slots
from river_compile.upstream.tensors import lie_at

log = logging.getLogger("river_compile.capture.device")

_SEEN = 16  # sets of inputs that are remembered per unit until they come a second time
_SHAPES = 8  # shapes of one value for which buffers are kept
_CHANGES = 4  # uses without one repetition before the log calls an input changing


@dataclass
class Bound:
    """What is known of slots on which several steps run.

    Attributes:
        take: picks the inputs that are copied.
        targets: the buffers that they are copied into.
        numbers: slots of the inputs that are numbers.
        launches: what replays units, the buffers of their results, by slot, and the numbers that this holds for.
    """

    take: Callable[[Sequence], Sequence]
    targets: list[Tensor]
    numbers: list[int]
    launches: dict[CaptureUnit, tuple[Callable[[], object], dict[int, Tensor], list]] = field(default_factory=dict)


class CaptureCache:
    """The captures and buffers of one program. `max_captures` may be changed between two steps."""

    def __init__(self, program: RiverProgram, device: CaptureDevice, log: CaptureLog, max_captures: int) -> None:
        self.device, self.log, self.max_captures = device, log, max_captures
        self._program = program
        self._nodes: list[fx.Node] = list(program.slots)
        fixed = fixed_inputs(program.plan)
        self._batch_of = next(
            i for i, node in enumerate(self._nodes) if node in fixed and is_tensor(node) and value_of(node).dim() == 4
        )
        self._buffers: dict[int, OrderedDict[tuple, Tensor]] = {}
        # By what was read: the graph and the buffers of its results; and these where a unit was not captured so far.
        self._captures: OrderedDict[tuple, tuple[object, dict[int, Tensor]]] = OrderedDict()
        self._seen: dict[CaptureUnit, OrderedDict[tuple, dict[int, Tensor]]] = {}
        self._uncaptured: set[CaptureUnit] = set()  # for good
        # Addresses, numbers and signature of the latest launch: most come again.
        self._latest: dict[CaptureUnit, tuple[list[int], list, tuple]] = {}

    def buffers(self) -> list[tuple[str, Tensor]]:
        """Returns the buffers at the units' borders, each with the name of its value in the traced graph."""
        names = {i: node.name for i, node in enumerate(self._nodes)} | {SCORE: "score of the head"}
        return [(name, b) for i, name in names.items() for b in self._buffers.get(i, {}).values()]

    def graphs(self) -> list[object]:
        """Returns the device's graphs of all captures, that of the latest launch last."""
        return [graph for graph, _ in self._captures.values()]

    def bind(self, args: Sequence, copied: Sequence[int]) -> Slots:
        """Returns the slots of steps with inputs like these, of which tensors among `copied` are copied."""
        slots = new_slots(self._program, args)
        copied = [index for index in copied if isinstance(args[index], Tensor)]
        numbers = [index for index, arg in enumerate(args) if isinstance(arg, int)]
        slots.bound = Bound(gather(copied), [self.buffer(index, args[index]) for index in copied], numbers)
        for index, buffer in zip(copied, slots.bound.targets, strict=True):
            slots[index] = buffer
        return slots

    def launch(self, unit: CaptureUnit, slots: Slots) -> None:
        """Replays a unit, or runs it if it has no capture, and leaves its results in the slots."""
        launches = slots.bound.launches
        if unit not in launches or (unit.sizes and not self._is_bound(unit, slots)):
            if self._stays_uncaptured(unit):
                self._run_uncaptured(unit, slots)
                return
            signature = self._signature(unit, slots)
            if signature not in self._captures and not self._capture(unit, signature, slots):
                self._remember(unit, signature, self._run_uncaptured(unit, slots))
                return
            self._captures.move_to_end(signature)
            graph, outputs = self._captures[signature]
            launches[unit] = self.device.replayer(graph, slots), outputs, [slots[i] for i in unit.sizes]
        replay, outputs, _ = launches[unit]
        replay()
        for index, buffer in outputs.items():
            slots[index] = buffer
        if unit.numbers:
            unit.count(slots)

    @staticmethod
    def _is_bound(unit: CaptureUnit, slots: Slots) -> bool:
        """Says whether the slots know what replays a unit. (Its numbers may be others than in the step before.)"""
        known = slots.bound.launches.get(unit)
        return known is not None and known[2] == [slots[i] for i in unit.sizes]

    def _stays_uncaptured(self, unit: CaptureUnit) -> bool:
        """Says whether a unit is never captured; the log then says why."""
        if unit.obstacle is not None and unit not in self._uncaptured:
            self.log.uncaptured_units.setdefault(unit.name, str(unit.obstacle))
            self._uncaptured.add(unit)
        return unit in self._uncaptured

    def _signature(self, unit: CaptureUnit, slots: Sequence) -> tuple:
        """Returns the unit, the address of every tensor that it reads, and every number."""
        values = unit.inputs_in(slots)
        tensors, numbers = [*values[: unit.tensors]], [*values[unit.tensors :]]
        latest = self._latest.get(unit)
        if latest is None or latest[1] != numbers or not lie_at(tensors, latest[0]):
            addresses = list(map(Tensor.data_ptr, tensors))
            latest = self._latest[unit] = addresses, numbers, (unit, *addresses, *numbers)
        return latest[2]

    def _remember(self, unit: CaptureUnit, signature: tuple, outputs: dict[int, Tensor]) -> None:
        """Notes the inputs that a unit ran on and the buffers of its results, so that it is captured the next time."""
        seen = self._seen.setdefault(unit, OrderedDict())
        if len(seen) >= _CHANGES and unit.name not in self.log.uncaptured_units:
            latest = next(reversed(seen))
            pairs = zip(unit.keys, latest[1:], signature[1:], strict=True)
            differing = [self._nodes[index] for index, before, now in pairs if before != now]
            names = [input_name(node) if node.op == "placeholder" else source_of(node) for node in differing]
            self.log.uncaptured_units[unit.name] = (
                f"its inputs have not come twice so far; the latest differ at {', '.join(dict.fromkeys(names))}"
            )
        seen[signature] = outputs
        if len(seen) > _SEEN:
            seen.popitem(last=False)

    def _run_uncaptured(self, unit: CaptureUnit, slots: Slots) -> dict[int, Tensor]:
        """Runs a unit as plain code; returns the buffers that its results were copied to."""
        own = new_slots(self._program)
        for index in unit.reads:
            own[index] = slots[index]
        self.device.settle()
        unit.run(own)
        outputs = self.copies({index: own[index] for index in unit.writes})
        for index, buffer in outputs.items():
            slots[index] = buffer
        unit.count(slots)
        return outputs

    def _capture(self, unit: CaptureUnit, signature: tuple, slots: Slots) -> bool:
        """Captures a unit whose inputs recur; returns False if they are new, or it failed (the log says why)."""
        seen = self._seen.setdefault(unit, OrderedDict())
        outputs = seen.get(signature)
        if outputs is None:
            if self.device.needs_a_run:
                return False
            outputs = {}
        start = time.perf_counter()
        try:
            graph, size = self.device.capture(unit, slots, outputs, self.buffer)
        except CaptureFailed as error:
            self._uncaptured.add(unit)
            self.log.uncaptured_units[unit.name] = str(error)
            log.warning("%s runs uncaptured: %s", unit.name, error)
            return False
        seconds = time.perf_counter() - start
        record = CaptureRecord(unit.name, unit.end, slots[self._batch_of].shape[0], seconds, size)
        log.info("captured %s: depth %d, batch %d, %.3f s, %d bytes", *vars(record).values())
        while len(self._captures) >= self.max_captures:
            self._captures.popitem(last=False)
            self.log.dropped += 1
        self._captures[signature] = graph, outputs
        seen.pop(signature, None)
        self.log.add(record)
        self.log.alive = len(self._captures)
        self.log.uncaptured_units.pop(unit.name, None)
        return True

    def copies(self, values: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Copies values, by slot, into the buffers of their slots and returns those."""
        buffers = {index: self.buffer(index, value) for index, value in values.items()}
        if buffers:
            self.device.run(lambda: copy_into([*buffers.values()], [*values.values()]))
        return buffers

    def buffer(self, index: int, value: Tensor) -> Tensor:
        """Returns the buffer of a slot for a tensor like this one."""
        kept = self._buffers.setdefault(index, OrderedDict())
        key = (value.shape, value.stride(), value.dtype, value.device)
        buffer = kept.get(key)
        if buffer is None:
            buffer = kept[key] = buffer_like(value)
            if len(kept) > _SHAPES:
                kept.popitem(last=False)
            self.log.buffer_bytes = sum(b.nbytes for k in self._buffers.values() for b in k.values())
        kept.move_to_end(key)
        return buffer

    def fresh(self, values: Iterable[object]) -> tuple:
        """Returns copies that no later step overwrites, in order with the launches."""
        values = list(values)
        fresh = [torch.empty_like(v) if isinstance(v, Tensor) else v for v in values]
        both = zip(fresh, values, strict=True)
        pairs = [(a, b) for a, b in both if isinstance(a, Tensor) and isinstance(b, Tensor)]
        if pairs:
            self.device.run(lambda: copy_into(*zip(*pairs, strict=True)))
        return tuple(fresh)
