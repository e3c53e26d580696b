"""CUDA graphs without a card: what is asked of `torch.cuda`, by doubles of its streams, events and graphs."""

import contextlib
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from river_compile.runtime.captures import CaptureFailed, CudaGraphs, buffer_like, copy_into

DEVICE = torch.device("cuda", 1)


class FakeEvent:
    made: list

    def __init__(self, enable_timing=False):
        self.timing, self.waited = enable_timing, False
        self.made.append(self)

    def record(self, stream):
        self.stream = stream

    def synchronize(self):
        self.waited = True


class FakeCuda(types.SimpleNamespace):
    """What of torch.cuda is used to capture and to replay; `said` is what it was asked."""

    def __init__(self) -> None:
        super().__init__(said=[])
        self.CUDAGraph = lambda: types.SimpleNamespace(replay=lambda: self.said.append("replay"))
        self.graph_pool_handle = lambda: "pool"
        self.Stream = lambda device: f"stream of {device}"
        self.Event = type("Event", (FakeEvent,), {"made": []})
        self.current_stream = lambda device: f"current stream of {device}"
        self.synchronize = lambda: self.said.append("synchronize")
        self.empty_cache = lambda: self.said.append("empty_cache")
        self.mem_get_info = lambda: (1000 - 10 * self.said.count("captured"), 1000)

    @contextlib.contextmanager
    def device(self, device):
        self.said.append(f"on {device}")
        yield

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, *, capture_error_mode):
        self.said.append((pool, stream, capture_error_mode))
        yield
        self.said.append("captured")


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr("river_compile.runtime.captures.torch.cuda", fake)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: fake.said.append("clear"), raising=False)
    monkeypatch.setattr(torch, "full", lambda size, fill, pin_memory: torch.tensor([fill] * size[0]))
    return fake


def unit(work):
    return types.SimpleNamespace(run=work, writes=())


def test_captures_run_on_a_stream_of_the_models_device(cuda):
    """torch's own stream for captures belongs to the device of the process's first one."""
    device = CudaGraphs(DEVICE)
    replay, size = device.capture(unit(lambda slots, flags: cuda.said.append("run")), [], torch.zeros(1), None)
    assert size == 10
    stream = ("pool", "stream of cuda:1", "thread_local")
    before = ["on cuda:1", "synchronize", "empty_cache", "clear"]
    assert cuda.said == [*before, stream, "run", "captured", "clear"]
    replay()
    assert cuda.said[-1] == "replay"


def test_a_capture_that_fails_says_what_the_driver_said(cuda):
    def fail(slots, flags):
        raise RuntimeError("CUDA error: operation not permitted\nmore lines")

    with pytest.raises(CaptureFailed, match=r"^CUDA error: operation not permitted$"):
        CudaGraphs(DEVICE).capture(unit(fail), [], torch.zeros(1), None)
    assert cuda.said[-1] == "clear"


def test_flags_outlive_the_replays_that_write_them(cuda):
    """The last one is waited for before the device lets go of their memory."""
    device = CudaGraphs(DEVICE)
    flags = device.flags(3)
    assert device._flags is flags
    device.end()
    *_, event = cuda.Event.made
    assert not event.timing  # one with a time takes longer to record, and its time is not used
    assert not event.waited
    del device
    assert event.waited


def test_a_step_on_another_stream_waits_for_the_one_before(cuda, monkeypatch):
    device, waited = CudaGraphs(DEVICE), []
    device.end()
    monkeypatch.setattr(cuda, "current_stream", lambda device: types.SimpleNamespace(wait_event=waited.append))
    device.begin([])
    assert waited == [cuda.Event.made[-1]]


class Copies(TorchDispatchMode):
    """Counts the operations that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "copy" in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_values_of_one_dtype_are_copied_by_one_operation():
    """Strided, expanded and 0-dim ones too; each reaches its own buffer."""
    values = [
        torch.randn(2, 3),
        torch.randn(4, 1).expand(4, 5),
        torch.arange(3),
        torch.tensor(7),
        torch.randn(3, 2).T,
        torch.tensor([True, False]),
    ]
    buffers = [buffer_like(value) for value in values]
    with Copies() as copies:
        copy_into(zip(buffers, values, strict=True))
    assert copies.names == ["aten::_foreach_copy_"] * 3  # float32, int64, bool
    for buffer, value in zip(buffers, values, strict=True):
        assert torch.equal(buffer, value)
        assert buffer.stride() == value.stride()
