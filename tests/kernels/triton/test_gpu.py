"""The same checks on a GPU at model shapes, and graph capture of every operator.

Tests without the mark `gpu` run the others' code here: a tiny model's kernels in the interpreter, and captured calls
under a mode that forbids device synchronization.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch._library.custom_ops import CustomOpDef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from river_compile.kernels import cache_ops, ops
from river_compile.kernels.triton import loader, operators  # noqa: F401  (registers the kernels)
from river_compile.kernels.triton.loader import device_name
from river_compile.kernels.triton.spec import DEFAULT_DEVICE, KernelSpec
from tests.kernels.checks import check_kernel
from tests.kernels.samples import sample_calls
from tools.kernels.shapes import MODELS, ModelShape, backbone_kernels, model_kernels, verifying_kernels

SHAPES = ("smollm2-135m", "llama-3.2-1b", "llama-3.1-8b", "qwen3-30b-a3b")
TINY = ModelShape("tiny", 1, 64, 4, 2, 32, 96, 160, qkv_bias=True, qk_norm=True)
TINY_EXPERTS = dataclasses.replace(TINY, name="tiny experts", experts=3, chosen=2)
SLOTS = 1024


def kernels_of(shape: ModelShape, **how: Any) -> dict[str, KernelSpec]:
    """Returns the kernels of an early-exit token, and those of the unquantized model for any number of rows."""
    kernels = model_kernels(shape, group_size=32, **how)
    kernels |= verifying_kernels(kernels["rope + kv write + attention"])
    if not shape.experts:
        how = {name: value for name, value in how.items() if name != "context"}
        kernels |= {f"backbone {name}": spec for name, spec in backbone_kernels(shape, "dense", **how).items()}
    return kernels


def names_of(shape: ModelShape) -> list[str]:
    return list(kernels_of(shape))


def kernel_of(shape: ModelShape, name: str, rows: int, slots: int, device: str) -> KernelSpec:
    return kernels_of(shape, rows=rows, context=slots, device=device)[name]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize(("model", "kernel"), [(m, name) for m in SHAPES for name in names_of(MODELS[m])])
def test_numerics_at_model_shapes(model, kernel, rows):
    """One test for each kernel, so that a failure hides no other."""
    check_kernel(kernel_of(MODELS[model], kernel, rows, SLOTS, device_name(0)), rows, SLOTS, "cuda")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("shape", "kernel"), [(s, name) for s in (TINY, TINY_EXPERTS) for name in names_of(s)])
def test_the_same_checks_pass_in_the_interpreter(shape, kernel, rows):
    check_kernel(kernel_of(shape, kernel, rows, 40, DEFAULT_DEVICE), rows, 40, "cpu")


ON_CPUS = ("mixture", "route")  # operators that passes choose for the C++ kernels alone


def captured_calls() -> list[str]:
    """Names the sample calls of a GPU's operators with weights in its layout."""
    elsewhere = (*ON_CPUS, "experts 16 bits")
    return [call for call in sample_calls() if not call.startswith(elsewhere) and not call.endswith("plain")]


@pytest.mark.gpu
@pytest.mark.parametrize("call", captured_calls())
def test_graph_capture(call):
    operator = getattr(torch.ops.river, call.split()[0])
    arguments = tree_map_only(torch.Tensor, torch.Tensor.cuda, sample_calls()[call])  # some are lists of weights
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    expected = operator(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(*arguments)
    for argument, value in zip(arguments, before, strict=True):  # counters restart
        if isinstance(argument, torch.Tensor):
            argument.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (captured, expected)), strict=True):
        assert torch.equal(one, other)


class NoWaiting(TorchFunctionMode):
    """Forbids reading a value or a size back from the device, as captures do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in ("item", "tolist", "__int__", "__float__", "__bool__", "__index__", "cpu", "nonzero"), name
        return func(*args, **(kwargs or {}))


def body_of(operator: str):
    """Returns the function that a custom operator runs, whose operations a mode sees."""
    defined = (value for module in (ops, cache_ops) for value in vars(module).values())
    (found,) = (one for one in defined if isinstance(one, CustomOpDef) and one._name == operator)
    return found._backend_fns.get("cpu", found._init_fn)


@pytest.mark.parametrize("call", captured_calls())
def test_what_is_captured_reads_nothing_back(call, monkeypatch):
    monkeypatch.setattr(loader.Kernel, "__call__", lambda self, **buffers: None)  # (launches read nothing on a GPU)
    arguments = sample_calls()[call]
    with NoWaiting():
        body_of(call.split()[0])(*arguments)


def test_every_operator_of_a_gpu_is_captured():
    assert {call.split()[0] for call in captured_calls()} == {call.split()[0] for call in sample_calls()} - {*ON_CPUS}
