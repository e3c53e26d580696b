"""Derives from the graph alone the invariants of a step that is captured as a CUDA graph.

These are which inputs keep their address from token to token, which operations cannot be captured, and whether a block
may run a second time for the same token (a block that was launched ahead of its exit check runs again as a twin).

Not handled: what only shows when the code runs, such as an operator that waits for the device inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols
from torch.fx.node import Argument

from river_compile.passes.nodes import (
    ancestors,
    called,
    closure,
    is_tensor,
    memory_of,
    mutated_inputs,
    rank,
    source_of,
    value_of,
)
from river_compile.passes.program import Block, DecoderPlan, Refusal, Segment
from river_compile.passes.segments import number_inputs


def fixed_inputs(plan: DecoderPlan) -> frozenset[fx.Node]:
    """Returns the placeholders whose memory the caller keeps: parameters, and tensors written in place.

    All others may be copied into a buffer, because nobody looks at them after the step.
    """
    graph, marked = plan.graph, "_dynamo_static_input_type"
    written = {memory_of(m) for node in graph.nodes for m in mutated_inputs(node)}
    placeholders = graph.find_nodes(op="placeholder")
    return frozenset(n for n in placeholders if n in written or marked in n.meta.get("tensor_dict", {}))


def obstacle(segment: Segment, home: torch.device) -> Refusal | None:
    """Returns why a segment cannot be captured, naming the node and its source line; None if it can.

    Captured kernels cannot report a size to the host, and a captured copy from ordinary host memory would repeat the
    bytes that lay there at capture. `home` is the device of the hidden state.
    """
    for node in (n for n in segment.graph.nodes if n.op != "output"):
        value = value_of(node)
        if isinstance(value, (torch.Tensor, torch.SymInt)) and free_unbacked_symbols(value):
            return Refusal("the size of a value depends on the data", source_of(node))
        if called(node, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy):
            return Refusal("a value is read on the host", source_of(node))
        if is_tensor(node) and value.device != home:
            return Refusal(f"a value lies on {value.device}, the hidden state on {home}", source_of(node))
    return None


@dataclass(frozen=True)
class HostNumber:
    """A number that a segment hands on, which the host can compute from the values of other numbers, its inputs."""

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    compute: Callable[..., int]


def host_numbers(segment: Segment) -> tuple[HostNumber, ...]:
    """Returns the numbers among a segment's outputs (sliding-window caches count their tokens in one)."""
    holders = number_inputs(segment.inputs)
    numbers: list[HostNumber] = []
    for node in segment.outputs:
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            symbols = sorted(value.node.expr.free_symbols, key=str)
            inputs = tuple(holders[s] for s in symbols)
            numbers.append(HostNumber(node, inputs, sympy.lambdify(symbols, value.node.expr, "math")))
        elif isinstance(value, int):
            numbers.append(HostNumber(node, (), lambda value=value: value))
    return tuple(numbers)


def idle_numbers(segment: Segment) -> frozenset[int]:
    """Returns which of a segment's inputs are numbers that no tensor in it depends on, by their places."""
    inputs = segment.graph.find_nodes(op="placeholder")[: len(segment.inputs)]
    numbers = {place: free_symbols(value_of(n)) for place, n in enumerate(inputs) if _is_number(n)}
    if not numbers:
        return frozenset()
    operations = [n for n in segment.graph.nodes if n.op not in ("placeholder", "output")]
    tensors = [n for n in segment.graph.nodes if is_tensor(n)]
    readers = {*tensors, *(n for n in operations if value_of(n) is None)}
    feeding = ancestors(a for n in readers for a in n.all_input_nodes if _is_number(a))
    used = {s for n in (*tensors, *filter(_is_number, feeding)) for s in free_symbols(value_of(n))}
    return frozenset(place for place, symbols in numbers.items() if not symbols & used)


def _is_number(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.SymInt)


def runs_once(plan: DecoderPlan, block: Block) -> Refusal | None:
    """Returns why a block must not run a second time for the same token; None if it may, its counters taken back.

    It may where everything that it writes in place is either a counter, advanced once by one, or a KV tensor, written
    by ``index_copy_`` alone at positions that follow from the counters and from inputs that nobody changes, and read
    only after it was written: then a second run's entries cover those of the first before anything reads them.
    """
    nodes = {n: i for i, n in enumerate(n for n, part in plan.part_of.items() if part == block.index + 1)}
    counters: set[fx.Node] = set()
    for node in nodes:
        for written in mutated_inputs(node):
            if is_counter_step(node, written) and written not in counters:
                counters.add(written)
            elif memory_of(written) not in nodes and not _writes_slot(node):
                return Refusal("it changes a value otherwise than by writing to a slot or counting", source_of(node))
    for write, place in nodes.items():
        if not _writes_slot(write):
            continue
        cache, _, position, _ = write.args
        early = next((user for user in cache.users if nodes.get(user, place) < place), None)
        if early is not None:
            return Refusal("it reads the KV cache before it writes to it", source_of(early))
        sources = closure([position], lambda n: n.all_input_nodes if n in nodes else ())
        bad = min((n for n in sources if n not in nodes and n not in counters and _may_change(n)), default=None)
        if bad is not None:
            return Refusal("the slot that it writes to depends on more than counters and inputs", source_of(bad))
    return None


def _writes_slot(node: fx.Node) -> bool:
    return called(node, torch.Tensor.index_copy_) and node.args[0].op == "placeholder"


def is_counter_step(node: fx.Node, written: fx.Node, by: Argument = 1) -> bool:
    """True if a node adds a number, in place, to a counter of tokens: one that the graph is given as a tensor."""
    adds = called(node, torch.Tensor.add_) and node.args[1:] == (by,) and isinstance(node.args[1], (int, fx.Node))
    return adds and not node.kwargs and written.op == "placeholder" and rank(written) == 0


def _may_change(node: fx.Node) -> bool:
    """True for a value from outside of a block that another run might find changed: a KV tensor, a hidden state."""
    if node.op == "placeholder":
        return rank(node) == 4
    return is_tensor(node) and value_of(node).is_floating_point()
