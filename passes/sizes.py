"""Fixes a dynamic size of a traced graph, as if Dynamo had seen that size alone.

A decode step is a pass of several tokens with one of them: with the length fixed, its graph follows from theirs in a
fraction of a second, where Dynamo takes seconds. Numbers that follow from the size become constants in the arguments;
values that depend on it get new example values, which their operators make on fake tensors.

Not handled: what the model's Python code decided by the size when it was traced (``if length > 1``). Whoever asks knows
that such code computes the same for either size.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg

from river_compile.passes.nodes import hints_of, value_of

_EXAMPLE = "example_value"


def with_size(graph: fx.Graph, symbol: sympy.Symbol, size: int) -> fx.GraphModule:
    """Returns a copy of a traced graph in which a dynamic size is a number.

    Inputs that are that number are left out, and so are nodes that compute numbers which no longer change.

    Raises:
        Exception: what an operator raises that does not take such a size.
    """
    new = fx.Graph(owning_module=graph.owning_module)
    made: dict[fx.Node, Any] = {}  # the new node, or the number in its place
    changed: set[fx.Node] = set()
    with _propagating(graph):
        for node in graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), made.__getitem__)
            value = before = node.meta.get(_EXAMPLE)
            if node.op == "placeholder":
                value = _fixed(before, symbol, size)
            elif node.op != "output" and not changed.isdisjoint(node.all_input_nodes):
                value = _run(node, *map_arg((args, kwargs), value_of))
            if value is not before:
                changed.add(node)
            if isinstance(value, int) and value is not before:
                made[node] = value
                continue
            copy = made[node] = new.create_node(node.op, node.target, args, kwargs, node.name)
            copy.meta = {**node.meta, _EXAMPLE: value} if _EXAMPLE in node.meta else node.meta.copy()
    return fx.GraphModule(graph.owning_module or torch.nn.Module(), new)


@contextlib.contextmanager
def _propagating(graph: fx.Graph) -> Iterator[None]:
    """Inside, operators run on the fake tensors of a graph, and what they assume of sizes is noted beside them."""
    examples = (value_of(node) for node in graph.nodes if _EXAMPLE in node.meta)
    mode: FakeTensorMode = next(value.fake_mode for value in examples if isinstance(value, FakeTensor))
    shapes: ShapeEnv | None = mode.shape_env
    assert shapes is not None, "Dynamo traces with symbols"
    frozen, shapes.frozen = shapes.frozen, False
    try:
        with mode, torch.no_grad():
            yield
    finally:
        shapes.frozen = frozen


def _fixed(value: Any, symbol: sympy.Symbol, size: int) -> Any:
    """Returns an input's example with the number in the place of the symbol, itself where it has none."""
    if isinstance(value, torch.SymInt):
        return _number(value, symbol, size)
    if not isinstance(value, FakeTensor):
        return value
    before = [*value.shape, *value.stride()]
    sizes = [_number(n, symbol, size) for n in before]
    if all(map(operator.is_, sizes, before)):
        return value
    dims = value.dim()
    return torch.empty_strided(sizes[:dims], sizes[dims:], dtype=value.dtype, device=value.device)


def _number(value: int | torch.SymInt, symbol: sympy.Symbol, size: int) -> int | torch.SymInt:
    if isinstance(value, int) or symbol not in value.node.expr.free_symbols:
        return value
    expr = value.node.expr.xreplace({symbol: sympy.Integer(size)})
    if expr.is_Integer:
        return int(expr)
    shapes = value.node.shape_env
    return shapes.create_symintnode(expr, hint=int(expr.xreplace(hints_of(shapes))))


def _run(node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target), f"{node.op} is no operator of a normalized graph"
    return node.target(*args, **kwargs)
