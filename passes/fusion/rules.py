"""Fuses nodes of blocks, twins and heads into operators of the kernels, and records which rule did not match.

A rule changes the graph if all its conditions hold, else raises `NoMatch` and changes nothing (docs/kernels.md).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from river_compile.kernels import ops  # noqa: F401  (registers the operators)
from river_compile.kernels.quant.layouts import NATIVE_LAYOUT
from river_compile.passes.edits import (
    NoMatch,
    Pass,
    call,
    drop_unused,
    follow_uses,
    replace_node,
    require,
    reshape_like,
)
from river_compile.passes.experts import is_router
from river_compile.passes.fusion.cache_rules import fuse_attention, fuse_kv_fill
from river_compile.passes.fusion.match import WHOLE, BlockView, Columns, columns, is_river_linear, sources
from river_compile.passes.fusion.mixtures import fuse_mixture, has_native_stacks
from river_compile.passes.fusion.recognise import Normed, activation, norm
from river_compile.passes.nodes import (
    called,
    either_way,
    is_ordinary,
    is_parameter,
    only_used_for,
    operands,
    same_dtype,
    same_size,
    shape,
    skip_noops,
    skip_views,
    source_of,
    value_of,
)
from river_compile.passes.program import Fusion, RiverProgram, Segment
from river_compile.passes.segments import fingerprint


def fuse_backbone(dense_layout: str) -> Pass:
    """Make the pass below; `dense_layout` is that of 16-bit weights."""

    def fuse_backbone(program: RiverProgram) -> RiverProgram:
        """Blocks and head use fused operators if a rule matches."""
        blocks, fusions = _fused_blocks(program.blocks, RULES, any_width=True)
        head = program.head.copy()
        fusions += _apply(head, [fuse_head(dense_layout)])
        return replace(program, blocks=blocks, head=head, fusions=(*program.fusions, *fusions))

    return fuse_backbone


def fuse_twins(dense_layout: str) -> Pass:
    """Make the pass below; `dense_layout` is that of 16-bit weights."""

    def fuse_twins(program: RiverProgram) -> RiverProgram:
        """Twins and their head use fused operators if a rule matches."""
        return _fused(program, dense_layout)

    return fuse_twins


def fuse_checks(program: RiverProgram) -> RiverProgram:
    """Exit scores of decode steps are fused with the additions before them."""
    if not program.plan.is_decode:
        return program
    blocks, fusions = [], []
    for block in program.blocks:
        fused = block.copy() if block.has_score else block
        fusions += _apply(fused, [fuse_exit_score]) if block.has_score else []
        blocks.append(fused)
    return replace(program, blocks=tuple(blocks), fusions=(*program.fusions, *fusions))


def fuse_norm_qkv(view: BlockView) -> fx.Node:
    """norm + q|k|v."""
    matmul = _only(view.matmuls("cache"), "feeds the KV cache")
    found, last = _norm_before(matmul)
    if found is None:
        raise NoMatch("no norm that the kernel supports is in front of this matmul only", last)
    return _put_linear(matmul.args, found, matmul)


def fuse_gated_mlp(view: BlockView) -> fx.Node:
    """norm + gate|up."""
    feeding = view.matmuls("cache")
    shared = next((n for p in view.matmuls("down") for n in sources([p.args[0]]) if n in feeding), None)
    require(shared is None, "its matmul is merged with q|k|v", shared)
    matmul = _only(view.matmuls("up"), "leads into an MLP")
    out, act, gated = _activated(matmul)
    require(only_used_for(matmul, out), "its result is used elsewhere too", matmul)
    aligned = not gated or matmul.args[6] not in ("dense", NATIVE_LAYOUT) or matmul.args[4] % 32 == 0
    require(aligned, f"the C++ kernels gate multiples of 16 features, not {matmul.args[4] // 2}", matmul)
    found, _ = _norm_before(matmul)
    return _put_linear(matmul.args, found, out, activation=act, gated=gated)


def fuse_o_residual(view: BlockView) -> fx.Node:
    """o + residual."""
    return _fuse_residual(_only(view.matmuls("attention"), "reads attention's result"))


def fuse_down_residual(view: BlockView) -> fx.Node:
    """down + residual."""
    return _fuse_residual(_only(view.matmuls("down"), "reads an MLP's activations"))


def fuse_head(dense_layout: str) -> Rule:
    """Make the head's rule; `dense_layout` is that of 16-bit weights."""

    def fuse_head(view: BlockView) -> fx.Node:
        """norm + head."""
        head = _only([n for n in view.graph.nodes if is_river_linear(n) or called(n, F.linear)], "gives logits")
        arguments = head.args
        if not is_river_linear(head):
            x, weight, bias = head.args
            plain = is_parameter(weight) and is_ordinary(value_of(weight))
            plain = plain and same_dtype(weight, x) and same_dtype(head, x)
            require(plain, "its weight is not an ordinary parameter of the activations' dtype", head)
            arguments = (x, weight, None, bias, shape(weight)[0], 0, dense_layout)
        found, last = _norm_before(head)
        if found is None:
            found = _norm_before_positions(head, last)
        return _put_linear(arguments, found, head)

    return fuse_head


def fuse_exit_score(view: BlockView) -> fx.Node:
    """exit score."""
    graph = view.graph
    score = next(n for n in graph.nodes if n.target is torch.ops.river.exit_score.default)
    hidden, previous = score.args
    total = skip_views(hidden)
    found = operands(total, operator.add)
    if found is None or not all(same_size(n, total) for n in found):
        raise NoMatch("the layer does not end with an addition of two values of one shape and dtype", hidden)
    value = (value_of(total), value_of(hidden).new_empty((), dtype=torch.float32))
    with graph.inserting_before(total):
        inputs = tuple(reshape_like(n, total) for n in (*found, previous))
        fused = call(torch.ops.river.residual_score.default, inputs, value, total)
        parts = [call(operator.getitem, (fused, i), value[i], total) for i in range(2)]
    score.replace_all_uses_with(parts[1])
    graph.erase_node(score)
    total.replace_all_uses_with(parts[0])
    drop_unused(total)
    return fused


# A rule's docstring is its name in the report. Generated kernels around the KV cache take one position per row.
Rule = Callable[[BlockView], fx.Node]
ONE_QUERY_RULES: tuple[Rule, ...] = (fuse_kv_fill, fuse_attention)
RULES: tuple[Rule, ...] = (fuse_norm_qkv, *ONE_QUERY_RULES, fuse_o_residual, fuse_gated_mlp, fuse_down_residual)


def _fused(program: RiverProgram, dense_layout: str) -> RiverProgram:
    all_rules = program.plan.is_decode or dense_layout == "dense"
    rules = [rule for rule in RULES if all_rules or rule not in ONE_QUERY_RULES]
    twins, fusions = _fused_blocks(program.twins, rules, twins=True)
    head = program.twin_head and program.twin_head.copy()
    if head is not None:
        fusions += _apply(head, [fuse_head(dense_layout)])
        if fusions[-1].missed and not head.packed:
            head = None  # use the backbone's head
    return replace(program, twins=twins, twin_head=head, fusions=(*program.fusions, *fusions))


def _fused_blocks(
    segments: Sequence[Segment], rules: Sequence[Rule], twins: bool = False, any_width: bool = False
) -> tuple[tuple[Segment, ...], list[Fusion]]:
    """Fuse blocks, once for equal fingerprints; with `twins`, only those with 4-bit matmuls."""
    known: dict[object, tuple[Segment, list[Fusion]]] = {}
    made, fusions = [], []
    for segment in segments:
        if twins and not segment.packed:
            made.append(segment)
            continue
        key = fingerprint(segment), *map(is_parameter, segment.inputs)
        if key not in known:
            known[key] = _fused_block(segment, rules, any_width)
        fused, done = known[key]
        made.append(replace(segment, graph=fused.graph))
        fusions += [replace(fusion, segment=segment.name) for fusion in done]
    return tuple(made), fusions


def _fused_block(segment: Segment, rules: Sequence[Rule], any_width: bool) -> tuple[Segment, list[Fusion]]:
    fused = segment.copy()
    for rewrite in (_absorb_bias, _regroup):
        for node in list(fused.graph.nodes):
            rewrite(node)
    return fused, _apply(fused, _rules_of(fused, rules), any_width)


def _rules_of(segment: Segment, rules: Sequence[Rule]) -> Sequence[Rule]:
    """Return the rules of a block; where experts take the place of the MLP, theirs take the place of its rules."""
    if not has_native_stacks(segment.graph):
        return rules
    view = BlockView(segment.graph)
    routers_alone = all(is_router(matmul) for matmul in view.matmuls("up"))
    left_out = (fuse_gated_mlp, fuse_down_residual) if routers_alone and not view.matmuls("down") else ()
    return (fuse_mixture, *(rule for rule in rules if rule not in left_out))


def _apply(segment: Segment, rules: Sequence[Rule], any_width: bool = False) -> list[Fusion]:
    view, origin = BlockView(segment.graph, any_width), segment.origins
    fusions = []
    for rule in rules:
        try:
            node, missed = rule(view), ""
        except NoMatch as miss:
            node, missed = miss.node, miss.reason
        where = "" if node is None else source_of(origin.get(node, node))
        fusions.append(Fusion((rule.__doc__ or "").rstrip("."), segment.name, missed, where))
    return fusions


def _absorb_bias(node: fx.Node) -> None:
    """Fold ``matmul + bias`` into the matmul."""
    for matmul, bias in either_way(node, operator.add):
        alone = is_river_linear(matmul) and matmul.args[3] is None and len(matmul.users) == 1
        if alone and is_parameter(bias) and shape(bias) == shape(matmul)[-1:] and same_dtype(bias, matmul):
            matmul.args = (*matmul.args[:3], bias, *matmul.args[4:])
            node.replace_all_uses_with(matmul)
            drop_unused(node)
            return


def _regroup(node: fx.Node) -> None:
    """Turn ``residual + (a + b)`` of two matmuls into ``(residual + a) + b``: an addition for each (parallel MLP)."""
    for side, residual in either_way(node, operator.add):
        inner = skip_noops(side)
        found = operands(inner, operator.add, Tensor.add_)
        if found is None or len(inner.users) != 1 or not same_size(residual, node):
            continue
        in_place = inner.target is Tensor.add_
        if in_place and len(found[0].users) != 1:
            continue
        if all(is_river_linear(skip_views(n)) and same_size(n, node) for n in found) and found[0] is not found[1]:
            with node.graph.inserting_before(node):
                first = call(operator.add, (residual, found[0]), value_of(node), node)
            replace_node(operator.add, (first, found[1]), value_of(node), node)
            if in_place:
                drop_unused(inner)
            return


def _only(matmuls: list[fx.Node], role: str) -> fx.Node:
    count = "no 4-bit matmul" if not matmuls else f"more than one matmul ({len(matmuls)})"
    require(len(matmuls) == 1, f"{count} {role}", matmuls[0] if matmuls else None)
    return matmuls[0]


def _norm_before(matmul: fx.Node) -> tuple[Normed | None, fx.Node]:
    """Return the norm that only this matmul reads, in its dtype (autocast changes it), if any; and its input."""
    last = skip_views(matmul.args[0])
    found = norm(last)
    fusible = found is not None and same_dtype(found.x, matmul)
    fusible = fusible and shape(last)[-1] == shape(matmul.args[0])[-1] and only_used_for(last, matmul)
    return (found if fusible else None), last


def _norm_before_positions(matmul: fx.Node, last: fx.Node) -> Normed | None:
    """Return the norm before a slice of positions; the slice moves before the norm."""
    if not called(last, operator.getitem) or not isinstance(last.args[1], tuple) or not only_used_for(last, matmul):
        return None
    source, index = last.args
    whole = len(index) < len(shape(source)) or index[-1] == WHOLE
    found = norm(source)
    if found is None or not whole or shape(found.x) != shape(source) or not same_dtype(found.x, matmul):
        return None
    if not only_used_for(skip_views(source), last):
        return None
    with matmul.graph.inserting_before(last):
        x = call(operator.getitem, (found.x, index), value_of(found.x).new_empty(value_of(last).shape), last)
    return replace(found, x=x)


def _put_linear(
    arguments: tuple, found: Normed | None, old: fx.Node, activation: str = "none", gated: bool = False
) -> fx.Node:
    """Replace a node by a ``river::linear`` with these arguments, the norm and the activation."""
    x, *weights = arguments
    norm = {}
    if found is not None:
        x = found.x
        norm = {"norm": found.kind, "norm_weight": found.weight, "norm_bias": found.bias, "eps": found.eps}
    value = value_of(x).new_empty((*value_of(x).shape[:-1], weights[3] // 2 if gated else weights[3]))
    linear = torch.ops.river.linear.default
    return replace_node(linear, (x, *weights), value, old, **norm, activation=activation, gated=gated)


def _activated(matmul: fx.Node) -> tuple[fx.Node, str, bool]:
    """Return the result of a matmul's activation, the activation's name, and whether it is gated."""
    width = value_of(matmul).shape[-1]
    single = None
    for node in matmul.graph.nodes:
        if node < matmul:
            continue
        for activated, other in either_way(node, operator.mul):
            found = activation(activated)
            gate, up = Columns(matmul, 0, width // 2), Columns(matmul, width // 2, width)
            if found and columns(found[0]) == gate and columns(other) == up:
                return node, found[1], True
        found = activation(node)
        if single is None and found and columns(found[0]) == Columns(matmul, 0, width):
            single = node, found[1], False
    if single is None:
        raise NoMatch("no activation that the kernel supports follows, with the gate first", matmul)
    return single


def _fuse_residual(matmul: fx.Node) -> fx.Node:
    for node in matmul.graph.nodes:
        between = norm(node) if node > matmul else None
        if between is not None and skip_views(between.x) is matmul:
            return _fuse_norm_residual(matmul, node, between)
    last, total = follow_uses(matmul)
    parts = {**matmul.kwargs, "residual": _residual(last, total)}
    return replace_node(torch.ops.river.linear.default, matmul.args, value_of(matmul), total, **parts)


def _fuse_norm_residual(matmul: fx.Node, normed: fx.Node, found: Normed) -> fx.Node:
    """Fuse a norm after a matmul with the addition after it (sandwich norms of Gemma and OLMo)."""
    native = matmul.args[6] in ("dense", NATIVE_LAYOUT)
    require(native, "a norm stands between it and the addition", normed)
    last, total = follow_uses(normed)
    arguments = (found.x, found.kind, found.weight, found.bias, found.eps, _residual(last, total))
    return replace_node(torch.ops.river.norm.default, arguments, value_of(found.x), total)


def _residual(last: fx.Node, total: fx.Node) -> fx.Node:
    found = operands(total, operator.add, Tensor.add_)
    if found is None or found[0] is found[1]:
        raise NoMatch(f"{getattr(total.target, '__name__', total.op)} stands between it and the addition", total)
    residual = found[1] if found[0] is last else found[0]
    require(same_size(residual, total) and same_size(last, total), "the operands differ in shape or dtype", total)
    changed = total.target is Tensor.add_ and found[0] is residual and len(residual.users) > 1
    require(not changed, "the addition changes a value that is used elsewhere", total)
    return residual
