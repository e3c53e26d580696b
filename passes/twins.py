"""Makes river twins: a decoder block's graph with 4-bit matrix products in place of its linears.

Everything else of the block is kept, node for node, so that a twin reads and writes exactly what its block does: the
same hidden state, the same KV slots, the same counters. Linears that share an input become one product whose result is
split, which halves the number of kernels of a block (q|k|v, gate|up, the MLP too where it is parallel to attention).

On request a twin's linears may have their inputs scaled: see :mod:`river_compile.passes.input_scales`.

Not handled: weights that are not two-dimensional parameters (stacked experts); they stay in 16 bits and are told.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import fx

from river_compile.kernels import ops  # noqa: F401  (registers river::linear)
from river_compile.kernels.quant.grid import fitting_group_size

from .input_scales import InputScale, find_input_scale, scale_inputs
from .nodes import Linear, as_linear, input_name, is_parameter, mutated_inputs, value_of
from .program import KeptLinear, LinearSite, Segment

MIN_GROUP_SIZE = 32  # the smallest group that the 4-bit kernels know


def make_twin(
    block: Segment,
    group_size: int,
    layout: str,
    scaled: bool = False,
    keep: Mapping[str, str] | None = None,
) -> tuple[Segment, tuple[KeptLinear, ...]]:
    """Turns a block's segment into its river twin.

    Args:
        block: a segment of its own (its graph is changed).
        group_size: requested group size; each matrix takes the largest power of two below it that divides its input
            features.
        layout: name of the packing that the 4-bit weights will have.
        scaled: whether inputs are scaled where that costs nothing.
        keep: names of sites (`LinearSite.name`) that stay in 16 bits, each with the reason.

    Returns:
        The twin and the block's matrices that stay in 16 bits, each with the reason.
    """
    graph = block.graph_module.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    source_of = dict(zip(placeholders, block.inputs, strict=True))
    sites: list[LinearSite] = []
    kept: dict[fx.Node, KeptLinear] = {}
    for linears in _sharing_inputs(graph):
        fitting = fitting_group_size(linears[0].in_features, group_size)
        reason = (keep or {}).get(_name(linears), "")
        if fitting < MIN_GROUP_SIZE:
            reason = f"{linears[0].in_features} input features have no group of {MIN_GROUP_SIZE} or more"
        if reason:
            kept.update({source_of[linear.weight]: KeptLinear(linear.name, reason) for linear in linears})
            continue
        nodes = [linear.node for linear in linears]
        scale = find_input_scale(linears[0].x, nodes, linears[0].in_features) if scaled else None
        sites.append(_site(linears, source_of, fitting, layout, scale))
        _replace(graph, linears, sites[-1], len(sites) - 1, scale)
    written = {source_of.get(mutated) for node in graph.nodes for mutated in mutated_inputs(node)}
    for node in _unread_matrices(block, sites, {*kept, *written}):
        reason = f"a weight of shape {tuple(value_of(node).shape)} that no plain linear layer reads"
        kept[node] = KeptLinear(input_name(node), reason)
    _drop_unused_weights(graph)
    inputs = tuple(source_of[n] for n in graph.nodes if n.op == "placeholder" and n in source_of)
    _relax_views(graph)
    block.graph_module.recompile()
    return replace(block, inputs=inputs, packed=tuple(sites)), tuple(kept.values())


def _name(linears: list[Linear]) -> str:
    return "|".join(linear.name for linear in linears)


def _site(
    linears: list[Linear],
    source_of: dict[fx.Node, fx.Node],
    group_size: int,
    layout: str,
    scale: InputScale | None,
) -> LinearSite:
    return LinearSite(
        name=_name(linears),
        weights=tuple(source_of[linear.weight] for linear in linears),
        biases=tuple(source_of[linear.bias] if linear.bias else None for linear in linears),
        in_features=linears[0].in_features,
        out_features=tuple(linear.out_features for linear in linears),
        transposed=linears[0].transposed,
        group_size=group_size,
        layout=layout,
        scales_inputs=scale is not None,
        folds=tuple(source_of[parameter] for parameter in scale.parameters) if scale else (),
    )


def _sharing_inputs(graph: fx.Graph) -> list[list[Linear]]:
    """Returns the linears in order, those together that read the same value in the same way."""
    groups: dict[tuple[fx.Node, bool], list[Linear]] = {}
    for linear in filter(None, map(as_linear, graph.nodes)):
        groups.setdefault((linear.x, linear.transposed), []).append(linear)
    return list(groups.values())


def _replace(graph: fx.Graph, linears: list[Linear], site: LinearSite, index: int, scale: InputScale | None) -> None:
    """Puts one ``river::linear`` in place of linears that share an input, and splits what it gives."""
    names = ["qweight", "scale_zero", *(["bias"] if site.has_bias else [])]
    scaled = [f"scaled_{i}" for i in range(max(1, len(site.folds)))] if scale else []
    new = _placeholders(graph, [f"river_{index}_{name}" for name in (*names, *scaled)])
    bias = new[2] if site.has_bias else None
    x = scale_inputs(graph, linears[0].x, scale, tuple(new[len(names) :])) if scale else linears[0].x
    first = linears[0].node
    with graph.inserting_before(first):
        merged = graph.call_function(
            torch.ops.river.linear.default,
            (x, new[0], new[1], bias, sum(site.out_features), site.group_size, site.layout),
        )
        x = value_of(linears[0].x)
        merged.meta = first.meta | {"example_value": x.new_empty((*x.shape[:-1], sum(site.out_features)))}
        if len(linears) == 1:
            first.replace_all_uses_with(merged)
        else:
            parts = graph.call_function(torch.split, (merged, list(site.out_features), -1))
            parts.meta["example_value"] = tuple(value_of(linear.node) for linear in linears)
            for i, linear in enumerate(linears):
                part = graph.call_function(operator.getitem, (parts, i))
                part.meta["example_value"] = value_of(linear.node)
                linear.node.replace_all_uses_with(part)
    for linear in reversed(linears):
        graph.erase_node(linear.node)


def _placeholders(graph: fx.Graph, names: list[str]) -> list[fx.Node]:
    """Adds placeholders behind those that are there."""
    found = []
    for name in names:
        with graph.inserting_after([n for n in graph.nodes if n.op == "placeholder"][-1]):
            found.append(graph.placeholder(name))
    return found


def _unread_matrices(block: Segment, sites: list[LinearSite], known: Collection[fx.Node]) -> Iterator[fx.Node]:
    """Yields the block's matrices that no linear of a known form reads: stacked experts, for one.

    Args:
        block: the block.
        sites: its 4-bit products.
        known: other matrices to leave out: those that are told already, and KV caches, which Dynamo marks alike.
    """
    read = {weight for site in sites for weight in site.weights} | set(known)
    for node in block.inputs:
        if is_parameter(node) and value_of(node).dim() >= 2 and node not in read:
            yield node


def _drop_unused_weights(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "placeholder" or node.target is torch.t):
            graph.erase_node(node)


def _relax_views(graph: fx.Graph) -> None:
    """A slice of a merged product has gaps between its rows; ``reshape`` takes what ``view`` may refuse."""
    for node in graph.nodes:
        if node.target is torch.Tensor.view and isinstance(node.args[1], tuple):
            node.target = torch.reshape
