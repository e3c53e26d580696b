"""Graph edits that passes share, and the loop that runs passes.

A pass is a function from `RiverProgram` to `RiverProgram`; it changes no graph of the program it is given. The first
line of its docstring describes the result. Every new node records an example value for the next pass.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from river_compile.passes.nodes import is_reshape, mutated_inputs, shape, sizes_of, skip_noops, value_of
from river_compile.passes.program import RiverProgram

log = logging.getLogger("river_compile.passes")

_KEPT_META = ("nn_module_stack", "stack_trace")
Pass = Callable[[RiverProgram], RiverProgram]


@dataclass(frozen=True)
class PassRecord:
    name: str
    text: str  # first line of the docstring
    seconds: float
    before: RiverProgram
    after: RiverProgram


def run_passes(
    program: RiverProgram, passes: Sequence[Pass], observe: Callable[[PassRecord], None] | None = None
) -> RiverProgram:
    """Run the passes in order; call `observe` after each."""
    records = []
    for step in passes:
        start = time.perf_counter()
        result = step(program)
        text = (step.__doc__ or "").partition("\n")[0]
        records.append(PassRecord(step.__name__, text, time.perf_counter() - start, program, result))
        if observe is not None:
            observe(records[-1])
        program = result
    if log.isEnabledFor(logging.DEBUG):
        log.debug("passes\n%s", table(records))
    return program


def table(records: Sequence[PassRecord]) -> str:
    """Return a table of milliseconds, number of operations after the pass, its change, description."""
    lines = [f"{'pass':<18} {'ms':>8} {'ops':>7} {'change':>7}  what it does"]
    for record in records:
        ops = _num_ops(record.after)
        change = ops - _num_ops(record.before)
        lines.append(f"{record.name:<18} {record.seconds * 1e3:>8.1f} {ops:>7} {change:>+7}  {record.text}")
    return "\n".join(lines)


def _num_ops(program: RiverProgram) -> int:
    return sum(n.op not in ("placeholder", "output") for s in program.segments for n in s.graph.nodes)


class NoMatch(Exception):
    """A rewrite does not apply: the reason, for the user, and the node (None: the whole segment)."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


def require(condition: bool, reason: str, node: fx.Node | None = None) -> None:
    """Raise `NoMatch` unless the condition holds."""
    if not condition:
        raise NoMatch(reason, node)


def add_placeholders(graph: fx.Graph, names: Iterable[str]) -> list[fx.Node]:
    added = []
    for name in names:
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            added.append(graph.placeholder(name))
    return added


def replace_node(target: Callable, arguments: tuple, value: torch.Tensor, old: fx.Node, **kwargs: object) -> fx.Node:
    """Replace a node by a call in its shape, and erases nodes that only it read.

    `value` is the call's example, of as many elements. Raises `NoMatch` if several sizes of `old` are dynamic.
    """
    known = sizes_of(value) == shape(old) or sum(isinstance(n, str) for n in shape(old)) < 2
    require(known, f"its shape {shape(old)} has several dynamic sizes", old)
    with old.graph.inserting_before(old):
        new = call(target, arguments, value, old, **kwargs)
        result = reshape_like(new, old)
    old.replace_all_uses_with(result)
    drop_unused(old)
    return new


def call(target: Callable, arguments: tuple, value: object, like: fx.Node, **kwargs: object) -> fx.Node:
    """Add a call with an example value and the source location of `like`."""
    node = like.graph.call_function(target, arguments, kwargs)
    node.meta = {key: like.meta[key] for key in _KEPT_META if key in like.meta} | {"example_value": value}
    return node


def cast_like(matmul: fx.Node, operand: fx.Node) -> fx.Node:
    """Cast a floating operand to the dtype of a matmul's result, since autocast casts without a node."""
    dtype, value = value_of(matmul).dtype, value_of(operand)
    if not value.is_floating_point() or value.dtype == dtype:
        return operand
    return call(torch.Tensor.to, (operand, dtype), value.to(dtype), matmul)


def reshape_like(node: fx.Node, like: fx.Node) -> fx.Node:
    if shape(node) == shape(like):
        return node
    size = tuple(-1 if isinstance(n, str) else n for n in shape(like))
    return call(torch.reshape, (node, size), value_of(like), like)


def drop_unused(last: fx.Node) -> None:
    """Erase an unused operation, and nodes without side effects that only it read."""
    stack = [last]
    erased: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in erased or node.users or node.op != "call_function":
            continue
        if node is last or not mutated_inputs(node):
            stack += node.all_input_nodes
            erased.add(node)
            node.graph.erase_node(node)


def follow_uses(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Follow a value through views and no-ops; return the last and its only user, else raises `NoMatch`."""
    while True:
        require(len(node.users) == 1, "its result is used more than once", node)
        (user,) = node.users
        if user.op == "output" or (skip_noops(user) is user and not is_reshape(user)):
            return node, user
        node = user
