"""Captures units as graphs that one call replays: CUDA graphs on a GPU, tapes of C++ calls on a CPU.

What a tape saves is everything between two kernels: Python, torch's dispatch, and waking the threads, which meet at
barriers instead. Each :class:`StepState` has a device object of its own. The graphs of one share a memory pool: no
value stays in it between two replays, since units exchange values through buffers outside.

Not handled: several GPUs in one step; work that the caller starts on other streams during a step.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.kernels.native.load import few_rows
from river_compile.kernels.native.tape import Tape
from river_compile.kernels.triton.linear import MAX_EXACT_ROWS
from river_compile.lowering.native import CannotRecord, NativeSegment
from river_compile.passes.program import Program, Refusal
from river_compile.runtime.tensor_parallel import NOT_CAPTURED, Ranks
from river_compile.runtime.units import SCORE, Step, Unit

_LOGGED = 512  # captures whose records a log keeps


class CaptureFailed(RuntimeError):
    """A unit cannot be captured; the message has the device's."""


class CaptureDevice(ABC):
    """Captures the units of one state and replays them, in order. All calls of one step come from one thread."""

    name: str
    runs_late = True  # whether a launch returns before it has run
    needs_a_run = True  # before a unit is captured: what it returns, and whatever it sets up, is known afterwards

    @staticmethod
    def obstacle(step: Step) -> Refusal | None:
        """Returns why the device cannot capture a step of a capturable graph, None if it can."""
        return None

    @staticmethod
    def takes(dtype: torch.dtype, sequences: int, positions: int) -> bool:
        """Whether a pass of several positions of each sequence is captured.

        Verifications are as narrow, and come again; the length of a prompt that is wider may not.
        """
        return sequences * positions <= MAX_EXACT_ROWS

    @abstractmethod
    def flags(self, count: int) -> Tensor:
        """Returns ``[count]`` float32 values in host memory that units may write to."""

    @abstractmethod
    def begin(self, buffers: Iterable[Tensor]) -> None:
        """Starts a step: the flags and `buffers` of an earlier one mean nothing any more."""

    def run(self, work: Callable[[], object]) -> None:
        """Runs uncaptured work, in order with the replays."""
        work()

    @abstractmethod
    def capture(
        self, unit: Unit, slots: list[Any], flags: Tensor, buffer: Callable[[int, Any], Any]
    ) -> tuple[Callable[[], object], int]:
        """Captures a unit that reads `slots`, without running it.

        Args:
            unit, slots: the unit, and the slots that it reads. Where it had to run before, those that it writes hold
                its buffers.
            flags: where its score goes.
            buffer: returns the buffer of a slot that the unit writes for a value like this one; of a number, itself.

        Returns:
            What replays it, and the bytes that the graph holds beyond the buffers.

        Raises:
            CaptureFailed: the unit does something that cannot be captured.
        """

    @abstractmethod
    def wait(self) -> None:
        """Waits until everything launched so far has run."""

    @abstractmethod
    def end(self) -> None:
        """Ends a step: work that the caller starts from here on runs after it."""


class Tapes(CaptureDevice):
    """Records calls of the C++ operators, which have run when a replay returns.

    Units in which other code runs stay uncaptured.
    """

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
    """Replays on the caller's current stream of a GPU (under ROCm HIP graphs, which torch reaches by these names)."""

    name = "CUDA graphs"
    _last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None  # of the latest step: its stream and its end

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # (torch's own, for captures without one, belongs to the device of the process's first capture.)
        self._capture_stream = torch.cuda.Stream(device)

    def __del__(self) -> None:
        # The allocator of pinned memory does not know that replays write to the flags.
        if self._last is not None:
            with contextlib.suppress(RuntimeError):  # (of a driver that is gone, or another process's)
                self._last[1].synchronize()

    def flags(self, count: int) -> Tensor:
        with torch.inference_mode(False):
            self._flags = torch.full((count,), float("nan"), pin_memory=True)
        return self._flags

    def begin(self, buffers: Iterable[Tensor]) -> None:
        # (A caller may change streams between two steps: the buffers belong to the step before until it has run.)
        if self._last is not None and self._last[0] != self._stream():
            self._stream().wait_event(self._last[1])

    def capture(
        self, unit: Unit, slots: list[Any], flags: Tensor, buffer: Callable[[int, Any], Any]
    ) -> tuple[Callable[[], object], int]:
        graph, own = torch.cuda.CUDAGraph(), list(slots)
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            # cuBLAS would keep a workspace for the capturing stream in the pool, and with that the pool itself.
            torch._C._cuda_clearCublasWorkspaces()
            free = torch.cuda.mem_get_info()[0]
            try:
                # Another thread may allocate or copy meanwhile: only what this one does must be capturable.
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
    """Returns an uninitialised tensor of the same shape, strides, dtype and device, which any mode may write to.

    Compiled code relies on strides, those of expanded dimensions (0) too.
    """
    with torch.inference_mode(False):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def copy_into(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Copies into the first tensor of each pair the second one, of the same shape; on a GPU those of one dtype by one
    kernel. Pairs of numbers are passed over.

    Of an expanded dimension, the one element that is there is copied. (A copy alone is a memcpy, which takes a captured
    graph's node of its own; several kernels in a line start faster.)
    """
    alike: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for buffer, value in pairs:
        if not isinstance(value, Tensor):
            continue
        if 0 in buffer.stride():
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in buffer.stride())
            buffer, value = buffer[once], value[once]
        targets, sources = alike.setdefault((value.dtype, value.device), ([], []))
        targets.append(buffer)
        sources.append(value)
    for targets, sources in alike.values():
        torch._foreach_copy_(targets, sources)


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
    """The captures of one program, and the reasons for missing ones. Holds no tensor and no graph."""

    device: str = ""  # the device's name, empty where nothing is captured
    not_captured: str | None = None  # why nothing is captured, None where something may be
    captures: deque[CaptureRecord] = field(default_factory=lambda: deque(maxlen=_LOGGED))  # the newest ones
    made: int = 0  # made, seconds, bytes: number and sums of all captures
    seconds: float = 0.0
    bytes: int = 0
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
        lines = [
            f"    captured     {self.made} graphs by {self.device} in {self.seconds:.2f} s, {self.bytes / 1e6:.2f} MB, "
            f"{self.buffer_bytes / 1e3:.1f} kB of buffers"
        ]
        return lines + [f"    uncaptured   {unit}: {reason}" for unit, reason in self.uncaptured_units.items()]


class _StandIn:
    """The devices of a test, None if there are none."""

    kind: type[CaptureDevice] | None = None


@contextlib.contextmanager
def captured_by(kind: type[CaptureDevice] | None) -> Iterator[None]:
    """Inside, these devices capture for models on a CPU with ``cudagraphs=True``, in all threads: for tests."""
    before, _StandIn.kind = _StandIn.kind, kind
    try:
        yield
    finally:
        _StandIn.kind = before


class Capturing(NamedTuple):
    """What captures a program: a class of devices, and what makes one for each state."""

    kind: type[CaptureDevice]
    make: Callable[[], CaptureDevice]


def _stand_in(asked: bool | None, device: torch.device) -> Capturing | None:
    """Returns the devices of a test, if captures are asked for and there is one."""
    kind = _StandIn.kind if asked is True and device.type == "cpu" else None
    return None if kind is None else Capturing(kind, kind)


def check_captures(device: torch.device, config: RiverConfig, native: bool) -> None:
    """Checks, before anything is rewritten, that what is asked for can be.

    Raises:
        OptionError: captures are asked for, and the model does not lie on a device that has them.
    """
    if config.cudagraphs is True and not native and device.type != "cuda" and _stand_in(True, device) is None:
        raise OptionError(
            f"cudagraphs=True needs a model on a GPU or lowering='native', and this one lies on {device}; move it "
            "there, or leave cudagraphs out"
        )


def choose_captures(program: Program, config: RiverConfig, log: CaptureLog, ranks: Ranks) -> Capturing | None:
    """Returns what captures a program's passes of a few tokens; None if nothing does, and the log says why."""
    device = program.device
    found = _stand_in(config.cudagraphs, device)
    if ranks.several:
        log.not_captured = NOT_CAPTURED
    elif config.cudagraphs is False:
        log.not_captured = "cudagraphs=False"
    elif found is None and device.type != "cuda" and not program.native:
        log.not_captured = f"the model lies on {device}; CUDA graphs need a GPU, tapes lowering='native'"
    else:
        log.not_captured = program.not_captured
    if log.not_captured:
        return None
    if found is None and device.type == "cuda":
        found = Capturing(CudaGraphs, functools.partial(CudaGraphs, device))
    found = found or Capturing(Tapes, Tapes)
    log.device = found.kind.name
    return found
