"""Routers differ from other matmuls by the users of their result; twins/test_experts.py has those of whole models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from river_compile.passes.experts import is_router
from river_compile.passes.nodes import as_linear
from river_compile.passes.normalize import normalized

D, EXPERTS = 8, 4


def a_router_of_two_layers(x, w1, w2):
    """Only the second layer's result chooses directly."""
    return F.linear(F.silu(F.linear(x, w2)), w1).topk(1)[1]


def a_maximum(x, w1, w2):
    """PhiMoE."""
    return F.linear(x, w1).max(dim=-1, keepdim=True)[1] + F.linear(x, w2).max()


def attention_before_a_router_that_is_none(x, w1, w2):
    """A router with a cast weight is not a linear layer of a parameter; linears before it are no routers."""
    return F.linear(F.linear(x, w2).relu(), w1.double().float()).topk(2)[1]


@pytest.mark.parametrize(
    ("function", "routers"),
    [
        (a_router_of_two_layers, {"w1"}),
        (a_maximum, {"w1"}),
        (attention_before_a_router_that_is_none, set()),
    ],
)
def test_the_matmul_whose_result_chooses(function, routers):
    graph_module = fx.symbolic_trace(function)
    values = {"x": torch.randn(3, D), "w1": torch.randn(EXPERTS, D), "w2": torch.randn(D, D)}

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            node.meta["example_value"] = values[node.name] if node.op == "placeholder" else super().run_node(node)
            return node.meta["example_value"]

    if function is a_maximum:
        values["w2"] = torch.randn(1, D)
    Recorder(graph_module).run(*values.values())
    for weight in list(graph_module.graph.nodes)[1:3]:
        weight.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    linears = list(filter(None, map(as_linear, normalized(graph_module).graph.nodes)))
    assert {linear.weight.name for linear in linears if is_router(linear.node)} == routers
    assert "w2" in {linear.weight.name for linear in linears}
