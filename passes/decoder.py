"""Finds the decoder in a traced graph: prologue, repeated blocks, their KV slots, head.

The blocks are the children of one ModuleList: consecutive indices, one class, no name of a model family anywhere. Each
node belongs to the block whose module it was traced in; nodes outside of every block go to the prologue, to the head
or, where they stand between two blocks and depend on one, to that block.

Not handled (refused with a reason): a graph that needs gradients, blocks that pass more than one hidden state on,
blocks that write no KV cache.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import torch
from torch import fx

from .nodes import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    ancestors,
    called,
    clean_path,
    is_hidden,
    memory_of,
    mutated_inputs,
    rank,
    read_by,
    value_of,
)
from .program import Block, DecoderPlan, KVSlot, Refusal

# `...layers.5`, `...layers[5]` and `getattr(...layers, '5')` all name child 5 of a module list.
_CHILD = re.compile(r"^(?P<list>.*?)(?:\.|\[|, ')(?P<index>\d+)(?:'\)|\])?$")
_MIN_BLOCKS = 2


def find_decoder(graph_module: fx.GraphModule) -> DecoderPlan | Refusal:
    """Returns the decoder in a graph traced by Dynamo, or the reason why there is none."""
    graph = graph_module.graph
    list_path = _block_list(graph)
    if list_path is None:
        return Refusal("no decoder blocks: the graph holds no list of two or more modules of one class")
    num_blocks = 1 + max(i for node in graph.nodes for i, *_ in _children(node, list_path))
    part_of = _assign_parts(graph, list_path, num_blocks)
    if isinstance(part_of, Refusal):
        return part_of
    flows = _hidden_flows(part_of, num_blocks)
    if isinstance(flows, Refusal):
        return flows
    blocks = []
    for index, (before, after) in enumerate(itertools.pairwise(flows)):
        path = f"{clean_path(list_path)}.{index}"
        kv = _kv_slot([n for n, part in part_of.items() if part == index + 1], after)
        if kv is None:
            return Refusal("the blocks write no KV cache (generation keeps one: use_cache=True)", path)
        blocks.append(Block(index, path, before, after, kv))
    batch, query_length = value_of(flows[0]).shape[:2]
    return DecoderPlan(graph_module, tuple(blocks), part_of, query_length, batch)


def _children(node: fx.Node, list_path: str | None = None) -> Iterator[tuple[int, str, str]]:
    """Yields index, list path and class for each module on a node's stack that is a numbered child."""
    for path, cls in (node.meta.get("nn_module_stack") or {}).values():
        match = _CHILD.match(path)
        if match and (list_path is None or match["list"] == list_path):
            name = f"{cls.__module__}.{cls.__qualname__}" if isinstance(cls, type) else cls
            yield int(match["index"]), match["list"], name


def _block_list(graph: fx.Graph) -> str | None:
    """Returns the path of the outermost module list whose children are of one class and numbered 0..n-1."""
    seen: dict[str, dict[int, str]] = {}
    for node in graph.nodes:
        for index, path, name in _children(node):
            seen.setdefault(path, {})[index] = name
    candidates = [
        path
        for path, members in seen.items()
        if len(members) >= _MIN_BLOCKS
        and sorted(members) == list(range(len(members)))
        and len(set(members.values())) == 1
    ]
    # A mixture of experts keeps a list of experts inside each block: the blocks are the outermost list.
    outermost = [p for p in candidates if not any(p != q and p.startswith(q) for q in candidates)]
    return max(outermost, key=lambda path: len(seen[path]), default=None)


def _assign_parts(graph: fx.Graph, list_path: str, num_blocks: int) -> dict[fx.Node, int] | Refusal:
    """Assigns each node to prologue (0), block (1..L) or head (L + 1); the parts run in that order."""
    written = {memory_of(m) for node in graph.nodes for m in mutated_inputs(node)}
    part_of: dict[fx.Node, int] = {}
    reached = 0
    for nodes in _inseparable(graph):
        read = read_by(nodes)
        before = max((part_of.get(a, 0) for a in read), default=0)
        children = {index for node in nodes for index, *_ in itertools.islice(_children(node, list_path), 1)}
        if len(children) > 1:
            return Refusal(
                "autocast changes around several blocks at once; put it around the whole model", nodes[0].name
            )
        if children:
            part = max(children) + 1
            if part < max(before, reached):
                return Refusal(
                    f"the blocks do not run one after the other: block {part - 1} follows block {reached - 1}",
                    nodes[0].name,
                )
            reached = part
        elif before == 0 and written.isdisjoint(map(memory_of, read)):
            part = 0  # depends on the inputs alone: it may as well run first
        elif before == num_blocks or (reached == num_blocks and before):
            part = num_blocks + 1
        else:
            part = max(before, reached)
        part_of |= dict.fromkeys(nodes, part)
    return part_of


def _inseparable(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Yields the operations in order: each alone, those between a change of autocast and its end together."""
    together: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            together.append(node)
            depth += called(node, ENTER_AUTOCAST) - called(node, EXIT_AUTOCAST)
            if not depth:
                yield together
                together = []


def _hidden_flows(part_of: dict[fx.Node, int], num_blocks: int) -> tuple[fx.Node, ...] | Refusal:
    """Returns the L + 1 hidden states: into block 1, between the blocks, and out of the last one."""

    def crossing(boundary: int) -> list[fx.Node]:
        return [
            node
            for node, part in part_of.items()
            if part == boundary
            and is_hidden(node)
            and any(part_of.get(user, num_blocks + 1) == boundary + 1 for user in node.users)
        ]

    between = [crossing(boundary) for boundary in range(1, num_blocks + 1)]
    # The prologue also hands out cosines and sines [B, T, head_dim]; the hidden state has the shape of the later ones.
    first = crossing(0)
    if between[0]:
        first = [n for n in first if value_of(n).shape == value_of(between[0][0]).shape]
    if len(first) > 1:
        first = [n for n in first if any("embedding" in getattr(a.target, "__name__", "") for a in ancestors([n]))]
    for boundary, nodes in enumerate([first, *between]):
        if len(nodes) != 1:
            found = ", ".join(n.name for n in nodes) or "none"
            return Refusal(
                f"one hidden state must pass from part {boundary} to part {boundary + 1} of {num_blocks} blocks, "
                f"found {len(nodes)}: {found}",
                nodes[0].name if nodes else "",
            )
    return (first[0], *(nodes[0] for nodes in between))


def _kv_slot(nodes: list[fx.Node], hidden_out: fx.Node) -> KVSlot | None:
    """Finds what a block writes for its tokens: in-place writes to 4-D tensors, or 4-D tensors that it returns."""
    static = [n for n in nodes for m in mutated_inputs(n) if rank(m) == 4 and _outlives(memory_of(m), nodes)]
    if static:
        lengths = [m for n in nodes for m in mutated_inputs(n) if m.op == "placeholder" and rank(m) == 0]
        # (Other caches than those written by `index_copy_(dim, position, new)` roll and never overflow.)
        sizes = (value_of(n.args[0]).shape[n.args[1]] for n in static if n.target is torch.Tensor.index_copy_)
        size = next(sizes, None)
        capacity = size if isinstance(size, int) else None
        return KVSlot("static", tuple(static), tuple(dict.fromkeys(lengths)), capacity)
    returned = [n for n in nodes if rank(n) == 4 and n is not hidden_out and any(u.op == "output" for u in n.users)]
    return KVSlot("dynamic", tuple(returned)) if returned else None


def _outlives(memory: fx.Node, nodes: list[fx.Node]) -> bool:
    """True for memory of the caller: an input, or a tensor that the graph makes and returns (a prompt's new cache)."""
    return memory not in nodes or any(user.op == "output" for user in memory.users)
