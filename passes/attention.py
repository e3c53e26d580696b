"""Puts other operators in the place of a segment's linear layers and attention, one for one.

Twins and the heads of tokens that left get attention without repeated KV heads, and linear layers for one row.

Not handled: causal attention (with one query it would read the first key only; otherwise only prompts use it), dropout,
and matmuls that are no linear layer (attention written out, experts).
"""

from __future__ import annotations

import torch
from torch import fx

from river_compile.kernels.portable import grouped_attention, one_row_linear
from river_compile.passes.edits import drop_unused, in_dtype_of
from river_compile.passes.fusion.recognise import before_repeat
from river_compile.passes.nodes import inference_sdpa, is_ordinary, shape, value_of


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

    Weights of 4 bits stay with their own products.
    """
    linears = graph.find_nodes(op="call_function", target=torch.nn.functional.linear)
    known = [n for n in linears if value_of(n.args[0]) is not None and is_ordinary(value_of(n.args[1]))]
    one_row = [n for n in known if set(shape(n.args[0])[:-1]) == {1}]
    for node in one_row:
        with graph.inserting_before(node):
            node.args = (in_dtype_of(node, node.args[0]), *node.args[1:])
        node.target = one_row_linear
    return len(one_row)
