"""Replaces operators made for many rows where a segment has one query position.

:func:`simplify_attention` takes ``scaled_dot_product_attention`` with a query length of 1, and looks through the
repetition of KV heads (index with a new axis, expand, reshape) that Hugging Face models put in front of it.
:func:`simplify_linears` takes linear layers whose input has one row. Applied to twins and to the head of tokens that
left; the backbone keeps the operators that the model called.

Left alone: causal attention (with one query it would read the first key only), dropout, and attention written out as
matrix products.
"""

from __future__ import annotations

import torch
from torch import fx

from river_compile.kernels.one_query import grouped_attention, one_row_linear
from river_compile.passes.fusion.recognise import before_repeat

from .decoder import value_of


def simplify_attention(graph: fx.Graph) -> int:
    """Rewrites the graph in place; returns the number of attention operators replaced."""
    replaced = 0
    for node in list(graph.nodes):
        if node.target is not torch.nn.functional.scaled_dot_product_attention or not _has_one_query(node):
            continue
        q, k, v = node.args[:3]
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        with graph.inserting_before(node):
            new = graph.call_function(
                grouped_attention, (q, before_repeat(k), before_repeat(v), mask, node.kwargs.get("scale"))
            )
        new.meta = node.meta.copy()
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        replaced += 1
    if replaced:
        _drop_pure_dead_code(graph)
    return replaced


def simplify_linears(graph: fx.Graph) -> int:
    """Rewrites the graph in place; returns the number of linear layers replaced."""
    replaced = 0
    for node in list(graph.nodes):
        if node.target is not torch.nn.functional.linear or not _has_one_row(node.args[0]):
            continue
        node.target = one_row_linear
        node.args = (*node.args, node.kwargs.get("bias"))[:3]
        node.kwargs = {}
        replaced += 1
    return replaced


def _has_one_row(node: fx.Node) -> bool:
    value = value_of(node)
    return value is not None and all(isinstance(n, int) and n == 1 for n in value.shape[:-1])


def _has_one_query(node: fx.Node) -> bool:
    if len(node.args) not in (3, 4) or node.kwargs.get("is_causal") or node.kwargs.get("dropout_p"):
        return False
    query = value_of(node.args[0])
    return query is not None and query.dim() == 4 and isinstance(query.shape[2], int) and query.shape[2] == 1


def _drop_pure_dead_code(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else node.target.__name__
            if name in ("getitem", "expand", "reshape"):
                graph.erase_node(node)
