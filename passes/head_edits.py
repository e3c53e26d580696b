"""What passes share that change the river's head: its one product, and a note where a change does not apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from .edits import Missed, require
from .nodes import called, source_of
from .program import Fusion, RiverProgram, Segment


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
