"""Where a run's values lie: in a list of slots, one for each value that crosses a segment's border, and two more.

Not handled: what a slot holds. A list belongs to one call, so threads may run one program at the same time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from river_compile.errors import CacheFullError
from river_compile.passes.nodes import is_tensor, mutated_inputs, value_of
from river_compile.passes.program import RiverProgram

# The last two slots belong to no value of the graph: the number that the latest exit check or head returned, and what
# a fill keeps for the length of a step.
SCORE, FILL = -2, -1


def size_of(program: RiverProgram) -> int:
    """Returns how many slots a run has."""
    return len(program.slots) + 2


def new_slots(args: Sequence, size: int) -> list:
    """Returns the slots of a run, the graph's inputs in theirs."""
    return [*args, *[None] * (size - len(args))]


def gather(indices: Sequence[int]) -> Callable[[list], Sequence]:
    """Returns a function that picks these slots."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda slots: [slots[i] for i in indices]


def cache_slots(program: RiverProgram, block: int = 0) -> tuple[int | None, int | None]:
    """Returns the slots of a tensor of a block's KV cache before a step and after it, None where unknown.

    That is the tensor that is written in place, or the one that a step gets and the longer one that it returns, which
    the next step gets. The first block's tells sequences apart.
    """
    plan, slots = program.plan, program.slots
    kv = plan.blocks[block].kv
    if kv.kind == "static":  # (a sliding window that is full is put together in a copy first)
        targets = [target for write in kv.writes for target in mutated_inputs(write) if target in slots]
        return (slots[targets[0]],) * 2 if targets else (None, None)
    write = kv.writes[0]
    stack, before = [write], None
    while stack and before is None:
        node = stack.pop()
        if node.op == "placeholder" and is_tensor(node) and value_of(node).dim() == 4:
            before = node
        stack += [n for n in node.all_input_nodes if plan.part_of.get(n, block + 1) == block + 1]
    return slots.get(before), slots.get(write)


@dataclass(frozen=True)
class CapacityCheck:
    """Guards a static KV cache.

    Attributes:
        length: slot of the number of filled entries.
        hidden: slot of the hidden state ``[B, T, D]``, None where a step adds one token.
        capacity: entries in all.
    """

    length: int
    hidden: int | None
    capacity: int

    def __call__(self, slots: list) -> None:
        """Raises a CacheFullError where the tokens of this step have no room."""
        filled = int(slots[self.length])
        new = 1 if self.hidden is None else slots[self.hidden].shape[1]
        if filled + new > self.capacity:
            raise CacheFullError(
                f"the static KV cache holds {self.capacity} tokens; {filled} are filled and this step adds {new}. "
                f"Make it larger (max_cache_len or max_new_tokens, at least {filled + new}) or use a dynamic cache"
            )


def capacity_check(program: RiverProgram) -> CapacityCheck | None:
    """Returns the check for the first block whose static cache is filled from the front, None where there is none."""
    plan, slots = program.plan, program.slots
    hidden = None if plan.is_decode else slots[plan.blocks[0].hidden_in]
    for block in plan.blocks:
        if block.kv.capacity is not None and block.kv.lengths:
            return CapacityCheck(slots[block.kv.lengths[0]], hidden, block.kv.capacity)
    return None
