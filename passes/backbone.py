"""Gives passes a backbone that multiplies by the package's own kernels, in 16 bits.

Linear layers become ``river::linear`` in layout "dense", the C++ kernels', which sum an output in one order whatever
the number of rows, or "triton", the generated ones', for decode steps. Those that share an input become one product,
whose weights stay where they are: its matrix is a ``torch.cat`` that the lowering takes apart again. The rules of
fusion then see a block as they see a twin. Torchao's weight-only tensors of 8 bits are for the C++ kernels too, which
read them packed (:mod:`river_compile.passes.packed_backbone`).

Not handled: weights of another dtype than their input, products of another one (autocast's), transposed weights
(GPT-2's Conv1D), experts; they stay so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from river_compile.kernels.quant import lossless
from river_compile.passes.attention import simplify_attention
from river_compile.passes.edits import call
from river_compile.passes.linears import input_of, replace_linears, sharing_input
from river_compile.passes.nodes import Linear, called, is_ordinary, is_parameter, same_dtype, value_of
from river_compile.passes.pipeline import Pass
from river_compile.passes.program import RiverProgram, Segment

MOST_MERGED = 4  # matrices of one product
_MERGED_ROWS = 16  # of which a generated kernel's matrices have a multiple


def river_backbone(layout: str) -> Pass:
    """Makes the pass below; `layout` is that of ``river::linear`` with weights in 16 bits."""

    def river_backbone(program: RiverProgram) -> RiverProgram:
        """Blocks and the head use the kernels' own matmuls of a few rows."""
        blocks = tuple(_with_products(block, layout) for block in program.blocks)
        return replace(program, blocks=blocks, head=_with_products(program.head, layout))

    return river_backbone


def _with_products(segment: Segment, layout: str) -> Segment:
    made = segment.copy()
    simplify_attention(made.graph)
    groups = sharing_input(made.graph, lambda linear: _kind(linear, layout))
    for linears in groups:
        aligned = layout == "dense" or all(linear.out_features % _MERGED_ROWS == 0 for linear in linears)
        together = MOST_MERGED if aligned else 1
        for start in range(0, len(linears), together):
            _merge(made.graph, linears[start : start + together], layout)
    return made


def _kind(linear: Linear, layout: str) -> tuple[object, ...] | None:
    """Returns what linear layers have in common that may be one matmul, None for one that stays as it is."""
    parameters = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    if linear.transposed or not all(is_parameter(p) and same_dtype(p, linear.x) for p in parameters):
        return None
    if not same_dtype(linear.node, linear.x):
        return None
    values = [value_of(p) for p in parameters]
    held = lossless.torchao_parts(values[0]) if layout == "dense" else None
    plain = values if held is None else values[1:]
    if not all(is_ordinary(value) and value.is_contiguous() for value in plain):
        return None
    return linear.bias is None, held and held[0].dtype


def _merge(graph: fx.Graph, linears: Sequence[Linear], layout: str) -> None:
    """Puts one matmul in the place of linear layers, with a matrix that is put together from theirs."""
    first = linears[0]
    with graph.inserting_before(first.node):
        weight = _joined([linear.weight for linear in linears], first.node)
        bias = first.bias and _joined([linear.bias for linear in linears if linear.bias], first.node)
    replace_linears(linears, input_of(linears), weight, None, bias, 0, layout)


def parts_of(parameter: fx.Node | None) -> list[fx.Node]:
    """Returns the parameters that a product's matrix or bias was put together from; of None, none."""
    if parameter is None:
        return []
    return list(parameter.args[0]) if called(parameter, torch.cat) else [parameter]


def _joined(parameters: list[fx.Node], like: fx.Node) -> fx.Node:
    if len(parameters) == 1:
        return parameters[0]
    value, like_of = value_of(parameters[0]), value_of(like)
    rows = sum(value_of(p).shape[0] for p in parameters)
    return call(torch.cat, (parameters, 0), like_of.new_empty((rows, *value.shape[1:])), like)
