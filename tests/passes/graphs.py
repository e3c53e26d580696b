"""Builds graphs as Dynamo traces them, without a model and without Dynamo; decoders.py builds whole decoders.

A `GraphBuilder` runs each operation on fake tensors and records the metadata that passes read: examples, module stacks,
which inputs are parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from river_compile.passes.program import RiverProgram
from river_compile.passes.segments import graph_lines


class Module:
    """A module class on a node's stack."""


class GraphBuilder:
    def __init__(self, seed: int) -> None:
        self.graph = fx.Graph()
        self.values: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)
        self._fake = FakeTensorMode(shape_env=ShapeEnv())
        self._stack: list[str] = []

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

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


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def assert_equal(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
    """Compares tensors to the bit."""
    assert len(expected) == len(actual)
    for a, b in zip(expected, actual, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


def texts(program: RiverProgram) -> dict[str, list[str]]:
    return {segment.name: graph_lines(segment.graph) for segment in program.segments}
