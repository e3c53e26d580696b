"""From tensors to a kernel: the launch cache, its keys, and devices."""

import types

import pytest
import torch

from river_compile.kernels.triton import calls_cache, calls_linear, loader, operators  # noqa: F401  (registers kernels)
from river_compile.kernels.triton.cache import DecodeAttentionSpec, ExitScoreSpec
from river_compile.kernels.triton.spec import KernelSpec
from tests.kernels.packing import pack_linear
from tests.support import launches
from tools.kernels.shapes import ModelShape

TINY = ModelShape("tiny", 1, 64, 2, 1, 32, 128, 96)


@pytest.fixture
def described(monkeypatch):
    """A list of the described kernels; nothing is launched, and the cache is empty."""
    found: list[KernelSpec] = []
    monkeypatch.setattr(calls_linear, "best_tile", lambda spec, *_: (found.append(spec), spec)[1])
    with launches.no_launches():
        monkeypatch.setattr(calls_linear, "interpreter_tile", lambda spec: calls_linear.best_tile(spec))
        for module, name in ((calls_cache, "DecodeAttentionSpec"), (calls_linear, "ExitScoreSpec")):
            spec = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, s=spec, **k: (found.append(s), s(*a, **k))[1])
        yield found


def test_only_the_first_of_calls_that_look_alike_is_described(described):
    """Later calls build, hash and check no spec, and read no tuning file."""
    calls = launches.calls(TINY)
    for call in calls.values():
        call()
    assert len(described) == len(calls)
    for call in (*calls.values(), *calls.values()):
        call()
    assert len(described) == len(calls)


def linear(x, packed, bias=None, **how):
    n = packed.out_features
    return torch.ops.river.linear(x, packed.qweight, packed.scale_zero, bias, n, packed.group_size, "triton", **how)


def test_whatever_a_kernel_depends_on_is_told_apart(described):
    packed, other = (pack_linear(torch.randn(32, 64), group, "triton", "rtn") for group in (32, 64))
    x, bias = torch.randn(2, 64), torch.randn(32)
    wide = torch.randn(2, 128)[:, :64]
    different = [
        lambda: linear(x, packed),
        lambda: linear(x, other),
        lambda: linear(x[:1], packed),
        lambda: linear(wide, packed),
        lambda: linear(x.bfloat16(), packed),
        lambda: linear(x, packed, bias),
        lambda: linear(x, packed, residual=torch.randn(2, 32)),
        lambda: linear(x, packed, activation="silu"),
        lambda: linear(x, packed, activation="silu", gated=True),
        lambda: linear(x, packed, norm="rms", norm_weight=torch.ones(64)),
        lambda: linear(x, packed, norm="rms", norm_weight=torch.ones(64), eps=1e-3),
    ]
    for number, call in enumerate(different, 1):
        call()
        assert len(described) == number
    assert len({repr(spec) for spec in described}) == len(different)


def test_a_wrong_tensor_is_refused_after_right_ones():
    packed, x = pack_linear(torch.randn(32, 64), 32, "triton", "rtn"), torch.randn(1, 64)
    linear(x, packed, torch.randn(32))
    for wrong, message in ((torch.randn(31), "bias has shape"), (torch.randn(32).double(), "bias has dtype")):
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                linear(x, packed, wrong)


def test_counters_belong_to_a_cache(monkeypatch):
    """Equal for calls on one cache; a capture without an earlier run gets its own each time."""
    spec = DecodeAttentionSpec(2, 2, 1, 16, 64, 1.0, dtype="float32", splits=2)
    shape = spec.buffers()["arrived"].shape
    first, second = torch.zeros(2, 2, 1, 64, 16)
    counters = loader.kept_zeros(first, shape)
    assert counters.shape == (3,)
    assert counters.dtype == torch.int32
    assert loader.kept_zeros(first.view(2, 64, 16), shape) is counters
    assert loader.kept_zeros(second, shape) is not counters
    q, seen = torch.zeros(2, 2, 16), []
    monkeypatch.setattr(loader, "kept_zeros", lambda owner, shape: (seen.append(owner), counters)[1])
    loader.load(spec, interpret=True)(q=q, k_cache=first, v_cache=second, out=q.clone())
    assert seen[0] is first
    assert not counters.any()
    monkeypatch.undo()
    captured = types.SimpleNamespace(is_cuda=True, device="cpu", data_ptr=lambda: -1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert loader.kept_zeros(captured, shape) is not loader.kept_zeros(captured, shape)


def test_prompts_of_all_lengths_do_not_fill_the_memory(described, monkeypatch):
    monkeypatch.setattr(loader, "_MAX_LAUNCHES", 3)
    for length in range(1, 9):
        torch.ops.river.residual_score(*torch.randn(3, length, 16))
        assert len(loader._launches) <= 3


@pytest.mark.parametrize(("current", "entered"), [(0, [1]), (1, [])])
def test_a_kernel_is_launched_where_its_tensors_lie(current, entered, monkeypatch):
    """With two fake GPUs; Triton launches to the current device."""
    spec, seen = ExitScoreSpec(1, 16, "float32"), []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            seen.append(self.index)

        def __exit__(self, *_):
            pass

    class Function:
        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append("launch")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    kernel = loader.Kernel(spec, spec.stages(), {"exit_score": Function()}, interpret=False)
    tensor = types.SimpleNamespace(get_device=lambda: 1)
    kernel.launch(1)(dict.fromkeys(spec.buffers(), tensor))
    assert seen == [*entered, "launch"]
