"""Gives a head in 4 bits the exact logits where they count: the largest are computed anew from the backbone's matrix.

The 4-bit matrix says which logits are large; only their rows of the 16-bit matrix are read. Not handled: a head that
is no plain linear layer, or whose matrix has another dtype than its input; tokens that left then use the backbone's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from river_compile.kernels import ops  # noqa: F401  (registers river::rescore)

from .edits import call, require
from .head_edits import change_head, product_of
from .nodes import is_ordinary, same_dtype, value_of
from .program import LinearSite, RiverProgram, Segment

_NORM = {"norm": "none", "norm_weight": None, "norm_bias": None, "eps": 1e-6}


def rescored_head(program: RiverProgram) -> RiverProgram:
    """The largest logits of tokens that left are computed anew from the head's 16-bit matrix."""
    return change_head(program, "head + largest logits anew", _rescored, "the head stays in 16 bits")


def _rescored(head: Segment) -> Segment:
    product, site = product_of(head), head.packed[0]
    head, weight = _with_input(head, site)
    fits = is_ordinary(value_of(weight)) and value_of(weight).is_contiguous() and not site.transposed
    fits = fits and not site.scales_inputs and same_dtype(product.args[0], weight) and same_dtype(product, weight)
    require(fits, "its matrix is not an ordinary parameter of the activations' dtype", product)
    norm = [product.kwargs.get(name, default) for name, default in _NORM.items()]
    with head.graph.inserting_after(product):
        arguments = (product, product.args[0], weight, product.args[3], *norm)
        anew = call(torch.ops.river.rescore.default, arguments, value_of(product), product)
    product.replace_all_uses_with(anew, delete_user_cb=lambda user: user is not anew)
    return head


def _with_input(head: Segment, site: LinearSite) -> tuple[Segment, fx.Node]:
    """Returns a segment that takes a product's 16-bit matrix too, and the placeholder of it."""
    (source,) = site.weights
    placeholders = head.graph.find_nodes(op="placeholder")
    if source in head.inputs:
        return head, placeholders[head.inputs.index(source)]
    with head.graph.inserting_before(placeholders[len(head.inputs)]):
        weight = head.graph.placeholder("head_weight")
    weight.meta["example_value"] = value_of(source)
    return replace(head, inputs=(*head.inputs, source)), weight
