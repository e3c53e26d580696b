"""Captures with CUDA graphs (HIP graphs under ROCm, which torch reaches by the same names).

All graphs of one device object share a memory pool. They may, although they are replayed in another order than
they were captured in, because no value stays in the pool between two replays: units exchange values through buffers
outside.

Not handled: several devices in one step; work that the caller starts on other streams during a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from river_compile.capture.device import CaptureDevice, CaptureFailed
from river_compile.capture.units import CaptureUnit
from river_compile.kernels.triton.linear import MAX_EXACT_ROWS


class CudaGraphs(CaptureDevice):
    """The device that replays on the caller's current stream of the model's device."""

    name = "CUDA graphs"
    _last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None  # of the latest step: its stream and its end

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # (torch's own, for captures without one, belongs to the device of the process's first capture.)
        self._capture_stream = torch.cuda.Stream(device)
        self._flags: list[Tensor] = []

    def __del__(self) -> None:
        # The allocator of pinned memory does not know that replays write to the flags.
        if self._last is not None:
            with contextlib.suppress(RuntimeError):  # (of a driver that is gone, or another process's)
                self._last[1].synchronize()

    def takes_pass(self, dtype: torch.dtype, sequences: int, positions: int) -> bool:
        """Verifications are as narrow, and come again; the length of a prompt that is wider may not."""
        return sequences * positions <= MAX_EXACT_ROWS

    def flags(self, count: int) -> Tensor:
        with torch.inference_mode(False):
            self._flags.append(torch.full((count,), float("nan"), pin_memory=True))
        return self._flags[-1]

    def begin(self, buffers: Callable[[], Iterable[Tensor]], flags: Tensor) -> None:
        # Two threads may decode on two streams: the buffers belong to the step before until it has run.
        if self._last is not None and self._last[0] != self._stream():
            self._stream().wait_event(self._last[1])

    def run(self, work: Callable[[], object]) -> None:
        work()

    def settle(self) -> None:
        """Does nothing: plain calls go to the stream that replays go to."""

    def capture(
        self, unit: CaptureUnit, slots: list, outputs: dict[int, Tensor], buffer: Callable[[int, Tensor], Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, int]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            # cuBLAS would keep a workspace for the capturing stream in the pool, and with that the pool itself.
            torch._C._cuda_clearCublasWorkspaces()
            free = torch.cuda.mem_get_info()[0]
            try:
                # Another thread may allocate or copy meanwhile: only what this one does must be capturable.
                with torch.cuda.graph(graph, self._pool, self._capture_stream, capture_error_mode="thread_local"):
                    unit.run_into(list(slots), outputs)
            except RuntimeError as error:
                raise CaptureFailed(str(error).partition("\n")[0]) from error
            finally:
                torch._C._cuda_clearCublasWorkspaces()
            return graph, max(free - torch.cuda.mem_get_info()[0], 0)

    def launch(self, graph: torch.cuda.CUDAGraph, slots: list) -> None:
        graph.replay()

    def wait(self) -> None:
        self._stream().synchronize()

    def end(self) -> None:
        event = torch.cuda.Event()
        event.record(self._stream())
        self._last = (self._stream(), event)

    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)
