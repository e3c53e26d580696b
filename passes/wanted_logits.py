"""Lets the river's head leave out logits that a step does not want: a draft needs no token that hardly ever comes.

A list of blocks of logits becomes an input of the head's product in 4 or 8 bits (`wanted` of `river::linear`); which
blocks are on it, each step says. Not handled: a head of several products, or one whose logits are put together from
other ranks' (such heads compute all logits).
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from .edits import add_placeholders, require
from .exit_checks import logits_of
from .head_edits import change_head, product_of
from .nodes import shape
from .program import RiverProgram, Segment


def wanted_logits(program: RiverProgram) -> RiverProgram:
    """The product of the river's head takes a list of the blocks of logits that are wanted."""
    logits = logits_of(program)
    rule, otherwise = "head + list of wanted logits", "drafts compute all logits"
    return change_head(program, rule, lambda head: _with_list(head, logits), otherwise)


def _with_list(head: Segment, logits: fx.Node | None) -> Segment:
    product = product_of(head)
    plain = product.kwargs.get("residual") is None and not product.kwargs.get("gated", False)
    all_of_them = logits is not None and shape(logits)[-1] == product.args[4]
    require(plain and all_of_them, "the product's outputs are not the logits", product)
    (wanted,) = add_placeholders(head.graph, ["wanted_logits"])
    product.kwargs = {**product.kwargs, "wanted": wanted}
    return replace(head, chooses_logits=True)
