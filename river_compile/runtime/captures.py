"""Capture units as graphs that one call replays: CUDA graphs on a GPU, tapes of C++ calls on a CPU.

Not handled: several GPUs in one step; work that the caller starts on other streams during a step.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.kernels import MAX_EXACT_ROWS
from river_compile.kernels.native.load import Tape, few_rows
from river_compile.lowering.native import CannotRecord, NativeSegment
from river_compile.passes.program import Program, Refusal
from river_compile.runtime.units import SCORE, Step, Unit

_LOGGED = 512  # capture records that a log keeps


class CaptureFailed(RuntimeError):
    """A unit cannot be captured; the message is the device's."""


class CaptureDevice(ABC):
    """Captures and replays the units of one state, in order. Each step stays in one thread."""

    name: str
    runs_late = True  # whether a launch returns before it has run
    needs_a_run = True  # whether a unit must run before its capture: then its outputs are known and libraries set up

    @staticmethod
    def obstacle(step: Step) -> Refusal | None:
        """Return why the device cannot capture a capturable segment's step; None if it can."""
        return None

    @staticmethod
    def takes(dtype: torch.dtype, sequences: int, positions: int) -> bool:
        """Whether to capture a pass of `positions` tokens of each of `sequences` rows."""
        # Verifying passes are as narrow and repeat; the length of a wider prompt may not.
        return sequences * positions <= MAX_EXACT_ROWS

    @abstractmethod
    def flags(self, count: int) -> Tensor:
        """Return ``[count]`` float32 values in host memory that units may write to."""

    @abstractmethod
    def begin(self, buffers: Iterable[Tensor]) -> None:
        """Start a step: the flags and `buffers` of an earlier one are free for reuse."""

    def run(self, work: Callable[[], object]) -> None:
        """Run uncaptured work, in order with the replays."""
        work()

    @abstractmethod
    def capture(
        self, unit: Unit, slots: list[Any], flags: Tensor, buffer: Callable[[int, Any], Any]
    ) -> tuple[Callable[[], object], int]:
        """Capture a unit without running it; return its replay and the graph's bytes beyond the buffers."""
        # `slots` holds the values that the unit reads and, after a first run, its output buffers; `flags` receives its
        # score; `buffer(slot, value)` returns the output buffer of a slot (a number: itself). Raises CaptureFailed.

    @abstractmethod
    def wait(self) -> None:
        """Wait for everything launched so far."""

    @abstractmethod
    def end(self) -> None:
        """End a step: work that the caller starts afterwards runs after it."""


# A tape saves all the time between two kernels: Python, torch's dispatch and waking the threads, which meet at
# barriers instead.
class Tapes(CaptureDevice):
    """Records calls of the C++ operators; a replay returns after they have run."""

    name = "tapes of C++ calls"
    runs_late = needs_a_run = False

    @staticmethod
    def obstacle(step: Step) -> Refusal | None:
        if isinstance(step.callee, NativeSegment):
            return None
        return Refusal("it is not made of C++ kernels alone", step.segment.name)

    @staticmethod
    def takes(dtype: torch.dtype, sequences: int, positions: int) -> bool:
        return sequences * positions <= few_rows(dtype, positions)

    def flags(self, count: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.full((count,), float("nan"))

    def begin(self, buffers: Iterable[Tensor]) -> None:
        pass

    def wait(self) -> None:
        pass

    def end(self) -> None:
        pass

    def capture(
        self, unit: Unit, slots: list[Any], flags: Tensor, buffer: Callable[[int, Any], Any]
    ) -> tuple[Callable[[], object], int]:
        tape, own = Tape(), list(slots)
        try:
            with tape.recording():
                for step in unit.steps:
                    assert isinstance(step.callee, NativeSegment), "units with other code have an obstacle"
                    step.run_as(functools.partial(step.callee.record, tape=tape), own)
                if unit.flag is not None:
                    torch.ops.river_native.copy(own[SCORE], flags[unit.flag])
                for index in unit.writes:
                    kept = buffer(index, own[index])
                    if isinstance(kept, Tensor):
                        torch.ops.river_native.copy(own[index], kept)
        except (CannotRecord, RuntimeError) as error:
            raise CaptureFailed(str(error).partition("\n")[0]) from error
        return tape.replay, tape.bytes


class CudaGraphs(CaptureDevice):
    """Replays on the caller's current CUDA stream; under ROCm, torch maps these calls to HIP graphs."""

    name = "CUDA graphs"
    _last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None  # stream and end of the latest step

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # A state's graphs share a pool: units exchange values through buffers outside of it, so nothing stays in it
        # between two replays.
        self._pool = torch.cuda.graph_pool_handle()
        # torch's default capture stream belongs to the device of the process's first capture.
        self._capture_stream = torch.cuda.Stream(device)

    def __del__(self) -> None:
        # The pinned-memory allocator does not know that replays write to the flags.
        if self._last is not None:
            with contextlib.suppress(RuntimeError):  # the driver is gone, or this is a forked process
                self._last[1].synchronize()

    def flags(self, count: int) -> Tensor:
        with torch.inference_mode(False):
            self._flags = torch.full((count,), float("nan"), pin_memory=True)
        return self._flags

    def begin(self, buffers: Iterable[Tensor]) -> None:
        # The caller may have changed streams since the last step, which uses the buffers until it has run.
        if self._last is not None and self._last[0] != self._stream():
            self._stream().wait_event(self._last[1])

    def capture(
        self, unit: Unit, slots: list[Any], flags: Tensor, buffer: Callable[[int, Any], Any]
    ) -> tuple[Callable[[], object], int]:
        graph, own = torch.cuda.CUDAGraph(), list(slots)
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            # cuBLAS would keep a workspace for the capture stream in the pool, and so keep the pool alive.
            torch._C._cuda_clearCublasWorkspaces()
            free = torch.cuda.mem_get_info()[0]
            try:
                # Other threads may allocate or copy meanwhile; only this thread's work must be capturable.
                with torch.cuda.graph(graph, self._pool, self._capture_stream, capture_error_mode="thread_local"):
                    unit.run(own, flags)
                    copy_into((slots[index], own[index]) for index in unit.writes)
            except RuntimeError as error:
                raise CaptureFailed(str(error).partition("\n")[0]) from error
            finally:
                torch._C._cuda_clearCublasWorkspaces()
            return graph.replay, max(free - torch.cuda.mem_get_info()[0], 0)

    def wait(self) -> None:
        self._stream().synchronize()

    def end(self) -> None:
        event = torch.cuda.Event()
        event.record(self._stream())
        self._last = (self._stream(), event)

    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)


def buffer_like(value: Tensor) -> Tensor:
    """Return an uninitialised tensor of this shape, strides, dtype and device, writable in any mode."""
    # Compiled code relies on strides, also on those of expanded dimensions (0).
    with torch.inference_mode(False):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def copy_into(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Copy the second tensor of each pair into the first; skip pairs of numbers."""
    # One kernel for each dtype: a single copy would be a memcpy node of a captured graph, and kernels in a row start
    # faster.
    alike: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for buffer, value in pairs:
        if not isinstance(value, Tensor):
            continue
        if 0 in buffer.stride():  # copy the one element of an expanded dimension
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in buffer.stride())
            buffer, value = buffer[once], value[once]
        targets, sources = alike.setdefault((value.dtype, value.device), ([], []))
        targets.append(buffer)
        sources.append(value)
    for targets, sources in alike.values():
        torch._foreach_copy_(targets, sources)


@dataclass(frozen=True)
class CaptureRecord:
    """One capture."""

    unit: str  # its name
    depth: int  # as `Unit.depth`
    batch: int  # rows
    seconds: float  # time of the capture
    bytes: int  # device memory of the graph beyond the buffers


@dataclass
class CaptureLog:
    """The captures of one program, and reasons for missing ones. Holds no tensor and no graph."""

    device: str = ""  # its name, empty if nothing is captured
    not_captured: str | None = None  # why nothing is captured, None if something may be
    captures: deque[CaptureRecord] = field(default_factory=lambda: deque(maxlen=_LOGGED))  # the newest ones
    made: int = 0  # number of all captures; `seconds` and `bytes` are their sums
    seconds: float = 0.0
    bytes: int = 0
    buffer_bytes: int = 0  # of the buffers between units
    uncaptured_units: dict[str, str] = field(default_factory=dict)  # by name, why they run uncaptured

    def add(self, record: CaptureRecord) -> None:
        self.captures.append(record)
        self.made += 1
        self.seconds += record.seconds
        self.bytes += record.bytes

    def to_dict(self) -> dict[str, object]:
        """Return the log as values that ``json.dumps`` takes."""
        return vars(self) | {"captures": [vars(capture) for capture in self.captures]}

    def lines(self) -> list[str]:
        """Return the log as lines of the report."""
        if self.not_captured:
            return [f"    not captured {self.not_captured}"]
        if not self.device:
            return []
        lines = [
            f"    captured     {self.made} graphs by {self.device} in {self.seconds:.2f} s, {self.bytes / 1e6:.2f} MB, "
            f"{self.buffer_bytes / 1e3:.1f} kB of buffers"
        ]
        return lines + [f"    uncaptured   {unit}: {reason}" for unit, reason in self.uncaptured_units.items()]


# What captures on a device of a type, where CUDA graphs or `graphs=True` are asked for; tapes need neither.
DEVICES: dict[str, type[CaptureDevice]] = {"cuda": CudaGraphs}


class Capturing(NamedTuple):
    """A class of capture devices, and a function that makes one for a state."""

    kind: type[CaptureDevice]
    make: Callable[[], CaptureDevice]


def check_captures(device: torch.device, config: RiverConfig, native: bool) -> None:
    """Raise an OptionError if captures are requested on a device without them."""
    if config.graphs is True and not native and device.type not in DEVICES:
        raise OptionError(
            f"graphs=True requires a model on a GPU or kernels='native', got a model on {device}. Move the model, or "
            "remove graphs",
            id="RC004",
        )


def choose_captures(program: Program, config: RiverConfig, log: CaptureLog, why_not: str = "") -> Capturing | None:
    """Return the capture devices for a program's narrow passes; None, with the reason logged, if none.

    `why_not`: why none may capture steps of this model; empty if one may.
    """
    device = program.device
    kind = DEVICES.get(device.type) if device.type == "cuda" or config.graphs is True else None
    if why_not:
        log.not_captured = why_not
    elif config.graphs is False:
        log.not_captured = "graphs=False"
    elif kind is None and not program.native:
        log.not_captured = f"the model lies on {device}; CUDA graphs need a GPU, tapes kernels='native'"
    else:
        log.not_captured = program.not_captured
    if log.not_captured:
        return None
    kind = kind or Tapes
    log.device = kind.name
    return Capturing(kind, functools.partial(kind, device) if kind is CudaGraphs else kind)
