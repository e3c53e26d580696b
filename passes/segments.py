"""Splits a decoder into segments: graphs whose placeholders and outputs are values of other parts.

Blocks that differ in weights only have equal fingerprints, so one of them is compiled for all.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import sympy
import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import free_symbols

from river_compile.passes.decoder import find_decoder
from river_compile.passes.experts import as_expert_matmul
from river_compile.passes.nodes import as_linear, external_inputs, input_name, is_parameter, value_of
from river_compile.passes.program import DecoderPlan, Fingerprint, Refusal, RiverProgram, Segment

_SYMBOL = re.compile(r"\b[su]\d+\b")


def recognise(normal: fx.GraphModule, twins: bool = True) -> RiverProgram | Refusal:
    """Return the decoder in a normalized graph, split into segments; with `twins`, a Refusal if it can have none."""
    plan = find_decoder(normal)
    program = plan if isinstance(plan, Refusal) else split_segments(plan)
    if twins and isinstance(program, RiverProgram):
        return _without_matmuls(program) or program
    return program


def _without_matmuls(program: RiverProgram) -> Refusal | None:
    """Return why no block can have a 4-bit twin: no matmul reads ordinary weights."""
    nodes = [node for block in program.blocks for node in block.graph.nodes]
    if any(as_linear(node) or as_expert_matmul(node) for node in nodes):
        return None
    weights = [node for node in program.blocks[0].inputs if is_parameter(node)]
    largest = max(weights, key=lambda node: value_of(node).nbytes, default=None)
    holds = (
        "" if largest is None else f" ({input_name(largest)} is {value_of(largest).dtype} {[*value_of(largest).shape]})"
    )
    return Refusal(
        f"the layers have no linear layer with plain weights{holds}, so they cannot have twins; a model quantized by "
        "bitsandbytes, GPTQ or AWQ must be loaded in 16 bits",
        program.plan.blocks[0].path,
    )


def split_segments(plan: DecoderPlan) -> RiverProgram | Refusal:
    returned = plan.graph.output_node().args[0]
    if not isinstance(returned, (tuple, list)) or not all(isinstance(value, fx.Node) for value in returned):
        return Refusal("the graph returns something other than a flat tuple of values", "output")
    last = plan.num_blocks + 1
    blocks = tuple(_cut(plan, depth, "block") for depth in range(1, last))
    return RiverProgram(plan, tuple(returned), _cut(plan, 0, "prologue"), blocks, _cut(plan, last, "head"))


def _cut(plan: DecoderPlan, part: int, kind: str) -> Segment:
    nodes = [n for n in plan.graph.nodes if plan.part_of.get(n) == part]
    inputs = external_inputs(nodes)
    sizes = _sizes_of(plan, inputs, nodes)
    inputs = [n for n in inputs if n not in sizes] + sizes
    inside = set(nodes)
    outputs = [n for n in nodes if not inside.issuperset(n.users)]
    return Segment(
        kind, part, subgraph(plan.graph.owning_module, nodes, inputs, outputs), tuple(inputs), tuple(outputs)
    )


def subgraph(
    root: nn.Module | None, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.Graph:
    graph = fx.Graph(owning_module=root)
    new: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        new[node] = graph.placeholder(node.name)
        new[node].meta = node.meta.copy()
    for node in nodes:
        new[node] = graph.node_copy(node, lambda n: new[n])
    graph.output(tuple(new[n] for n in outputs))
    return graph


def with_shared_graphs(program: RiverProgram) -> RiverProgram:
    """Return the program with one graph for segments of equal fingerprints."""
    graphs: dict[Fingerprint, fx.Graph] = {}

    def shared(segment: Segment) -> Segment:
        mark = fingerprint(segment)
        return replace(segment, graph=graphs.setdefault(mark, segment.graph), fingerprint=mark)

    return replace(
        program,
        prologue=shared(program.prologue),
        blocks=tuple(map(shared, program.blocks)),
        head=shared(program.head),
        twins=tuple(map(shared, program.twins)),
        twin_head=None if program.twin_head is None else shared(program.twin_head),
    )


def fingerprint(segment: Segment) -> Fingerprint:
    """Digest targets, arguments and metadata of inputs; nodes and dynamic sizes are numbered, not named."""
    symbols: dict[str, str] = {}

    def rename(match: re.Match) -> str:
        return symbols.setdefault(match[0], f"size{len(symbols)}")

    lines = graph_lines(segment.graph)
    lines += [_SYMBOL.sub(rename, describe(value_of(n))) for n in segment.graph.find_nodes(op="placeholder")]
    # Placeholders of packed weights have no example: their shapes follow from the matmuls.
    lines.append(repr([(m.in_features, m.out_features, m.experts, m.group_size) for m in segment.packed]))
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return Fingerprint(digest, tuple(symbols))


def graph_lines(graph: fx.Graph) -> list[str]:
    """Return a line for each node; nodes are numbered in order."""
    number: dict[fx.Node, str] = {}
    lines = []
    for i, node in enumerate(graph.nodes):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _Name(number[n]))
        number[node] = f"%{i}"
        lines.append(f"{node.op} {target_name(node)} {args!r} {kwargs!r}")
    return lines


class _Name(str):
    """A node's number, printed bare so that it cannot be taken for a string argument."""

    def __repr__(self) -> str:
        return str(self)


def target_name(node: fx.Node) -> str:
    """Return a node's target as text, equal for equal targets."""
    if node.op in ("placeholder", "output"):
        return ""
    if node.op == "call_method":
        return node.target
    if node.op == "get_attr":
        return f"{node.target}@{id(operator.attrgetter(node.target)(node.graph.owning_module))}"
    target = node.target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}:{target!s}"


def describe(value: object) -> str:
    """Return an example value's metadata as text."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device} {value.requires_grad}"
    return repr(value)


def number_inputs(nodes: Iterable[fx.Node]) -> dict[sympy.Expr, fx.Node]:
    """Map symbols to the inputs that are dynamic numbers."""
    return {value_of(n).node.expr: n for n in nodes if isinstance(value_of(n), torch.SymInt)}


def _sizes_of(plan: DecoderPlan, inputs: list[fx.Node], nodes: list[fx.Node]) -> list[fx.Node]:
    """Return the placeholders of the dynamic sizes in a segment, in order of appearance."""
    values = [v for n in [*inputs, *nodes] if isinstance(v := value_of(n), (torch.Tensor, torch.SymInt))]
    symbols = dict.fromkeys(s for v in values for s in sorted(free_symbols(v), key=str))
    holders = number_inputs(plan.graph.find_nodes(op="placeholder"))
    return [holders[s] for s in symbols if s in holders]
