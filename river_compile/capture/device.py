"""The interface of devices that capture decode steps, and the log of captures.

A *unit* is what is captured as one graph (:mod:`river_compile.capture.units`). Two devices exist: CUDA graphs
(:mod:`river_compile.capture.cuda`), and tapes of C++ calls on a CPU (:mod:`river_compile.capture.cpu_tape`). Tests
plug in another (:func:`captured_by`).
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from river_compile.capture.units import CaptureUnit
from river_compile.passes.program import Refusal
from river_compile.runtime.runner import Step


class CaptureFailed(RuntimeError):
    """A unit cannot be captured; the message has the device's."""


class CaptureDevice(ABC):
    """Captures units and replays them, in the order given. All calls of one step come from one thread."""

    name: str
    needs_a_run = True  # before a unit is captured: what it returns, and whatever it sets up, is known afterwards

    def obstacle(self, step: Step) -> Refusal | None:
        """Returns why the device cannot capture a step of a capturable graph, None if it can."""
        return None

    @abstractmethod
    def takes_pass(self, dtype: torch.dtype, sequences: int, positions: int) -> bool:
        """Whether a pass of several positions of each sequence is captured."""

    @abstractmethod
    def flags(self, count: int) -> Tensor:
        """Returns ``[count]`` float32 values in host memory that units may write to."""

    @abstractmethod
    def begin(self, buffers: Callable[[], Iterable[Tensor]], flags: Tensor) -> None:
        """Starts a step: the flags and `buffers` of an earlier one mean nothing any more."""

    @abstractmethod
    def run(self, work: Callable[[], object]) -> None:
        """Runs uncaptured work, in order with the replays."""

    @abstractmethod
    def settle(self) -> None:
        """Makes sure that plain calls from here on run after everything launched so far."""

    @abstractmethod
    def capture(
        self, unit: CaptureUnit, slots: list, outputs: dict[int, Tensor], buffer: Callable[[int, Tensor], Tensor]
    ) -> tuple[object, int]:
        """Captures a unit that reads `slots` and writes to a buffer for each slot in `outputs`, without running it.

        Args:
            unit, slots: the unit, and the slots that it reads.
            outputs: the buffers, by slot; a device that needs no run before puts in those that are missing.
            buffer: returns the buffer for a slot and a tensor like its value.

        Returns:
            The graph, and the bytes that it holds beyond the buffers, which lie outside of every graph's memory.

        Raises:
            CaptureFailed: the unit does something that cannot be captured.
        """

    @abstractmethod
    def launch(self, graph: Any, slots: list) -> None:
        """Replays a capture on slots at the same addresses; returns before it has run."""

    def replayer(self, graph: Any, slots: list) -> Callable[[], object]:
        """Returns a function that launches a graph as :meth:`launch` does, in the fewest calls."""
        return functools.partial(self.launch, graph, slots)

    @abstractmethod
    def wait(self) -> None:
        """Waits until everything launched so far has run."""

    @abstractmethod
    def end(self) -> None:
        """Ends a step: work that the caller starts from here on runs after it."""

    def abandon(self) -> None:
        """Ends a step that failed."""
        self.end()


@dataclass(frozen=True)
class CaptureRecord:
    """One capture of the unit with that name, for so many rows."""

    unit: str
    depth: int  # the exit depth: of a span the blocks executed at its end, of a tail those before it
    batch: int
    seconds: float  # time that capturing took
    bytes: int  # device memory that the graph holds beyond the buffers


@dataclass
class CaptureLog:
    """The captures of one traced graph, and the reasons for missing ones. Holds no tensor and no graph."""

    device: str = ""  # the device's name, empty where nothing is captured
    not_captured: str | None = None  # why nothing is captured, None where something may be
    # the newest captures, at most 512; those that were dropped since included
    captures: deque[CaptureRecord] = field(default_factory=lambda: deque(maxlen=512))
    made: int = 0  # made, seconds, bytes: number and sums of all captures
    seconds: float = 0.0
    bytes: int = 0
    alive: int = 0  # captures that are kept at the moment
    dropped: int = 0  # captures that gave way to `max_captures`
    buffer_bytes: int = 0  # bytes of the buffers at the units' borders
    uncaptured_units: dict[str, str] = field(default_factory=dict)  # by name, why they run uncaptured

    def add(self, record: CaptureRecord) -> None:
        """Writes down a capture."""
        self.captures.append(record)
        self.made += 1
        self.seconds += record.seconds
        self.bytes += record.bytes

    def to_dict(self) -> dict[str, object]:
        """Returns the log as values that ``json.dumps`` takes."""
        return vars(self) | {"captures": [vars(capture) for capture in self.captures]}

    def lines(self) -> list[str]:
        """Returns the log for people."""
        if self.not_captured:
            return [f"    not captured {self.not_captured}"]
        if not self.device:
            return []
        dropped = f", {self.dropped} of them dropped (max_captures)" if self.dropped else ""
        lines = [
            f"    captured     {self.made} graphs by {self.device} in {self.seconds:.2f} s, {self.bytes / 1e6:.2f} MB, "
            f"{self.buffer_bytes / 1e3:.1f} kB of buffers{dropped}"
        ]
        return lines + [f"    uncaptured   {unit}: {reason}" for unit, reason in self.uncaptured_units.items()]


class _StandIn:
    """The factory of a test's device, None if there is none."""

    make: Callable[[], CaptureDevice] | None = None


@contextlib.contextmanager
def captured_by(make: Callable[[], CaptureDevice] | None) -> Iterator[None]:
    """Inside, the device of `make` captures for models on a CPU with ``cudagraphs=True``, in all threads: for tests."""
    before, _StandIn.make = _StandIn.make, make
    try:
        yield
    finally:
        _StandIn.make = before


def stand_in(asked: bool | None, device: torch.device) -> CaptureDevice | None:
    """Returns the device of a test, if captures are asked for and there is one."""
    return _StandIn.make() if asked is True and device.type == "cpu" and _StandIn.make is not None else None
