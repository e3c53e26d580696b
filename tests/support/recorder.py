"""Captures without a GPU: freezes the schedule, owns the buffers, and spoils whatever a real replay would not have.

A captured graph behaves unlike plain code in ways that a test on a CPU would not notice. The recorder shows them:

- a launch is put into a queue, which runs when the host waits for it, or when the step ends;
- buffers and flags are filled with NaN (integers: their least value, booleans: True) when a step begins;
- what a unit made for itself is filled the same way when its replay has ended;
- a replay sees no slot but those that its unit reads, and raises where one of them lies elsewhere than at capture.

Not handled: a GPU's behavior. Kernels that cannot be captured, streams and memory pools are seen by the CUDA device
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from river_compile.runtime.captures import DEVICES, CaptureDevice, copy_into
from river_compile.runtime.units import Unit


class StaleReplay(RuntimeError):
    """A graph was replayed though something it reads has moved since its capture."""


@dataclass(frozen=True)
class Recording:
    """A captured unit, and what its replay would read and write: the state's slots, where they lay, the buffers."""

    unit: Unit
    slots: list[Any]
    flags: Tensor
    addresses: tuple[object, ...]
    outputs: dict[int, Tensor]


@dataclass(frozen=True)
class Event:
    """One thing that happened, for tests and for drawing the schedule.

    Attributes:
        what: "capture", "launch", "run" (a call that is not captured, such as a copy into a buffer), "wait" or "end".
        name: the unit; for a wait, the unit that was launched last.
    """

    what: str
    name: str = ""


class Recorder(CaptureDevice):
    """The device of one state; `events` is what all recorders saw since it was last cleared."""

    name = "recorder"
    events: list[Event] = []  # noqa: RUF012  (one list, shared by all states' recorders on purpose)

    def __init__(self) -> None:
        self._queue: list[Callable[[], object]] = []
        self._latest = ""

    def flags(self, count: int) -> Tensor:
        with torch.inference_mode(False):
            return spoil(torch.empty(count))

    def begin(self, buffers: Iterable[Tensor]) -> None:
        self._queue.clear()  # (of a step that failed)
        for tensor in buffers:
            spoil(tensor)

    def run(self, work: Callable[[], object]) -> None:
        self.events.append(Event("run"))
        self._queue.append(work)

    def capture(
        self, unit: Unit, slots: list[Any], flags: Tensor, buffer: Callable[[int, Any], Any]
    ) -> tuple[Callable[[], object], int]:
        self.events.append(Event("capture", unit.name))
        addresses = tuple(_address(slots[i]) for i in unit.reads)
        outputs = {index: slots[index] for index in unit.writes if isinstance(slots[index], Tensor)}
        recording = Recording(unit, slots, flags, addresses, outputs)
        return lambda: self.launch(recording), 0

    def launch(self, recording: Recording) -> None:
        """Replays a capture."""
        unit = recording.unit
        self.events.append(Event("launch", unit.name))
        own: list[Any] = [None] * len(recording.slots)
        for index, address in zip(unit.reads, recording.addresses, strict=True):
            if _address(recording.slots[index]) != address:
                raise StaleReplay(f"{unit.name}: slot {index} has moved since the capture")
            own[index] = recording.slots[index]
        self._latest = unit.name
        self._queue.append(lambda: _replay(recording, own))

    def wait(self) -> None:
        self.events.append(Event("wait", self._latest))
        self._run_queue()

    def end(self) -> None:
        self._run_queue()
        self.events.append(Event("end"))

    def _run_queue(self) -> None:
        while self._queue:
            self._queue.pop(0)()


def _replay(recording: Recording, own: list[Any]) -> None:
    before = {t.untyped_storage().data_ptr() for t in own if isinstance(t, Tensor)}
    recording.unit.run(own, recording.flags)
    copy_into((buffer, own[index]) for index, buffer in recording.outputs.items())
    for tensor in own:
        if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:
            spoil(tensor)


@contextmanager
def recording() -> Iterator[None]:
    """Inside, models on a CPU with ``graphs=True`` are captured by recorders, in all threads."""
    before = DEVICES.get("cpu")
    DEVICES["cpu"] = Recorder
    try:
        yield
    finally:
        del DEVICES["cpu"]
        if before is not None:
            DEVICES["cpu"] = before


def spoil(tensor: Tensor) -> Tensor:
    """Fill a tensor with values that no computation takes for valid; return it."""
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).min)


def _address(value: object) -> object:
    return value.data_ptr() if isinstance(value, Tensor) else value
