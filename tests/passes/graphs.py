"""Builds decoder-like graphs as Dynamo traces them, without a model and without Dynamo.

A `GraphBuilder` runs each operation on fake tensors and records the metadata that passes read: examples, module stacks,
which inputs are parameters.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from river_compile.passes.decoder import find_decoder
from river_compile.passes.normalize import normalized
from river_compile.passes.program import RiverProgram
from river_compile.passes.segments import graph_lines, split_segments

WIDTH, HEADS, SLOTS = 32, 2, 6


class Module:
    """A module class on a node's stack."""


class GraphBuilder:
    def __init__(self, seed: int) -> None:
        self.graph = fx.Graph()
        self.values: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._fake = FakeTensorMode(shape_env=ShapeEnv())
        self._stack: list[str] = []

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def placeholder(self, name: str, value: Tensor, parameter: bool = False) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = self._fake.from_tensor(value, static_shapes=True)
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"} if parameter else {}
        self.values.append(value)
        return node

    def parameter(self, name: str, *shape: int) -> fx.Node:
        return self.placeholder(name, self.randn(*shape) * shape[-1] ** -0.5, parameter=True)

    @contextlib.contextmanager
    def module(self, path: str):
        self._stack.append(path)
        yield
        self._stack.pop()

    def call(self, target: Callable | str, *args: object, **kwargs: object) -> fx.Node:
        """Adds a call of a function, or of the method that a string names, and runs it on the fake values."""
        add = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = add(target, args, kwargs)
        fakes, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        with self._fake:
            function = getattr(torch.Tensor, target) if isinstance(target, str) else target
            node.meta["example_value"] = function(*fakes, **fake_kwargs)
        node.meta["nn_module_stack"] = {path: (path, Module) for path in self._stack}
        return node

    def finish(self, outputs: list[fx.Node]) -> fx.GraphModule:
        self.graph.output(tuple(outputs))
        return fx.GraphModule(torch.nn.Module(), self.graph)


@dataclass(frozen=True)
class Shape:
    """Structure of a random decoder."""

    blocks: int
    batch: int
    norm: str  # before attention and MLP: "rms", "layer" or "none"
    parallel: bool  # the MLP reads the block's input, like the attention
    projections: str  # "separate" q, k, v; "fused"; "conv1d" (weights stored transposed); "matmul" with weight.T
    bias: bool  # of linears
    static_cache: bool  # written in place at a counted slot, else appended and returned
    between: bool  # an operation between the blocks that no module contains
    return_hidden: bool  # the hidden state after every block is returned too


def shapes(most_blocks: int = 5) -> st.SearchStrategy[Shape]:
    """Returns a strategy over all structures of at least two blocks."""
    return st.builds(
        Shape,
        blocks=st.integers(2, most_blocks),
        batch=st.integers(1, 3),
        norm=st.sampled_from(["rms", "layer", "none"]),
        parallel=st.booleans(),
        projections=st.sampled_from(["separate", "fused", "conv1d", "matmul"]),
        bias=st.booleans(),
        static_cache=st.booleans(),
        between=st.booleans(),
        return_hidden=st.booleans(),
    )


def random_decoder(shape: Shape, seed: int) -> tuple[fx.GraphModule, list[Tensor]]:
    """Returns a decoder's graph for one token per row and real inputs for it."""
    b = GraphBuilder(seed)
    ids = b.placeholder("ids", torch.randint(0, 16, (shape.batch, 1), generator=b._generator))
    embedding = b.parameter("embedding", 16, WIDTH)
    blocks = [_declare_block(b, shape, i) for i in range(shape.blocks)]
    head = b.parameter("head", 16, WIDTH)
    with b.module("L['self'].model"):
        hidden = b.call(torch.nn.functional.embedding, ids, embedding)
    outputs, hidden_states = [], []
    for i, weights in enumerate(blocks):
        hidden, returned = _block(b, shape, i, weights, hidden)
        outputs += returned
        hidden_states.append(hidden)
        if shape.between and i + 1 < shape.blocks:
            with b.module("L['self'].model"):
                hidden = b.call(operator.mul, hidden, 1.25)
    logits = b.call(torch.nn.functional.linear, hidden, head, None)
    extra = hidden_states if shape.return_hidden else []
    return b.finish([*outputs, *extra, logits]), b.values


def _declare_block(b: GraphBuilder, shape: Shape, i: int) -> dict[str, fx.Node]:
    """Adds a block's weights and cache as placeholders."""
    sizes = {"o": (WIDTH, WIDTH), "up": (2 * WIDTH, WIDTH), "down": (WIDTH, 2 * WIDTH)}
    sizes |= {"qkv": (3 * WIDTH, WIDTH)} if shape.projections == "fused" else {n: (WIDTH, WIDTH) for n in "qkv"}
    weights = {}
    for name, (rows, columns) in sizes.items():
        stored = (columns, rows) if shape.projections == "conv1d" else (rows, columns)
        weights[name] = b.parameter(f"b{i}_{name}", *stored)
        if shape.bias or shape.projections == "conv1d":
            weights[name + "_bias"] = b.parameter(f"b{i}_{name}_bias", rows)
    if shape.norm != "none":
        weights["norm"] = b.parameter(f"b{i}_norm", WIDTH)
    filled = 3
    slots = SLOTS if shape.static_cache else filled
    for name in ("keys", "values"):
        weights[name] = b.placeholder(f"b{i}_{name}", b.randn(shape.batch, HEADS, slots, WIDTH // HEADS))
    if shape.static_cache:
        weights["length"] = b.placeholder(f"b{i}_length", torch.tensor(filled))
    return weights


def _block(
    b: GraphBuilder, shape: Shape, i: int, w: dict[str, fx.Node], hidden: fx.Node
) -> tuple[fx.Node, list[fx.Node]]:
    path = f"L['self'].model.stages.{i}"
    with b.module("L['self'].model"), b.module(path):
        normed = _norm(b, shape, w, hidden)
        with b.module(path + ".attention"):
            attended, returned = _attention(b, shape, w, normed)
        residual = b.call(operator.add, hidden, attended)
        mlp_in = normed if shape.parallel else _norm(b, shape, w, residual)
        with b.module(path + ".mlp"):
            up = b.call(torch.nn.functional.gelu, _linear(b, shape, w, "up", mlp_in))
            down = _linear(b, shape, w, "down", up)
        return b.call(operator.add, residual, down), returned


def _norm(b: GraphBuilder, shape: Shape, w: dict[str, fx.Node], x: fx.Node) -> fx.Node:
    if shape.norm == "none":
        return x
    if shape.norm == "layer":
        return b.call(torch.nn.functional.layer_norm, x, (WIDTH,), w["norm"])
    mean = b.call("mean", b.call("pow", x, 2), -1, keepdim=True)
    return b.call(
        operator.mul, b.call(operator.mul, x, b.call(torch.rsqrt, b.call(operator.add, mean, 1e-6))), w["norm"]
    )


def _linear(b: GraphBuilder, shape: Shape, w: dict[str, fx.Node], name: str, x: fx.Node) -> fx.Node:
    bias = w.get(name + "_bias")
    if shape.projections == "conv1d":
        flat = b.call("view", x, -1, x.meta["example_value"].shape[-1])
        rows = w[name].meta["example_value"].shape[1]
        return b.call("view", b.call(torch.addmm, bias, flat, w[name]), (shape.batch, 1, rows))
    if shape.projections == "matmul":
        y = b.call(operator.matmul, x, b.call(getattr, w[name], "T"))
        return y if bias is None else b.call(operator.add, y, bias)
    return b.call(torch.nn.functional.linear, x, w[name], bias)


def _attention(b: GraphBuilder, shape: Shape, w: dict[str, fx.Node], x: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    if shape.projections == "fused":
        parts = b.call("chunk", _linear(b, shape, w, "qkv", x), 3, -1)
        q, k, v = (b.call(operator.getitem, parts, i) for i in range(3))
    else:
        q, k, v = (_linear(b, shape, w, name, x) for name in "qkv")
    q, k, v = (b.call("transpose", b.call("view", y, (shape.batch, 1, HEADS, WIDTH // HEADS)), 1, 2) for y in (q, k, v))
    keys, values, returned = _fill_cache(b, shape, w, k, v)
    out = b.call(torch.nn.functional.scaled_dot_product_attention, q, keys, values)
    out = b.call("reshape", b.call("transpose", out, 1, 2), (shape.batch, 1, WIDTH))
    return _linear(b, shape, w, "o", out), returned


def _fill_cache(
    b: GraphBuilder, shape: Shape, w: dict[str, fx.Node], k: fx.Node, v: fx.Node
) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
    if not shape.static_cache:
        keys, values = b.call(torch.cat, [w["keys"], k], 2), b.call(torch.cat, [w["values"], v], 2)
        return keys, values, [keys, values]
    position = b.call(operator.add, b.call(torch.arange, 1), w["length"])
    b.call("add_", w["length"], 1)
    b.call("index_copy_", w["keys"], 2, position, k)
    b.call("index_copy_", w["values"], 2, position, v)
    return w["keys"], w["values"], []


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def assert_equal(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
    """Compares tensors to the bit."""
    assert len(expected) == len(actual)
    for a, b in zip(expected, actual, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


SHAPE = Shape(3, 1, "rms", False, "separate", False, True, False, False)


def planned(shape: Shape = SHAPE, seed: int = 0) -> RiverProgram:
    """Returns a random decoder as the passes' input."""
    graph_module, _ = random_decoder(shape, seed)
    return split_segments(find_decoder(normalized(graph_module)))


def texts(program: RiverProgram) -> dict[str, list[str]]:
    return {segment.name: graph_lines(segment.graph) for segment in program.segments}
