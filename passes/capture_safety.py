"""Derives from the graph alone the invariants of a step that is captured as a CUDA graph.

These are which inputs keep their address from token to token, and which operations cannot be captured.

Not handled: what only shows when the code runs, such as an operator that waits for the device inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols

from river_compile.passes.nodes import (
    ancestors,
    called,
    is_tensor,
    memory_of,
    mutated_inputs,
    source_of,
    value_of,
)
from river_compile.passes.program import DecoderPlan, Refusal, Segment
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
