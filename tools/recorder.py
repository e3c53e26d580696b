"""Captures without a GPU: freezes the schedule, owns the buffers, and spoils whatever a real replay would not have.

A captured graph behaves unlike plain code in ways that a test on a CPU would not notice. The recorder shows them:

- a launch is put into a queue, which runs when the host waits for it and when the step ends;
- buffers and flags are filled with NaN (integers: their least value, booleans: True) when a step begins;
- what a unit made for itself is filled the same way when its replay has ended;
- a replay sees no slot but those that its unit reads, and raises where one of them lies elsewhere than at capture.

Not handled: a GPU's behaviour. Kernels that cannot be captured, streams and memory pools are seen by the CUDA device
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from river_compile.capture.device import CaptureDevice, captured_by
from river_compile.capture.units import CaptureUnit
from river_compile.kernels.triton.linear import MAX_EXACT_ROWS


class StaleReplay(RuntimeError):
    """A graph was replayed though something it reads has moved since its capture."""


@dataclass(frozen=True)
class Recording:
    """A captured unit: what it reads, where that lay, and the buffers it writes."""

    unit: CaptureUnit
    addresses: tuple[object, ...]
    outputs: dict[int, Tensor]


@dataclass
class Event:
    """One thing that happened, for tests and for drawing the schedule.

    Attributes:
        what: "capture", "launch", "run" (a call that is not captured, such as a copy into a buffer), "wait" or "end".
        name: the unit; for a wait, the unit that was launched last.
    """

    what: str
    name: str = ""


@dataclass
class Recorder(CaptureDevice):
    """The device; `events` is what it saw since it was last cleared."""

    events: list[Event] = field(default_factory=list)
    name: str = "recorder"
    _queue: list[Callable[[], object]] = field(default_factory=list)
    _latest: str = ""

    def takes_pass(self, dtype: torch.dtype, sequences: int, positions: int) -> bool:
        return sequences * positions <= MAX_EXACT_ROWS

    def flags(self, count: int) -> Tensor:
        with torch.inference_mode(False):
            return spoil(torch.empty(count))

    def begin(self, buffers: Callable[[], Iterable[Tensor]], flags: Tensor) -> None:
        for tensor in (*buffers(), flags):
            spoil(tensor)

    def run(self, work: Callable[[], object]) -> None:
        self.events.append(Event("run"))
        self._queue.append(work)

    def settle(self) -> None:
        while self._queue:
            self._queue.pop(0)()

    def capture(
        self, unit: CaptureUnit, slots: list, outputs: dict[int, Tensor], buffer: Callable[[int, Tensor], Tensor]
    ) -> tuple[Recording, int]:
        self.events.append(Event("capture", unit.name))
        addresses = tuple(_address(slots[i]) for i in unit.keys)
        return Recording(unit, addresses, dict(outputs)), 0

    def launch(self, graph: Recording, slots: list) -> None:
        self.events.append(Event("launch", graph.unit.name))
        own: list = [None] * len(slots)
        for index, address in zip(graph.unit.keys, graph.addresses, strict=True):
            if _address(slots[index]) != address:
                raise StaleReplay(f"{graph.unit.name}: slot {index} has moved since the capture")
        for index in graph.unit.reads:
            own[index] = slots[index]
        self._latest = graph.unit.name
        self._queue.append(lambda: self._replay(graph, own))

    def wait(self) -> None:
        self.events.append(Event("wait", self._latest))
        self.settle()

    def end(self) -> None:
        self.settle()
        self.events.append(Event("end"))

    def abandon(self) -> None:
        self._queue.clear()

    def _replay(self, graph: Recording, own: list) -> None:
        """Runs a unit on slots and spoils what it made of them."""
        before = {t.untyped_storage().data_ptr() for t in own if isinstance(t, Tensor)}
        graph.unit.run_into(own, graph.outputs)
        for tensor in own:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:
                spoil(tensor)


def recording() -> AbstractContextManager[None]:
    """Inside, models on a CPU with ``cudagraphs=True`` are captured by recorders."""
    return captured_by(Recorder)


def spoil(tensor: Tensor) -> Tensor:
    """Fills a tensor with values that no computation takes for good; returns it."""
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).min)


def _address(value: object) -> object:
    return value.data_ptr() if isinstance(value, Tensor) else value
