"""Where an executor keeps a run's values: in a list of registers, one for each that crosses a segment's border."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from river_compile.errors import CacheFullError
from river_compile.passes.nodes import is_tensor, mutated_inputs, value_of
from river_compile.passes.program import DecoderPlan


def gather(indices: Sequence[int]) -> Callable[[list], Sequence]:
    """Returns a function that picks these registers."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda registers: [registers[i] for i in indices]


def cache_registers(plan: DecoderPlan, register: dict[fx.Node, int], block: int = 0) -> tuple[int | None, int | None]:
    """Returns the registers of a tensor of a block's KV cache before a step and after it, None where unknown.

    That is the tensor that is written in place, or the one that a step gets and the longer one that it returns, which
    the next step gets. The first block's tells sequences apart.
    """
    kv = plan.blocks[block].kv
    if kv.kind == "static":  # (a sliding window that is full is put together in a copy first)
        targets = [target for write in kv.writes for target in mutated_inputs(write) if target in register]
        return (register[targets[0]],) * 2 if targets else (None, None)
    write = kv.writes[0]
    stack, before = [write], None
    while stack and before is None:
        node = stack.pop()
        if node.op == "placeholder" and is_tensor(node) and value_of(node).dim() == 4:
            before = node
        stack += [n for n in node.all_input_nodes if plan.part_of.get(n, block + 1) == block + 1]
    return register.get(before), register.get(write)


@dataclass(frozen=True)
class CapacityCheck:
    """Guards a static KV cache: registers of the filled length and of the hidden state, slots in all."""

    length: int
    hidden: int
    capacity: int

    def __call__(self, registers: list, new: int | None = None) -> None:
        """Checks the room for `new` tokens: where it is None, as many as the hidden state has."""
        filled = int(registers[self.length])
        new = registers[self.hidden].shape[1] if new is None else new
        if filled + new > self.capacity:
            raise CacheFullError(
                f"the static KV cache holds {self.capacity} tokens; {filled} are filled and this step adds {new}. "
                f"Make it larger (max_cache_len or max_new_tokens, at least {filled + new}) or use a dynamic cache"
            )


def capacity_check(plan: DecoderPlan, register: dict[fx.Node, int]) -> CapacityCheck | None:
    """Returns the check for the first block whose static cache is filled from the front, None where there is none."""
    for block in plan.blocks:
        if block.kv.capacity is not None and block.kv.lengths:
            return CapacityCheck(register[block.kv.lengths[0]], register[plan.blocks[0].hidden_in], block.kv.capacity)
    return None
