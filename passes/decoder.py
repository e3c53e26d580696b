"""Finds the decoder in a traced graph: embedding stage, blocks (children of one ModuleList), their KV caches, head.

Not handled (a Refusal): blocks that pass on more than one hidden state, blocks that write no cache.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg

from river_compile.passes.nodes import (
    ancestors,
    clean_path,
    external_inputs,
    hints_of,
    is_hidden,
    is_parameter,
    is_streams,
    memory_of,
    mutated_inputs,
    nesting,
    rank,
    shape,
    value_of,
)
from river_compile.passes.program import Block, DecoderPlan, KVSlot, Refusal

# `...layers.5`, `...layers[5]` and `getattr(...layers, '5')` all name child 5 of a module list.
_CHILD = re.compile(r"^(?P<list>.*?)(?:\.|\[|, ')(?P<index>\d+)(?:'\)|\])?$")
_MIN_BLOCKS = 2
_MIN_CACHE_RANK = 3  # of the state of a recurrence or convolution; keys and values have four dimensions


def find_decoder(graph_module: fx.GraphModule) -> DecoderPlan | Refusal:
    refusals = []
    for list_path, num_blocks in _module_lists(graph_module.graph):
        plan = _decoder_of(graph_module, list_path, num_blocks)
        if isinstance(plan, DecoderPlan):
            return plan
        refusals.append(plan)
    return next(iter(refusals), Refusal("no decoder layers: the graph holds no list of two or more modules"))


def _decoder_of(graph_module: fx.GraphModule, list_path: str, num_blocks: int) -> DecoderPlan | Refusal:
    graph = graph_module.graph
    part_of = _assign_parts(graph, list_path, num_blocks)
    if isinstance(part_of, Refusal):
        return part_of
    flows = _hidden_flows(graph, part_of, num_blocks)
    if isinstance(flows, Refusal):
        return flows
    blocks = []
    for index, (before, after) in enumerate(itertools.pairwise(flows)):
        path = f"{clean_path(list_path)}.{index}"
        kv = _kv_slot([n for n, part in part_of.items() if part == index + 1], before, after)
        blocks.append(Block(index, path, before, after, kv))
    if not any(block.kv.writes for block in blocks):
        return Refusal("the layers write no KV cache (generation keeps one: use_cache=True)", blocks[0].path)
    axis = _token_axis(flows[0])
    if axis is None:
        return Refusal("it is ambiguous which axis of the hidden state counts tokens", flows[0].name)
    batch, query_length = value_of(flows[0]).shape[axis - 1 : axis + 1]
    return DecoderPlan(graph, tuple(blocks), part_of, query_length, batch, axis)


def _module_lists(graph: fx.Graph) -> list[tuple[str, int]]:
    """Return path and length of the outermost module lists, the last to run first."""
    # A mixture of experts has a list inside each block; a vision tower runs before the decoder.
    seen: dict[str, set[int]] = {}
    last: dict[str, int] = {}
    for place, node in enumerate(graph.nodes):
        for index, path in _children(node):
            seen.setdefault(path, set()).add(index)
            last[path] = place
    lists = [p for p, found in seen.items() if len(found) >= _MIN_BLOCKS and found == set(range(len(found)))]
    outermost = [p for p in lists if not any(p != q and p.startswith(q) for q in lists)]
    return [(path, len(seen[path])) for path in sorted(outermost, key=last.__getitem__, reverse=True)]


def _children(node: fx.Node, list_path: str | None = None) -> Iterator[tuple[int, str]]:
    """Yield index and list path of each module on a node's stack that is a numbered child."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        match = _CHILD.match(path)
        if match and (list_path is None or match["list"] == list_path):
            yield int(match["index"]), match["list"]


def _assign_parts(graph: fx.Graph, list_path: str, num_blocks: int) -> dict[fx.Node, int] | Refusal:
    """Assign each node to the embedding stage (0), block (1..L) or head (L + 1): by its module, else by its inputs."""
    written = {memory_of(m) for node in graph.nodes for m in mutated_inputs(node)}
    part_of: dict[fx.Node, int] = {}
    reached = 0
    for nodes in _inseparable(graph):
        read = external_inputs(nodes)
        before = max((part_of.get(a, 0) for a in read), default=0)
        children = {index for node in nodes for index, *_ in itertools.islice(_children(node, list_path), 1)}
        if len(children) > 1:
            return Refusal(
                "autocast (or a vmap) begins and ends around several layers; put it around the whole model",
                nodes[0].name,
            )
        if children:
            part = max(children) + 1
            if part < max(before, reached):
                return Refusal(
                    f"the layers do not run one after the other: layer {part - 1} follows layer {reached - 1}",
                    nodes[0].name,
                )
            reached = part
        elif before == 0 and written.isdisjoint(map(memory_of, read)):
            part = 0  # depends on inputs only, so it can run first
        elif before == num_blocks or (reached == num_blocks and before):
            part = num_blocks + 1
        else:
            part = max(before, reached)
        part_of |= dict.fromkeys(nodes, part)
    for node in reversed(part_of):  # values before the blocks that only the head reads, such as a norm's 1 + weight
        if part_of[node] == 0 and node.users and all(part_of.get(user) == num_blocks + 1 for user in node.users):
            part_of[node] = num_blocks + 1
    return part_of


def _inseparable(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Yield the operations in order: one by one, but those of an autocast or a ``vmap`` together."""
    together: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            together.append(node)
            depth += nesting(node)
            if not depth:
                yield together
                together = []


def _hidden_flows(graph: fx.Graph, part_of: dict[fx.Node, int], num_blocks: int) -> tuple[fx.Node, ...] | Refusal:
    """Return the L + 1 hidden states ``[B, T, D]``, or else several streams in one tensor each."""
    one = _flows(graph, part_of, num_blocks, is_hidden)
    several = _flows(graph, part_of, num_blocks, is_streams) if isinstance(one, Refusal) else one
    return one if isinstance(several, Refusal) else several


def _flows(
    graph: fx.Graph, part_of: dict[fx.Node, int], num_blocks: int, is_state: Callable[[fx.Node], bool]
) -> tuple[fx.Node, ...] | Refusal:

    def crossing(boundary: int, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        hidden = [n for n in nodes if part_of.get(n, 0) == boundary and is_state(n)]
        found = [n for n in hidden if any(part_of.get(user) == boundary + 1 for user in n.users)]
        if not found and boundary == num_blocks:  # a model without a head
            found = [n for n in hidden if any(user.op == "output" for user in n.users)]
        return found

    between = [crossing(boundary, part_of) for boundary in range(1, num_blocks + 1)]
    everywhere = set.intersection(*({shape(n) for n in nodes} for nodes in between))
    if everywhere:  # keys that another block reads may look like a hidden state, but cross one boundary only
        between = [[n for n in nodes if shape(n) in everywhere] for nodes in between]
    # The embedding stage also returns cosines and sines [B, T, head_dim], whose shape differs from later hidden states.
    first = crossing(0, [n for n in graph.nodes if not is_parameter(n)])
    if between[0]:
        first = [n for n in first if shape(n) == shape(between[0][0])]
    if len(first) > 1:
        first = [n for n in first if any("embedding" in getattr(a.target, "__name__", "") for a in ancestors([n]))]
    for boundary, nodes in enumerate([first, *between]):
        if len(nodes) != 1:
            found = ", ".join(n.name for n in nodes) or "none"
            return Refusal(
                f"one hidden state must pass from part {boundary} to part {boundary + 1} of {num_blocks} layers, "
                f"found {len(nodes)}: {found}",
                nodes[0].name if nodes else "",
            )
    return (first[0], *(nodes[0] for nodes in between))


def _token_axis(hidden: fx.Node) -> int | None:
    """Return the axis of tokens in the first hidden state, right after that of rows; None if it is ambiguous."""
    if is_hidden(hidden):
        return 1
    # [S, B, T, D] or [B, T, S, D]: compare with the embedding [B, T, D] that the streams are made of.
    *rows, width = shape(hidden)
    made_of = [shape(n) for n in ancestors([hidden]) if is_hidden(n) and shape(n)[-1] == width]
    axes = {axis for axis in (1, 2) for *found, _ in made_of if rows[axis - 1 : axis + 1] == found}
    return min(axes, default=None)


def _kv_slot(nodes: list[fx.Node], hidden_in: fx.Node, hidden_out: fx.Node) -> KVSlot:
    """Return a block's cache: tensors of the caller that it writes, or longer ones that it returns."""
    static = [
        (node, memory)
        for node in nodes
        for written in mutated_inputs(node)
        if (rank(written) or 0) >= _MIN_CACHE_RANK and _outlives(memory := memory_of(written), hidden_in)
    ]
    in_place = [node for node, _ in static]
    kept = {memory for _, memory in static}
    returned = [
        node
        for node in nodes
        if (rank(node) or 0) >= _MIN_CACHE_RANK and node is not hidden_out and memory_of(node) not in kept
        if any(user.op == "output" for user in node.users)
    ]
    if returned:
        return KVSlot("dynamic", (*returned, *in_place))
    lengths = [m for n in nodes for m in mutated_inputs(n) if m.op == "placeholder" and rank(m) == 0]
    # Caches that are not written by `index_copy_(dim, position, new)` roll and never overflow.
    sizes = (value_of(n.args[0]).shape[n.args[1]] for n in in_place if n.target is torch.Tensor.index_copy_)
    return KVSlot("static", tuple(in_place), tuple(dict.fromkeys(lengths)), next(sizes, None))


def _outlives(memory: fx.Node, hidden_in: fx.Node) -> bool:
    """Whether memory outlives the call: an input, or a tensor that the graph returns (a prompt's new cache)."""
    lasts = memory.op == "placeholder" or any(user.op == "output" for user in memory.users)
    return lasts and memory is not memory_of(hidden_in)


_EXAMPLE = "example_value"


def with_size(graph: fx.Graph, symbol: sympy.Symbol, size: int) -> fx.GraphModule:
    """Return a copy of a traced graph in which a dynamic size is a constant; raise what its operators raise.

    Inputs and nodes that are constants then are dropped. The model's Python code must not have branched on the size.
    """
    new = fx.Graph(owning_module=graph.owning_module)
    made: dict[fx.Node, Any] = {}  # the new node or a number
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
    """Run operators on the graph's fake tensors and record what they assume of sizes."""
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
    """Return an input's example with the size substituted; the same object if nothing changes."""
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
