"""Finds routers, the matmuls whose results choose experts, and the number of experts that a token reads.

A router is recognised by where its result goes: into a top-k or a maximum, with no other product in between. The twin
keeps it in 16 bits: a matrix of one row for each expert costs little, and where its rounding turns a choice over, the
token meets other weights.

Not handled: routers whose product is no linear layer of a parameter (those that cast their weight stay as they are).
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from river_compile.passes.experts import as_expert_product
from river_compile.passes.nodes import called, closure
from river_compile.passes.program import Segment

ROUTER = "a router: its result chooses what else is computed"
_PRODUCTS = (
    *(F.linear, operator.matmul, torch.bmm, torch.addmm, torch.baddbmm, torch.mm, torch.einsum),
    *(F.scaled_dot_product_attention, torch.conv1d, F.conv1d),
)


def is_router(product: fx.Node) -> bool:
    """Returns whether the result of a matmul chooses experts, and nothing else multiplies it on the way."""
    return any(map(_chooses, closure(product.users, lambda node: () if _multiplies(node) else node.users)))


def chosen_experts(segment: Segment) -> dict[fx.Node, int]:
    """Returns how many matrices one token reads of each placeholder of a segment that holds experts, packed or not.

    The top-k that comes closest before their product says it; stacks without one are not among them.
    """
    counts = {stack: _top_k(node) for node in segment.graph.nodes for stack in _stacks(node)}
    return {stack: count for stack, count in counts.items() if count is not None}


def _stacks(node: fx.Node) -> tuple[fx.Node, ...]:
    """Returns the placeholders that hold the experts of a product, in 16 bits or packed."""
    if called(node, torch.ops.river.experts.default):
        return node.args[1:3]
    product = as_expert_product(node)
    return () if product is None else (product.weight,)


def _top_k(node: fx.Node) -> int | None:
    """Returns k of the nearest top-k before a node, None if there is none."""
    seen, latest = {node}, [node]
    while latest:
        for found in latest:
            if called(found, torch.topk) and isinstance(found.args[1], int):
                return found.args[1]
        latest = list(dict.fromkeys(a for n in latest for a in n.all_input_nodes if a not in seen))
        seen.update(latest)
    return None


def _chooses(node: fx.Node) -> bool:
    return called(node, torch.topk, torch.argmax) or (called(node, torch.max, Tensor.max) and _gives_places(node))


def _gives_places(node: fx.Node) -> bool:
    """True for a maximum along a dimension, which comes with where it is."""
    return isinstance(node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None), int)


def _multiplies(node: fx.Node) -> bool:
    return called(node, *_PRODUCTS) or as_expert_product(node) is not None
