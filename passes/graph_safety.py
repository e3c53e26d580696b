"""Tells what a captured step may take for granted, from the graph alone.

A captured graph replays the same kernels on the same addresses. So three things are asked of the traced graph: which
inputs keep their address from token to token, which operations cannot be captured, and whether a block may run a second
time for the same token (a block that was launched ahead of its exit check runs again as a twin).

Not seen here: what only shows when the code runs, such as an operator that waits for the device inside. The capture
itself finds that out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols

from .nodes import is_parameter, is_tensor, memory_of, mutated_inputs, source_of, value_of
from .program import Block, DecoderPlan, Refusal, Segment


def fixed_inputs(plan: DecoderPlan) -> frozenset[fx.Node]:
    """Returns the placeholders whose memory the caller keeps: parameters, and what the graph writes in place.

    All others may be copied into a buffer, because nobody looks at them after the step.
    """
    graph = plan.graph_module.graph
    fixed = {n for n in graph.nodes if n.op == "placeholder" and (is_parameter(n) or _is_marked(n))}
    fixed |= {memory_of(m) for node in graph.nodes for m in mutated_inputs(node)}
    return frozenset(n for n in fixed if n.op == "placeholder")


def obstacle(segment: Segment, home: torch.device) -> Refusal | None:
    """Returns why a segment cannot be captured, naming the node and its source line; None where nothing speaks against.

    Captured kernels cannot tell the host a size, and a captured copy from ordinary host memory would repeat the bytes
    that lay there at capture.

    Args:
        segment: the segment.
        home: the device of the hidden state.
    """
    for node in (n for n in segment.graph.nodes if n.op != "output"):
        value = value_of(node)
        if isinstance(value, (torch.Tensor, torch.SymInt)) and free_unbacked_symbols(value):
            return Refusal("the size of a value depends on the data", source_of(node))
        if node.target in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy):
            return Refusal("a value is read on the host", source_of(node))
        if is_tensor(node) and value.device != home:
            return Refusal(f"a value lies on {value.device}, the hidden state on {home}", source_of(node))
    return None


@dataclass(frozen=True)
class HostNumber:
    """A number that a segment hands on and that follows from other numbers, so that the host can compute it.

    Attributes:
        node: the number.
        inputs: the numbers it follows from.
        compute: the function of their values.
    """

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    compute: Callable[..., int]


def host_numbers(segment: Segment) -> tuple[HostNumber, ...]:
    """Returns the numbers among a segment's outputs (sliding-window caches count their tokens in one)."""
    holders = {value_of(n).node.expr: n for n in segment.inputs if isinstance(value_of(n), torch.SymInt)}
    numbers = []
    for node in segment.outputs:
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            symbols = sorted(value.node.expr.free_symbols, key=str)
            inputs = tuple(holders[s] for s in symbols)
            numbers.append(HostNumber(node, inputs, sympy.lambdify(symbols, value.node.expr, "math")))
        elif isinstance(value, int):
            numbers.append(HostNumber(node, (), lambda value=value: value))
    return tuple(numbers)


def idle_numbers(segment: Segment) -> frozenset[fx.Node]:
    """Returns the numbers among a segment's inputs that no tensor in it depends on."""
    nodes = list(segment.graph.nodes)
    tensors = [n for n in nodes if is_tensor(n) or (n.op not in ("placeholder", "output") and value_of(n) is None)]
    used = {s for n in tensors if is_tensor(n) for s in free_symbols(value_of(n))}
    feeding = {a for n in tensors for a in n.all_input_nodes}
    stack = [n for n in feeding if isinstance(value_of(n), torch.SymInt)]
    for node in stack:  # (grows while it is walked: numbers that numbers are made of)
        stack.extend(a for a in node.all_input_nodes if a not in stack)
    used |= {s for n in stack for s in free_symbols(value_of(n))}
    return frozenset(
        n for n in segment.inputs if isinstance(value_of(n), torch.SymInt) and not free_symbols(value_of(n)) & used
    )


def runs_once(plan: DecoderPlan, block: Block) -> Refusal | None:
    """Returns why a block must not run a second time for the same token; None where it may, its counters taken back.

    It may where everything that it writes in place is either a counter, advanced once by one, or a KV tensor, written
    by ``index_copy_`` alone at positions that follow from the counters and from inputs that nobody changes, and read
    only after it was written. With the counters taken back, a second run computes the same positions, so its entries
    cover those of the first before anything reads them.
    """
    nodes = [n for n, part in plan.part_of.items() if part == block.index + 1]
    inside = set(nodes)
    counters: set[fx.Node] = set()
    for node in nodes:
        for written in mutated_inputs(node):
            if _is_counter_step(node, written) and written not in counters:
                counters.add(written)
            elif memory_of(written) not in inside and not _writes_slot(node):
                return Refusal("it changes a value otherwise than by writing to a slot or counting", source_of(node))
    for node in nodes:
        if _writes_slot(node):
            early = next((n for n in nodes if _reads_before(n, node, nodes)), None)
            if early is not None:
                return Refusal("it reads the KV cache before it writes to it", source_of(early))
            bad = _depends_on_more(node.args[2], inside, counters)
            if bad is not None:
                return Refusal("the slot that it writes to depends on more than counters and inputs", source_of(bad))
    return None


def _is_marked(node: fx.Node) -> bool:
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def _writes_slot(node: fx.Node) -> bool:
    return node.target is torch.Tensor.index_copy_ and node.args[0].op == "placeholder"


def _is_counter_step(node: fx.Node, written: fx.Node) -> bool:
    return (
        node.target is torch.Tensor.add_
        and written.op == "placeholder"
        and is_tensor(written)
        and value_of(written).dim() == 0
        and len(node.args) == 2
        and node.args[1] == 1
        and isinstance(node.args[1], int)
        and not node.kwargs
    )


def _reads_before(node: fx.Node, write: fx.Node, nodes: list[fx.Node]) -> bool:
    """True where a node reads the tensor that `write` fills, and stands before it (another write to it does too)."""
    return write.args[0] in node.all_input_nodes and nodes.index(node) < nodes.index(write)


def _depends_on_more(position: fx.Node, inside: set[fx.Node], counters: set[fx.Node]) -> fx.Node | None:
    """Returns a node that a slot position is computed from and that another run might find changed."""
    stack, seen = [position], set()
    while stack:
        node = stack.pop()
        if node in seen or not isinstance(node, fx.Node):
            continue
        seen.add(node)
        if node in inside:
            stack.extend(node.all_input_nodes)
        elif node not in counters and node.op == "placeholder" and is_tensor(node) and value_of(node).dim() == 4:
            return node  # a KV tensor
        elif node.op != "placeholder" and is_tensor(node) and value_of(node).is_floating_point():
            return node  # a hidden state
    return None
