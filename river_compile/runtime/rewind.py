"""Makes a decode step's blocks ready to run again after their twins ran, as if the twins had not.

What a block writes in place falls into three kinds. Entries written at a counted position (``index_copy_``) are
overwritten by the second run. The counters, integer scalars, are set back by the one token that they advanced. Whatever
else is written (a static sliding window that is full moves all its entries) is saved before the twins run and put back.
A dynamic cache needs nothing of this: its blocks return longer tensors and leave their inputs alone.

Not handled: writes through a view of a cache, which :mod:`river_compile.passes.decoder` takes for no KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from river_compile.passes.nodes import mutated_inputs, value_of
from river_compile.passes.program import RiverProgram

# Copies of values, each with its slot.
Saved = Sequence[tuple[int, Tensor]]


@dataclass(frozen=True)
class Rewind:
    """The slots that blocks write in place, by block.

    Attributes:
        counters: of each block: integer scalars that it advances.
        moved: of each block: what it writes in another way than entry by entry.
    """

    counters: tuple[tuple[int, ...], ...]
    moved: tuple[tuple[int, ...], ...]

    def save(self, slots: list, depth: int) -> Saved:
        """Copies what only a copy can bring back, of the blocks after `depth`."""
        return [(i, slots[i].clone()) for block in self.moved[depth:] for i in block if slots[i] is not None]

    def back(self, slots: list, start: int, end: int, saved: Saved = ()) -> None:
        """Undoes one token's writes of blocks start+1..end."""
        for index, value in saved:
            slots[index].copy_(value)
        # (blocks may share a counter: each of them advanced it)
        for counter in (slots[i] for block in self.counters[start:end] for i in block):
            counter.sub_(1)


def rewind_of(program: RiverProgram) -> Rewind:
    """Finds what the blocks of a decode graph write in place."""
    plan, slots = program.plan, program.slots
    counters: list[dict[int, None]] = [{} for _ in plan.blocks]
    moved: list[dict[int, None]] = [{} for _ in plan.blocks]
    for node, part in plan.part_of.items():
        if not 1 <= part <= plan.num_blocks or node.target is Tensor.index_copy_:
            continue
        for target in mutated_inputs(node):
            if target in slots and plan.part_of.get(target) != part:
                kind = counters if _is_counter(target) else moved
                kind[part - 1][slots[target]] = None
    return Rewind(tuple(map(tuple, counters)), tuple(map(tuple, moved)))


def _is_counter(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_floating_point()
