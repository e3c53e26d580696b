"""Changes of a segment's graph that passes share: one operator for many nodes, and what falls away then.

Every operation that is put in records its value, as the traced ones do, so that the next pass can look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from .nodes import is_reshape, mutated_inputs, plain, same_dtype, shape, sizes_of, value_of

_KEPT_META = ("nn_module_stack", "stack_trace")


class Missed(Exception):
    """A fusion rule does not apply: a reason for the user, and the node that it is about (the whole segment: None)."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


def add_placeholders(graph: fx.Graph, names: Iterable[str]) -> list[fx.Node]:
    """Adds placeholders after those that are there."""
    added = []
    for name in names:
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            added.append(graph.placeholder(name))
    return added


def put(
    graph: fx.Graph, target: Callable, arguments: tuple, value: torch.Tensor, old: fx.Node, **kwargs: object
) -> fx.Node:
    """Puts an operator in a node's place; what only served the old one falls away.

    Args:
        graph: the graph.
        target, arguments, kwargs: the operator; it must not read the old node.
        value: a fake tensor like the result, which holds as many elements as the old node's.
        old: the node whose uses get the result, in the old shape.

    Raises:
        Missed: the old shape cannot be restored, because several of its sizes are dynamic.
    """
    if sizes_of(value) != shape(old) and sum(isinstance(n, str) for n in shape(old)) > 1:
        raise Missed(f"its shape {shape(old)} has several dynamic sizes", old)
    with graph.inserting_before(old):
        new = call(graph, target, arguments, value, old, **kwargs)
        result = reshaped(graph, new, old)
    old.replace_all_uses_with(result)
    drop_unused(graph, old)
    return new


def call(
    graph: fx.Graph, target: Callable, arguments: tuple, value: object, like: fx.Node, **kwargs: object
) -> fx.Node:
    """Adds a call that records its value, and says that it comes from where `like` came from."""
    node = graph.call_function(target, arguments, kwargs)
    node.meta = {key: like.meta[key] for key in _KEPT_META if key in like.meta} | {"example_value": value}
    return node


def reshaped(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    """Returns a node in the shape of another one."""
    if shape(node) == shape(like):
        return node
    size = tuple(-1 if isinstance(n, str) else n for n in shape(like))
    return call(graph, torch.reshape, (node, size), value_of(like), like)


def drop_unused(graph: fx.Graph, last: fx.Node) -> None:
    """Erases an unused operation, and what only served it as far as that has no effects of its own."""
    stack = [last]
    erased: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in erased or node.users or node.op != "call_function":
            continue
        if node is last or not mutated_inputs(node):
            stack += node.all_input_nodes
            erased.add(node)
            graph.erase_node(node)


def same_size(a: object, b: fx.Node) -> bool:
    """True for two tensors of one shape and dtype."""
    return same_dtype(a, b) and shape(a) == shape(b)


def only_used_for(node: fx.Node, end: fx.Node) -> bool:
    """True where every use of a value leads to `end`, through operations without effects."""
    return bool(node.users) and all(
        user is end or (user.op != "output" and not mutated_inputs(user) and only_used_for(user, end))
        for user in node.users
    )


def way_down(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Follows a value through views and what `plain` looks through; returns the last of them and what uses that.

    Raises:
        Missed: there are several uses.
    """
    while True:
        if len(node.users) != 1:
            raise Missed("its result is used more than once", node)
        (user,) = node.users
        if user.op == "output" or (plain(user) is user and not is_reshape(user)):
            return node, user
        node = user
