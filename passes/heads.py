"""Changes of the river's head, for tokens that left early: fewer logits, and exact ones among the largest.

*Draft vocabulary*: a draft needs no token that hardly ever comes. A list of blocks of logits becomes an input of the
head's 4-bit matmul (`wanted` of `river::linear`), and each step says which blocks are on it.

*Reranking*: a 4-bit matrix says which logits are large; those are computed anew from their rows of the 16-bit matrix.

Not handled: a head that is no plain linear layer, or whose matrix has another dtype than its input (tokens that left
use the backbone's); a draft vocabulary for a head of several matmuls, or whose logits come from several ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from river_compile.kernels import ops  # noqa: F401  (registers river::rescore)
from river_compile.passes.edits import Missed, add_placeholders, call, require
from river_compile.passes.exit_checks import logits_of
from river_compile.passes.nodes import called, is_ordinary, same_dtype, shape, source_of, value_of
from river_compile.passes.program import Fusion, RiverProgram, Segment


def change_head(program: RiverProgram, rule: str, change: Callable[[Segment], Segment], otherwise: str) -> RiverProgram:
    """Returns the program with a river head that `change` made of a copy; notes what `otherwise` is where it misses.

    Programs whose river head has no packed product stay as they are.
    """
    head = program.river_head
    if head is None or not head.packed:
        return program
    missed = where = ""
    try:
        head = change(head.copy())
    except Missed as miss:
        missed = f"{miss.reason}; {otherwise}"
        where = "" if miss.node is None else source_of(miss.node)
    fusion = Fusion(rule, head.name, missed, where)
    return replace(program, river_head=head, fusions=(*program.fusions, fusion))


def product_of(head: Segment) -> fx.Node:
    """Returns the one product of a head; raises `Missed` where it has none or several."""
    products = [node for node in head.graph.nodes if called(node, torch.ops.river.linear.default)]
    require(len(products) == len(head.packed) == 1, f"it has {len(products)} products in 4 bits")
    return products[0]


def draft_vocab(program: RiverProgram) -> RiverProgram:
    """The product of the river's head takes a list of the blocks of logits that are wanted."""
    logits = logits_of(program)
    rule, otherwise = "head + list of wanted logits", "drafts compute all logits"
    return change_head(program, rule, lambda head: _with_list(head, logits), otherwise)


def _with_list(head: Segment, logits: fx.Node | None) -> Segment:
    product = product_of(head)
    plain = product.kwargs.get("residual") is None and not product.kwargs.get("gated", False)
    all_of_them = logits is not None and shape(logits)[-1] == product.args[4]
    require(plain and all_of_them, "the product's outputs are not the logits", product)
    (wanted,) = add_placeholders(head.graph, ["wanted"])
    product.kwargs = {**product.kwargs, "wanted": wanted}
    return replace(head, chooses_logits=True)


_NORM = {"norm": "none", "norm_weight": None, "norm_bias": None, "eps": 1e-6}


def rescored_head(program: RiverProgram) -> RiverProgram:
    """The largest logits of tokens that left are computed anew from the head's 16-bit matrix."""
    rule, otherwise = "head + largest logits anew", "the head stays in 16 bits"
    return change_head(program, rule, lambda head: _rescored(head, program.inputs), otherwise)


def _rescored(head: Segment, inputs: Sequence[fx.Node]) -> Segment:
    product, site = product_of(head), head.packed[0]
    head, weight = _with_input(head, inputs[site.weights[0]])
    fits = is_ordinary(value_of(weight)) and value_of(weight).is_contiguous() and not site.transposed
    fits = fits and not site.scales_inputs and same_dtype(product.args[0], weight) and same_dtype(product, weight)
    require(fits, "its matrix is not an ordinary parameter of the activations' dtype", product)
    norm = [product.kwargs.get(name, default) for name, default in _NORM.items()]
    with head.graph.inserting_after(product):
        arguments = (product, product.args[0], weight, product.args[3], *norm)
        anew = call(torch.ops.river.rescore.default, arguments, value_of(product), product)
    product.replace_all_uses_with(anew, delete_user_cb=lambda user: user is not anew)
    return head


def _with_input(head: Segment, source: fx.Node) -> tuple[Segment, fx.Node]:
    """Returns a segment that takes one more input of the graph, and the placeholder of it."""
    placeholders = head.graph.find_nodes(op="placeholder")
    if source in head.inputs:
        return head, placeholders[head.inputs.index(source)]
    with head.graph.inserting_before(placeholders[len(head.inputs)]):
        weight = head.graph.placeholder("head_weight")
    weight.meta["example_value"] = value_of(source)
    return replace(head, inputs=(*head.inputs, source)), weight
