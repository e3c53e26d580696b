"""The normal form computes the same bits as the traced graph, for random decoders and model families."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from river_compile.passes.nodes import is_tensor, value_of
from river_compile.passes.normalize import normalized
from tests.passes.decoders import decoder, spellings
from tests.passes.graphs import GraphBuilder, assert_equal, clones
from tests.support.examples import examples, slow
from tests.support.families import FAMILIES, each, make, prompt


def described(graph: fx.Graph) -> list[tuple]:
    """Returns names, targets and arguments of a graph's nodes as text."""
    return [(n.name, n.op, n.target, str(n.args), str(n.kwargs)) for n in graph.nodes]


def assert_normal(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Normalizes a graph and checks it without running it."""
    before = described(graph_module.graph)
    normal = normalized(graph_module)
    assert described(graph_module.graph) == before
    assert [n.name for n in normal.graph.nodes] == [n.name for n in graph_module.graph.nodes]
    for ours, traced in zip(normal.graph.nodes, graph_module.graph.nodes, strict=True):
        assert ours.meta == traced.meta
        assert ours.op != "call_method" or not is_tensor(ours.args[0])
    assert described(normalized(normal).graph) == described(normal.graph)
    normal.graph.lint()
    return normal


@examples(60)
@given(how=spellings(), seed=st.integers(0, 2**16))
def test_random_decoders_keep_their_bits(how, seed):
    graph_module, inputs = decoder(how, seed)
    normal = assert_normal(graph_module)
    expected, actual = clones(inputs), clones(inputs)
    assert_equal(graph_module(*expected), normal(*actual))
    assert_equal(expected, actual)


@pytest.mark.parametrize("cache", ["static", slow("dynamic")])
@pytest.mark.parametrize("family", each(FAMILIES))
def test_families_keep_their_bits(family, cache):
    """Graphs of a prompt and of decode steps run both ways on copies of the same inputs."""
    seen = []

    def backend(graph_module: fx.GraphModule, example_inputs: list) -> object:
        normal = assert_normal(graph_module)

        def run(*inputs: object) -> object:
            copies = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
            with torch.no_grad():
                actual = normal(*copies)
                expected = graph_module(*inputs)
            for a, b in zip((*expected, *inputs), (*actual, *copies), strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
            seen.append(normal)
            return expected

        return run

    torch._dynamo.reset()
    model = make(family, layers=2)
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    model.forward = torch.compile(model.forward, backend=backend)
    with torch.no_grad():
        model.generate(prompt(), max_new_tokens=2, do_sample=False, disable_compile=True, **options)
    assert seen


def call(target, *args, **kwargs) -> fx.Node:
    """Returns the normal form of one call, after a check that it computes the same."""
    b = GraphBuilder(0)
    inputs = {}

    def tensor(value):
        if not isinstance(value, Tensor):
            return value
        if id(value) not in inputs:
            inputs[id(value)] = b.placeholder(f"x{len(inputs)}", value)
        return inputs[id(value)]

    args, kwargs = fx.node.map_aggregate((args, kwargs), tensor)
    node = b.call(target, *args, **kwargs)
    graph_module = b.finish([node])
    normal = assert_normal(graph_module)
    expected, actual = clones(b.values), clones(b.values)
    assert_equal(tree_leaves(graph_module(*expected)), tree_leaves(normal(*actual)))
    assert_equal(expected, actual)
    return normal.graph.output_node().args[0][0]


X, Y = torch.randn(2, 4), torch.randn(2, 4)
Q = torch.randn(1, 2, 3, 4)
WEIGHT, SHIFT = torch.randn(4), torch.randn(4)

CASES = {
    "torch.add": ((torch.add, X, Y), {}, operator.add, (Y,), {}),
    "x.add": (("add", X, Y), {}, operator.add, (Y,), {}),
    "x.add with alpha": (("add", X, Y), {"alpha": 2}, Tensor.add, (Y,), {"alpha": 2}),
    "x += y": ((operator.iadd, X, Y), {}, Tensor.add_, (Y,), {}),
    "x /= y": ((operator.itruediv, X, Y), {}, Tensor.div_, (Y,), {}),
    "x.mul_": (("mul_", X, Y), {}, Tensor.mul_, (Y,), {}),
    "torch.div, rounded": ((torch.div, X, Y), {"rounding_mode": "floor"}, torch.div, (Y,), {"rounding_mode": "floor"}),
    "1 - x": ((operator.sub, 1, X), {}, operator.sub, (X,), {}),
    "x.square": (("square", X), {}, operator.pow, (2,), {}),
    "x.T": ((getattr, X, "T"), {}, torch.t, (), {}),
    "x.T, not of a matrix": ((getattr, Q, "mT"), {}, getattr, ("mT",), {}),
    "view": (("view", X, 4, -1), {}, Tensor.view, ((4, -1),), {}),
    "view of a tuple": (("view", X, [8]), {}, Tensor.view, ((8,),), {}),
    "view as a dtype": (("view", X, torch.int32), {}, Tensor.view, (torch.int32,), {}),
    "expand": (("expand", X, 3, -1, -1), {}, Tensor.expand, ((3, -1, -1),), {}),
    "permute": (("permute", X, 1, 0), {}, torch.permute, ((1, 0),), {}),
    "permute(dims=)": (("permute", X), {"dims": (1, 0)}, torch.permute, ((1, 0),), {}),
    "to(dtype)": (("to", X, torch.float64), {}, Tensor.to, (torch.float64,), {}),
    "to(dtype=)": (("to", X), {"dtype": torch.float64}, Tensor.to, (torch.float64,), {}),
    "to(device=, dtype=)": (
        ("to", X),
        {"dtype": torch.float64, "device": "cpu"},
        Tensor.to,
        ("cpu", torch.float64),
        {},
    ),
    "to(copy=)": (("to", X, torch.float32), {"copy": True}, Tensor.to, (torch.float32,), {"copy": True}),
    "half": (("half", X), {}, Tensor.to, (torch.float16,), {}),
    "type_as": (("type_as", X, Q), {}, Tensor.to, (Q,), {}),
    "split": (("split", X, [1, 3]), {"dim": -1}, torch.split, ([1, 3], -1), {}),
    "chunk": ((torch.chunk, X, 2), {}, torch.chunk, (2, 0), {}),
    "mean": (("mean", X, -1), {"keepdim": True}, torch.mean, (-1, True), {"dtype": None}),
    "mean of all": (("mean", X), {}, Tensor.mean, (), {}),
    "softmax": ((F.softmax, X), {"dim": -1}, torch.softmax, (-1,), {"dtype": None}),
    "linear": ((F.linear, X, Y), {}, F.linear, (Y, None), {}),
    "layer norm": (
        (F.layer_norm, X, (4,)),
        {"bias": SHIFT, "weight": WEIGHT},
        F.layer_norm,
        ((4,), WEIGHT, SHIFT, 1e-5),
        {},
    ),
    "rms norm": ((F.rms_norm, X, (4,)), {"eps": 1e-6}, F.rms_norm, ((4,), None, 1e-6), {}),
    "attention": (
        (F.scaled_dot_product_attention, Q, Q, Q),
        {"is_causal": True, "scale": 0.5},
        F.scaled_dot_product_attention,
        (Q, Q, None, 0.0, True),
        {"scale": 0.5, "enable_gqa": False},
    ),
    "gelu": ((F.gelu, X), {}, F.gelu, (), {"approximate": "none"}),
    "relu": ((torch.relu, X), {}, F.relu, (False,), {}),
    "relu(inplace=True)": ((F.relu, X), {"inplace": True}, F.relu, (True,), {}),
    "dropout": ((F.dropout, X), {"training": False, "p": 0.1}, F.dropout, (0.1, False, False), {}),
    "leaky relu": ((F.leaky_relu, X, 0.1, True), {}, F.leaky_relu, (0.1, True), {}),
    "roll": (("roll", X, -1), {"dims": -2}, torch.roll, (-1, -2), {}),
    "any other method": (("cumsum", X), {"dim": 0}, Tensor.cumsum, (), {"dim": 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_spellings(case):
    (target, *args), kwargs, normal, expected, expected_kwargs = CASES[case]
    node = call(target, *args, **kwargs)
    assert node.target is normal
    assert len(node.args) == 1 + len(expected)
    for ours, theirs in zip(node.args[1:], expected, strict=True):
        assert ours.op == "placeholder" if isinstance(theirs, Tensor) else ours == theirs
    assert dict(node.kwargs) == expected_kwargs


def test_numbers_stay_numbers():
    graph = fx.Graph()
    size = graph.placeholder("size")
    size.meta["example_value"] = 3
    total = graph.call_function(operator.iadd, (size, 1))
    graph.output((total,))
    normal = normalized(fx.GraphModule({}, graph))
    assert [n.target for n in normal.graph.nodes][1] is operator.iadd
    assert normal(3) == (4,)


class Scaled(torch.nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * (self.scale * 2.0) / (len(x) ** 0.5)


def test_floats_of_modules_are_constants_and_floats_of_sizes_are_not(fresh_dynamo):
    """Dynamo made both an input: another module came before, and inputs of another length."""
    graphs = []

    def normal(graph_module, inputs):
        graphs.append(normalized(graph_module))
        return graphs[-1]

    for scale, lengths in ((3.0, [4]), (5.0, [4, 7, 9])):
        module = torch.compile(Scaled(scale), backend=normal)
        for length in lengths:
            x = torch.rand(length)
            assert_equal(module(x), Scaled(scale)(x))
    assert len(graphs) == 3  # lengths after the second share a graph
    for graph in graphs:
        assert all(call.target is not Tensor.item for call in graph.graph.nodes)
    assert any(isinstance(value_of(node), torch.SymFloat) for node in graphs[-1].graph.nodes)
