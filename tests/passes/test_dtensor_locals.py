"""Hand-made graphs of tensor parallelism: spellings that transformers does not use, and nodes that must stay.

tests/runtime/test_tensor_parallel.py runs traced ones.
"""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from river_compile.passes.dtensor_locals import on_local_shards
from river_compile.passes.nodes import value_of

SUM = torch.ops._c10d_functional.all_reduce.default
WAIT = torch.ops._c10d_functional.wait_tensor.default
ALIAS = torch.ops.aten.alias.default


class Traced:
    """A graph of ordinary tensors; its weight has 16 features, 8 of them on this rank."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x = _noted(self.graph.placeholder("x"), 1, 1, 8)
        self.weight = _noted(self.graph.placeholder("weight"), 4, 16)
        self.weight.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        value_of(self.weight).device_mesh = "of two ranks"

    def local(self) -> fx.Node:
        return _noted(self.graph.call_method("to_local", (self.weight,)), 4, 8)

    def call(self, function, *args, shape=(1, 1, 4)) -> fx.Node:
        return _noted(self.graph.call_function(function, args), *shape)

    def done(self, *outputs: fx.Node) -> tuple[bool, list]:
        """Returns whether the weight is the local shard now, and the targets of the graph's calls."""
        self.graph.output(outputs)
        local = on_local_shards(fx.GraphModule(torch.nn.Module(), self.graph), 2, "0")
        self.graph.lint()
        return self.weight in local, [node.target for node in self.graph.nodes if node.op.startswith("call")]


def _noted(node: fx.Node, *shape: int) -> fx.Node:
    node.meta["example_value"] = torch.zeros(shape)
    return node


@pytest.mark.parametrize("aliases", [(), (Tensor.detach,), (ALIAS, Tensor.detach)])
def test_a_shard_is_the_graphs_input(aliases):
    """Also through aliases of the same memory and shape."""
    traced = Traced()
    weight = traced.local()
    for alias in aliases:
        weight = traced.call(alias, weight, shape=(4, 8))
    assert traced.done(traced.call(F.linear, traced.x, weight, None)) == (True, [F.linear])
    assert value_of(traced.weight).shape == (4, 8)


def test_a_view_in_another_shape_stays():
    traced = Traced()
    view = traced.call(torch.reshape, traced.local(), (8, 4), shape=(8, 4))
    assert traced.done(view) == (True, [torch.reshape])


def test_a_parameter_that_is_also_read_whole_stays():
    """An embedding that looks up rows reads all ranks."""
    traced = Traced()
    matmul = traced.call(F.linear, traced.x, traced.local(), None)
    table = traced.call(F.embedding, traced.x, traced.weight)
    assert traced.done(matmul, table) == (False, ["to_local", F.linear, F.embedding])


def summed(traced: Traced, part: fx.Node) -> tuple[fx.Node, fx.Node]:
    wait = traced.call(WAIT, traced.call(SUM, part, "sum", "0"))
    return wait, traced.call(Tensor.copy_, part, wait)


@pytest.mark.parametrize("reads_copy", [True, False])
def test_a_sum_over_ranks_is_used_as_it_is(reads_copy):
    """Whether the graph reads the result of the copy or its target."""
    traced = Traced()
    part = traced.call(F.linear, traced.x, traced.local(), None)
    wait, copy = summed(traced, part)
    total = traced.call(operator.add, copy if reads_copy else part, 1)
    assert traced.done(total) == (True, [F.linear, SUM, WAIT, operator.add])
    assert total.args == (wait, 1)


def test_a_part_that_is_read_before_the_sum_keeps_its_copy():
    traced = Traced()
    part = traced.call(F.linear, traced.x, traced.local(), None)
    early = traced.call(operator.mul, part, 2)
    summed(traced, part)
    late = traced.call(operator.add, part, early)
    _, calls = traced.done(late)
    assert Tensor.copy_ in calls
    assert late.args[0] is part
