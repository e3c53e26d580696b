"""Puts the operators of the generated kernels into twins, heads and exit checks, and records which rule missed.

Not handled: what no rule takes stays as it is and reaches Inductor, 4-bit products as ``river::linear``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, fx

from river_compile.passes.edits import Missed, call, drop_unused, put
from river_compile.passes.fusion.block import BlockView
from river_compile.passes.fusion.match import is_product
from river_compile.passes.fusion.rules import ONE_QUERY_RULES, RULES, Rule, fuse_exit_score, fuse_head
from river_compile.passes.nodes import (
    before_views,
    either_way,
    is_parameter,
    operands,
    plain,
    same_dtype,
    same_size,
    shape,
    source_of,
    value_of,
)
from river_compile.passes.pipeline import Pass
from river_compile.passes.program import Fusion, RiverProgram, Segment
from river_compile.passes.segments import fingerprint


def fuse_backbone(dense_layout: str) -> Pass:
    """Makes the pass below; `dense_layout` is the layout of ``river::linear`` with weights in 16 bits."""

    def fuse_backbone(program: RiverProgram) -> RiverProgram:
        """Blocks and the head become operators of the kernels, if a fusion rule holds."""
        blocks, fusions = _fused_blocks(program.blocks, RULES, any_width=True)
        head = program.head.copy()
        fusions += _apply(head, [fuse_head(dense_layout)])
        return replace(program, blocks=blocks, head=head, fusions=(*program.fusions, *fusions))

    return fuse_backbone


def fuse_twins(dense_layout: str) -> Pass:
    """Makes the pass below; `dense_layout` is the layout of ``river::linear`` with weights in 16 bits."""

    def fuse_twins(program: RiverProgram) -> RiverProgram:
        """Twins and the head of tokens that left become operators of the kernels, if a fusion rule holds."""
        return _fused(program, dense_layout)

    return fuse_twins


def _fused(program: RiverProgram, dense_layout: str) -> RiverProgram:
    """Applies the rules of a block to every twin, and the head's to the head of tokens that left.

    Of the generated kernels, the rules around the cache are for decode steps. A head whose rule missed and that has no
    4-bit matrix is given up for the backbone's.
    """
    several = program.plan.is_decode or dense_layout == "dense"
    rules = [rule for rule in RULES if several or rule not in ONE_QUERY_RULES]
    twins, fusions = _fused_blocks(program.twins, rules, twins=True)
    head = program.river_head and program.river_head.copy()
    if head is not None:
        fusions += _apply(head, [fuse_head(dense_layout)])
        if fusions[-1].missed and not head.packed:
            head = None
    return replace(program, twins=twins, river_head=head, fusions=(*program.fusions, *fusions))


def fuse_checks(program: RiverProgram) -> RiverProgram:
    """Fuses the exit checks of decode steps with the additions before them."""
    if not program.plan.is_decode:
        return program
    blocks, fusions = [], []
    for block in program.blocks:
        fused = block.copy() if block.has_score else block
        fusions += _apply(fused, [fuse_exit_score]) if block.has_score else []
        blocks.append(fused)
    return replace(program, blocks=tuple(blocks), fusions=(*program.fusions, *fusions))


def _fused_blocks(
    segments: Sequence[Segment], rules: Sequence[Rule], twins: bool = False, any_width: bool = False
) -> tuple[tuple[Segment, ...], list[Fusion]]:
    """Fuses blocks; those that are the same function are fused once, and share the graph.

    With `twins`, those without 4-bit products stay as they are; `any_width` as of `BlockView`.
    """
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
    return fused, _apply(fused, rules, any_width)


def _apply(segment: Segment, rules: Sequence[Rule], any_width: bool = False) -> list[Fusion]:
    view, origin = BlockView(segment.graph, any_width), segment.origins
    fusions = []
    for rule in rules:
        try:
            node, missed = rule(view), ""
        except Missed as miss:
            node, missed = miss.node, miss.reason
        where = "" if node is None else source_of(origin.get(node, node))
        fusions.append(Fusion((rule.__doc__ or "").rstrip("."), segment.name, missed, where))
    return fusions


def _absorb_bias(node: fx.Node) -> None:
    """Moves ``product + bias`` into the product."""
    for product, bias in either_way(node, operator.add):
        alone = is_product(product) and product.args[3] is None and len(product.users) == 1
        if alone and is_parameter(bias) and shape(bias) == shape(product)[-1:] and same_dtype(bias, product):
            product.args = (*product.args[:3], bias, *product.args[4:])
            node.replace_all_uses_with(product)
            drop_unused(node)
            return


def _regroup(node: fx.Node) -> None:
    """Turns ``residual + (attention's product + the MLP's)`` into ``(residual + one) + the other``.

    So each product has an addition of its own where attention and MLP run side by side.
    """
    for side, residual in either_way(node, operator.add):
        inner = plain(side)
        found = operands(inner, operator.add, Tensor.add_)
        if found is None or len(inner.users) != 1 or not same_size(residual, node):
            continue
        in_place = inner.target is Tensor.add_
        if in_place and len(found[0].users) != 1:
            continue
        if all(is_product(before_views(n)) and same_size(n, node) for n in found) and found[0] is not found[1]:
            with node.graph.inserting_before(node):
                first = call(operator.add, (residual, found[0]), value_of(node), node)
            put(operator.add, (first, found[1]), value_of(node), node)
            if in_place:
                drop_unused(inner)
            return
