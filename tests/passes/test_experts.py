"""Matmuls with stacked experts of every spelling become one operator that computes the same."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.layouts import pack_stack
from river_compile.passes.edits import add_placeholders
from river_compile.passes.experts import as_expert_matmul, replace_expert_matmul
from river_compile.passes.normalize import normalized
from tests.support.examples import examples

EXPERTS, N, K = 5, 16, 64
SWAPPED = "gathered right swapped", "gathered left", "grouped swapped", "batched swapped"  # [E, N, K] as it is stored
SPELLINGS = (*SWAPPED, "gathered right", "gathered left swapped", "grouped", "batched", "gathered before a swap")


def matmul(spelling, x, weight, route):
    """Multiplies rows ``[M, K]`` in a model's spelling; returns ``[M, N]``."""
    swapped = weight.transpose(-2, -1) if "swap" in spelling else weight
    if spelling == "gathered before a swap":
        return torch.bmm(x.unsqueeze(1), weight[route].transpose(1, 2)).squeeze(1)
    if spelling.startswith("gathered right"):
        return torch.matmul(x.unsqueeze(1), swapped[route]).squeeze(1)
    if spelling.startswith("gathered left"):
        return swapped[route].bmm(x.unsqueeze(-1)).squeeze(-1)
    if spelling.startswith("grouped"):
        return torch._grouped_mm(x, swapped, offs=route)
    return torch.bmm(x.view(EXPERTS, -1, K), swapped).view(-1, N)


def traced(spelling, x, weight, route):
    """Returns the matmul's graph in the normal form, with examples on every node."""
    graph_module = fx.symbolic_trace(lambda x, weight, route: matmul(spelling, x, weight, route))
    values = iter((x, weight, route))

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            node.meta["example_value"] = next(values) if node.op == "placeholder" else super().run_node(node)
            return node.meta["example_value"]

    Recorder(graph_module).run(x, weight, route)
    holder = list(graph_module.graph.nodes)[1]
    holder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return normalized(graph_module)


@given(st.sampled_from(SPELLINGS), st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=17), st.integers(0, 999))
@examples(60)
def test_every_spelling_becomes_one_operator_of_the_same_result(spelling, chosen, seed):
    """Some experts get no row, some several; batched experts get rows of zeros if not chosen."""
    g = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if "grouped" in spelling else torch.float32
    grid = quantize(torch.randn(EXPERTS * N, K, generator=g), 32, "rtn").rounded(torch.bfloat16)
    exact = grid.dequantize().view(EXPERTS, N, K)
    weight = exact if (spelling in SWAPPED or spelling == "gathered before a swap") else exact.mT.contiguous()
    x, route = torch.randn(len(chosen), K, generator=g).to(dtype), torch.tensor(chosen)
    if "grouped" in spelling:
        route = route.bincount(minlength=EXPERTS).cumsum(0).int()
    if "batched" in spelling:
        mine = torch.arange(EXPERTS)[:, None] == route
        x = (mine[..., None] * x).view(-1, K)
    graph_module = traced(spelling, x, weight.to(dtype), route)
    graph = graph_module.graph
    (found,) = filter(None, map(as_expert_matmul, graph.nodes))
    assert (found.shape, found.transposed) == ((EXPERTS, N, K), weight is not exact)
    site = found.matmul({n: number for number, n in enumerate(graph.nodes)}, 32, "plain")
    assert (site.in_features, site.out_features, site.group_size, site.experts) == (K, (EXPERTS * N,), 32, EXPERTS)
    operands = add_placeholders(graph, ["qweight", "scale_zero"])
    replace_expert_matmul(graph, found, *operands, site.group_size, site.layout)
    graph.lint()
    graph_module.recompile()
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.river.experts.default) == 1
    assert not {torch.bmm, operator.matmul, torch._grouped_mm} & {*targets}
    stack = pack_stack(grid, "plain", EXPERTS)
    stack.scale_zero[[e for e in range(EXPERTS) if e not in chosen]] = float("nan")  # what is not chosen is not read
    found_y = graph_module(x, weight, route, stack.qweight, stack.scale_zero)
    if "batched" in spelling:
        found_y = found_y.view(EXPERTS, -1, N)
        expected = torch.einsum("emk,enk->emn", x.view(EXPERTS, -1, K).double(), exact.double())
    else:
        order = sorted(chosen) if "grouped" in spelling else chosen
        expected = torch.einsum("mk,mnk->mn", x.double(), exact[order].double())
    tolerance = 0.1 if dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(found_y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight, route: torch.bmm(x.view(1, -1, K).expand(EXPERTS, -1, K), weight * 2),  # no parameter
        lambda x, weight, route: torch.bmm(weight[route], x.view(-1, K, 2)),  # two rows for one lookup
        lambda x, weight, route: torch.bmm(x.view(2, 1, K), weight[route > 0]),  # a mask, not a choice
        lambda x, weight, route: x @ weight[0],  # one expert, always the same
    ],
)
def test_what_is_no_choice_of_a_stack(function):
    x, weight, route = torch.randn(2, K), torch.randn(EXPERTS, K, K), torch.tensor([1, 1, 0, 0, 0])
    graph_module = fx.symbolic_trace(function)
    for node, value in zip(graph_module.graph.nodes, (x, weight, route), strict=False):
        node.meta["example_value"] = value
    list(graph_module.graph.nodes)[1].meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    for node in graph_module.graph.nodes:
        node.meta.setdefault("example_value", torch.empty(2, K, K))
    assert not list(filter(None, map(as_expert_matmul, normalized(graph_module).graph.nodes)))
