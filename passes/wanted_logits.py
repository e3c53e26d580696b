"""Lets the river's head leave out logits that a step does not want: a draft needs no token that hardly ever comes.

A list of blocks of logits becomes an input of the head's product in 4 or 8 bits (`wanted` of `river::linear`); which
blocks are on it, each step says. Not handled: a head of several products, or one whose logits are put together from
other ranks' (such heads compute all logits).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from .edits import Missed, add_placeholders, require
from .exit_checks import logits_of
from .nodes import called, shape, source_of
from .program import Fusion, RiverProgram, Segment


def wanted_logits(program: RiverProgram) -> RiverProgram:
    """The product of the river's head takes a list of the blocks of logits that are wanted."""
    head = program.river_head
    if head is None or not head.packed:
        return program
    missed = where = ""
    try:
        head = _with_list(head.copy(), logits_of(program))
    except Missed as miss:
        missed = f"{miss.reason}; drafts compute all logits"
        where = "" if miss.node is None else source_of(miss.node)
    fusion = Fusion("head + list of wanted logits", head.name, missed, where)
    return replace(program, river_head=head, fusions=(*program.fusions, fusion))


def _with_list(head: Segment, logits: fx.Node | None) -> Segment:
    products = [node for node in head.graph.nodes if called(node, torch.ops.river.linear.default)]
    require(len(products) == len(head.packed) == 1, f"the head has {len(products)} products in 4 bits")
    product = products[0]
    plain = product.kwargs.get("residual") is None and not product.kwargs.get("gated", False)
    all_of_them = logits is not None and shape(logits)[-1] == product.args[4]
    require(plain and all_of_them, "the product's outputs are not the logits", product)
    (wanted,) = add_placeholders(head.graph, ["wanted_logits"])
    product.kwargs = {**product.kwargs, "wanted": wanted}
    return replace(head, chooses_logits=True)
