"""The same checks on a real GPU at model shapes, and graph capture of every operator. Skipped where there is none."""

import dataclasses

import pytest
import torch

from river_compile.kernels.tools.shapes import MODELS, model_kernels
from river_compile.kernels.triton.devices import device_name
from river_compile.kernels.triton.kv_fill import KvFillSpec
from river_compile.kernels.triton.linear import LinearSpec
from tests.kernels.checks import check_attention, check_exit_score, check_kv_fill, check_linear, check_nan_never_exits
from tests.kernels.test_ops import sample_calls

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")]


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("model", ["smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"])
def test_numerics_at_model_shapes(model, rows):
    kernels = model_kernels(MODELS[model], rows=rows, device=device_name(0))
    score = kernels.pop("exit score")
    del kernels["norm + head"]
    for spec in kernels.values():
        if isinstance(spec, LinearSpec):
            check_linear(spec, rows, device="cuda")
        elif isinstance(spec, KvFillSpec):
            check_kv_fill(spec, 700, device="cuda")
        else:
            check_attention(dataclasses.replace(spec, mask=False), device="cuda")
            check_attention(spec, padding=500, device="cuda")
    check_exit_score(score, 1.0, device="cuda")
    check_nan_never_exits(score, rows - 1, device="cuda")


@pytest.mark.parametrize("call", [call for call in sample_calls() if "plain" not in call])
def test_graph_capture(call):
    operator = getattr(torch.ops.river, call.split()[0])
    arguments = [a.cuda() if isinstance(a, torch.Tensor) else a for a in sample_calls()[call]]
    expected = operator(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (captured, expected)), strict=True):
        assert torch.equal(one, other)
