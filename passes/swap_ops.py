"""Puts other operators in the place of a segment's linear layers and attention, one for one.

Twins and the heads of tokens that left get attention without repeated KV heads, and linear layers for one row. A
backbone that must give the bits of one token at a time gets batch-invariant ones; norms, rotary embeddings and
activations work on each row by itself already.

Not handled: causal attention (with one query it would read the first key only; otherwise only prompts use it), dropout,
and matrix products that are no linear layer (attention written out, experts; Conv1D for :func:`keep_rows`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from river_compile.kernels.portable import grouped_attention, one_row_linear
from river_compile.passes.fusion.recognise import before_repeat

from .edits import drop_unused, in_dtype_of
from .nodes import inference_sdpa, input_name, is_ordinary, is_parameter, rank, shape, value_of
from .program import Refusal, RiverProgram


def simplify_attention(graph: fx.Graph) -> None:
    """Puts attention without repeated KV heads in place of attention for one query position."""
    for node in list(graph.nodes):
        found = inference_sdpa(node)
        if found is not None and not found.causal and shape(found.q)[2] == 1:
            node.target = grouped_attention
            with graph.inserting_before(node):
                q = in_dtype_of(node, found.q)
            node.args = (q, before_repeat(found.k), before_repeat(found.v), found.mask, found.scale)
            node.kwargs = {}
            for repeated in (found.k, found.v):
                drop_unused(repeated)


def simplify_linears(graph: fx.Graph) -> int:
    """Makes linear layers whose inputs are one row ones for one row; returns the number replaced.

    Quantized weights stay with their own products.
    """
    linears = graph.find_nodes(op="call_function", target=torch.nn.functional.linear)
    known = [n for n in linears if value_of(n.args[0]) is not None and is_ordinary(value_of(n.args[1]))]
    one_row = [n for n in known if set(shape(n.args[0])[:-1]) == {1}]
    for node in one_row:
        with graph.inserting_before(node):
            node.args = (in_dtype_of(node, node.args[0]), *node.args[1:])
        node.target = one_row_linear
    return len(one_row)


def batch_invariant(program: RiverProgram) -> RiverProgram | Refusal:
    """Each row of the backbone has the bits that it has in a pass of one token."""
    weights = [node for segment in (*program.blocks, program.head) for node in segment.inputs if is_parameter(node)]
    quantized = next((node for node in weights if not is_ordinary(value_of(node))), None)
    if quantized is not None:
        kind = type(value_of(quantized)).__name__
        return Refusal(f"batch-invariant products need plain weights, and {input_name(quantized)} is {kind}")
    grown = program.plan.cache == "dynamic"
    prologue, *blocks, head = (s.copy() for s in (program.prologue, *program.blocks, program.head))
    for segment in (prologue, *blocks, head):
        keep_rows(segment.graph, grown)
    return replace(program, prologue=prologue, blocks=tuple(blocks), head=head)


def keep_rows(graph: fx.Graph, grown: bool) -> None:
    """Makes a segment's rows independent of the width of the pass; `grown`: the KV cache is a dynamic one."""
    for node in list(graph.nodes):
        found = inference_sdpa(node)
        with graph.inserting_before(node):
            if node.target is torch.nn.functional.linear and rank(node.args[0]) == 3:
                node.target = torch.ops.river.batch_invariant_linear.default
                node.args = tuple(n and in_dtype_of(node, n) for n in node.args)
            elif found is not None and not found.causal:
                node.target = torch.ops.river.batch_invariant_attention.default
                operands = (n and in_dtype_of(node, n) for n in (found.q, found.k, found.v, found.mask))
                node.args = (*operands, found.scale, found.enable_gqa, grown)
                node.kwargs = {}
