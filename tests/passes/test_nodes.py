"""Queries on single nodes: aliasing, mutation, skipped operations, linear layers."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from river_compile.kernels import ops  # noqa: F401  (registers the operators)
from river_compile.passes.nodes import (
    as_linear,
    input_name,
    memory_of,
    module_path,
    mutated_inputs,
    shape,
    skip_casts,
    skip_noops,
    skip_views,
)
from river_compile.passes.normalize import normalized
from tests.passes.graphs import GraphBuilder


class Nodes:
    """Builds a few operations on `x` ``[2, 3, 4]``, `y` (the same) and a weight ``[5, 4]``, in the normal form."""

    def __init__(self) -> None:
        self.b = GraphBuilder(0)
        self.x, self.y = (self.b.placeholder(name, torch.zeros(2, 3, 4)) for name in "xy")
        self.weight, self.bias = self.b.parameter("weight", 5, 4), self.b.parameter("bias", 5)

    def normal(self, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        graph = normalized(self.b.finish(list(nodes))).graph
        self.inputs = {n.name: n for n in graph.find_nodes(op="placeholder")}
        return graph.output_node().args[0]

    def one(self, target, *args, **kwargs) -> fx.Node:
        """Returns the normal form of one call."""
        return self.normal(self.b.call(target, *args, **kwargs))[0]


@pytest.mark.parametrize(
    ("target", "rest", "kwargs", "written"),
    [
        (operator.iadd, ["y"], {}, ["x"]),
        (operator.imul, [2], {}, ["x"]),
        (operator.iand, ["y"], {}, ["x"]),
        ("add_", ["y"], {"alpha": 2}, ["x"]),
        ("copy_", ["y"], {}, ["x"]),
        (operator.setitem, [0, 1.0], {}, ["x"]),
        (torch.add, ["y"], {"out": "y"}, ["y"]),
        (F.relu, [], {"inplace": True}, ["x"]),
        (F.leaky_relu, [0.1, True], {}, ["x"]),
        (torch.ops.aten.mul_.Tensor, ["y"], {}, ["x"]),
        (torch.ops.aten.add.out, ["y"], {"out": "y"}, ["y"]),
        (operator.add, ["y"], {}, []),
        (F.relu, [], {"inplace": False}, []),
        ("__eq__", ["y"], {}, []),
        (torch.ops.aten.mul.Tensor, ["y"], {}, []),
    ],
)
def test_every_spelling_of_a_write_is_seen(target, rest, kwargs, written):
    nodes = Nodes()
    named = {"x": nodes.x, "y": nodes.y}
    if target is operator.iand:
        named = {n: nodes.b.placeholder(f"{n}_mask", torch.ones(2, dtype=torch.bool)) for n in "xy"}
    node = nodes.b.graph.create_node(
        "call_method" if isinstance(target, str) else "call_function",
        target,
        (named["x"], *(named.get(a, a) for a in rest)),
        {name: named.get(a, a) for name, a in kwargs.items()},
    )
    (normal,) = nodes.normal(node)
    assert [n.name[0] for n in mutated_inputs(normal)] == written


def test_arithmetic_of_sizes_writes_nothing():
    graph = fx.Graph()
    size = graph.placeholder("size")
    size.meta["example_value"] = 3
    assert mutated_inputs(graph.call_function(operator.iadd, (size, 1))) == []


def test_an_operator_with_a_mutable_schema_writes_its_caches():
    graph = fx.Graph()
    schema = torch.ops.river.kv_fill.default._schema
    names = {a.name: graph.placeholder(a.name) for a in schema.arguments}
    written = mutated_inputs(graph.call_function(torch.ops.river.kv_fill.default, tuple(names.values())))
    assert written == [names[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert len(written) == 2


@pytest.mark.parametrize(
    ("target", "rest"),
    [
        ("view", [(6, 4)]),
        ("reshape", [(4, 6)]),
        ("transpose", [0, 1]),
        ("permute", [1, 0, 2]),
        ("expand", [(2, 3, 4)]),
        ("narrow", [0, 0, 1]),
        ("select", [0, 0]),
        ("unsqueeze", [0]),
        ("flatten", []),
        ("contiguous", []),
        ("to", [torch.float32]),
        ("diagonal", []),
        ("unfold", [0, 2, 1]),
        ("detach", []),
        ("add_", [1]),
        (operator.getitem, [0]),
        (F.dropout, [0.1, False]),
    ],
)
def test_views_show_the_memory_of_their_input(target, rest):
    nodes = Nodes()
    assert memory_of(nodes.one(target, nodes.x, *rest)).name == "x"


def test_memory_is_found_through_chains_and_pieces():
    nodes = Nodes()
    pieces = nodes.b.call("split", nodes.b.call("transpose", nodes.x, 0, 1), 1)
    piece = nodes.one(operator.getitem, pieces, 0)
    assert memory_of(piece).name == "x"


@pytest.mark.parametrize(
    ("target", "rest"),
    [(operator.add, [1]), ("clone", []), ("roll", [1, 0]), ("cumsum", [0]), (torch._C.TensorBase.__eq__, [1])],
)
def test_new_values_have_memory_of_their_own(target, rest):
    nodes = Nodes()
    node = nodes.one(target, nodes.x, *rest)
    assert memory_of(node) is node


@pytest.mark.parametrize(
    ("target", "rest", "through"),
    [
        ("to", [torch.float32], skip_noops),
        ("contiguous", [], skip_noops),
        (F.dropout, [0.5, False], skip_noops),
        (operator.getitem, [(slice(None), Ellipsis)], skip_noops),
        ("to", [torch.float64], skip_casts),
        ("view", [6, 4], skip_views),
        ("unsqueeze", [0], skip_views),
        ("transpose", [-1, -1], skip_views),
    ],
)
def test_what_is_looked_through(target, rest, through):
    nodes = Nodes()
    assert through(nodes.one(target, nodes.x, *rest)).name == "x"


@pytest.mark.parametrize(
    ("target", "rest", "through"),
    [
        ("to", [torch.float64], skip_noops),
        (F.dropout, [0.5, True], skip_noops),
        (operator.getitem, [(slice(None, 1),)], skip_noops),
        ("to", [torch.int64], skip_casts),
        ("view", [torch.int32], skip_views),
        ("transpose", [0, 1], skip_views),
        ("permute", [2, 1, 0], skip_views),
    ],
)
def test_what_is_not_looked_through(target, rest, through):
    nodes = Nodes()
    node = nodes.one(target, nodes.x, *rest)
    assert through(node) is node


def test_a_transposition_of_dimensions_of_size_one_keeps_the_order():
    nodes = Nodes()
    row = nodes.b.call("unsqueeze", nodes.x, 1)
    assert skip_views(nodes.one("permute", row, 1, 0, 2, 3)).name == "x"


class TestLinear:
    def test_linear(self):
        nodes = Nodes()
        with nodes.b.module("L['self'].model.layers.0.mlp.up"):
            found = as_linear(nodes.one(F.linear, nodes.x, weight=nodes.weight, bias=nodes.bias))
        assert (found.x.name, found.weight.name, found.bias.name) == ("x", "weight", "bias")
        assert (found.in_features, found.out_features, found.transposed) == (4, 5, False)
        assert found.name == "model.layers.0.mlp.up"

    def test_addmm_stores_the_weight_transposed(self):
        nodes = Nodes()
        weight = nodes.b.parameter("conv1d", 4, 5)
        found = as_linear(nodes.one(torch.addmm, nodes.bias, nodes.b.call("view", nodes.x, -1, 4), weight))
        assert (found.in_features, found.out_features, found.transposed) == (4, 5, True)

    @pytest.mark.parametrize("transpose", [("t",), (getattr, "T")])
    def test_a_matmul_with_the_transposed_weight(self, transpose):
        nodes = Nodes()
        target, *rest = transpose
        found = as_linear(nodes.one(torch.matmul, nodes.x, nodes.b.call(target, nodes.weight, *rest)))
        assert (found.weight.name, found.bias, found.transposed) == ("weight", None, False)

    def test_matmuls_of_values_and_scaled_ones_are_no_layers(self):
        nodes = Nodes()
        flat = nodes.b.call("view", nodes.x, -1, 4)
        scaled = nodes.b.call(torch.addmm, nodes.bias, flat, nodes.b.parameter("conv1d", 4, 5), alpha=2)
        matmul = nodes.b.call(operator.matmul, nodes.x, nodes.b.call("transpose", nodes.y, 1, 2))
        value = nodes.b.call(F.linear, nodes.x, nodes.b.call("mul", nodes.weight, 2))
        assert [as_linear(n) for n in nodes.normal(scaled, matmul, value)] == [None, None, None]


def test_names_come_from_the_users_code():
    nodes = Nodes()
    with nodes.b.module("L['self'].model"), nodes.b.module("L['self'].model.layers.3.norm"):
        node = nodes.one("neg", nodes.x)
    assert module_path(node) == "model.layers.3.norm"
    assert module_path(nodes.inputs["x"]) == ""
    assert input_name(nodes.inputs["x"]) == "x"
    assert shape(node) == (2, 3, 4)
