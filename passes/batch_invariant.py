"""Makes a segment's rows independent of the width of the pass, for verification that gives plain decoding's bits.

Linear layers and attention become the operators of :mod:`river_compile.kernels.batch_invariant`. Norms, rotary
embeddings and activations work on each row by itself already.

Left alone: matrix products that are no linear layer (Conv1D, attention written out, experts) and causal attention,
which only prompts use.
"""

from __future__ import annotations

import torch
from torch import fx

from river_compile.kernels import batch_invariant as same_rows  # noqa: F401  (registers the operators)

from .decoder import rank


def keep_rows(graph: fx.Graph, grown: bool) -> int:
    """Rewrites the graph in place; returns the number of operators replaced.

    Args:
        graph: a segment's.
        grown: True where the KV cache grows with every token, False where its tensors are static.
    """
    replaced = 0
    for node in graph.nodes:
        if node.target is torch.nn.functional.linear and rank(node.args[0]) == 3:
            bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            node.target, node.args = torch.ops.river.same_rows_linear.default, (*node.args[:2], bias)
        elif node.target is torch.nn.functional.scaled_dot_product_attention and _can_split(node):
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            options = (node.kwargs.get("scale"), bool(node.kwargs.get("enable_gqa")), grown)
            node.target = torch.ops.river.same_rows_attention.default
            node.args = (*node.args[:3], mask, *options)
        else:
            continue
        node.kwargs = {}
        replaced += 1
    return replaced


def _can_split(node: fx.Node) -> bool:
    return (
        len(node.args) in (3, 4)
        and not node.kwargs.get("is_causal")
        and not node.kwargs.get("dropout_p")
        and rank(node.args[0]) == 4
    )
