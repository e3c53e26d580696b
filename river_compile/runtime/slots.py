"""The slots of a run: one for each value that crosses a segment's border, and one more.

A list belongs to one step, or to steps of one caller that follow each other, so threads may run one program at the same
time. Not handled: writes through a view of a
cache, which :mod:`river_compile.passes.decoder` does not take for a KV cache.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import sympy
from torch.fx.experimental.symbolic_shapes import free_symbols

from river_compile.passes.nodes import mutated_inputs, rank, value_of
from river_compile.passes.program import RiverProgram
from river_compile.passes.segments import number_inputs

# The last slot belongs to no value of the graph: the number that the latest exit check or head returned.
SCORE = -1


class Slots(list[Any]):
    """The slots of a step, and `bound`, what a runner found out of them that holds for the next step on them too."""

    bound: Any = None


def new_slots(program: RiverProgram, args: Sequence = ()) -> Slots:
    """Returns the slots of a run, the graph's inputs in theirs."""
    return Slots([*args, *[None] * (len(program.slots) + 1 - len(args))])


def gather(indices: Sequence[int]) -> Callable[[Sequence], Sequence]:
    """Returns a function that picks these slots."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda slots: [slots[i] for i in indices]


def cache_slots(program: RiverProgram) -> tuple[int | None, int | None]:
    """Returns the slots of the tensor that tells sequences apart, before a step and after it, None if unknown.

    It is the first one that a block keeps its tokens in: one that is written in place, or the one that a step gets and
    the longer one that it returns, which the next step gets.
    """
    plan, slots = program.plan, program.slots
    block = next(b.index for b in plan.blocks if b.kv.writes)
    kv = plan.blocks[block].kv
    if kv.kind == "static":  # (a sliding window that is full is put together in a copy first)
        targets = [target for write in kv.writes for target in mutated_inputs(write) if target in slots]
        return (slots[targets[0]],) * 2 if targets else (None, None)
    write = kv.writes[0]
    stack, before = [write], None
    while stack and before is None:
        node = stack.pop()
        if node.op == "placeholder" and rank(node) == rank(write) and node is not plan.blocks[block].hidden_in:
            before = node
        stack += [n for n in node.all_input_nodes if plan.part_of.get(n, block + 1) == block + 1]
    return slots.get(before), slots.get(write)


def size_of_pass(program: RiverProgram) -> Callable[[Sequence], tuple[int, int]] | None:
    """Returns a pass's sequences and positions of each, by the graph's inputs; None if those do not tell."""
    plan, slots = program.plan, program.slots
    sizes = [sympy.sympify(s if isinstance(s, int) else s.node.expr) for s in (plan.batch, plan.query_length)]
    holders = number_inputs(node for node in slots if node.op == "placeholder")
    symbols = sorted(set().union(*[size.free_symbols for size in sizes]), key=str)
    if any(symbol not in holders for symbol in symbols):
        return None
    compute, places = sympy.lambdify(symbols, sizes, "math"), [slots[holders[symbol]] for symbol in symbols]
    return lambda args: tuple(compute(*[args[place] for place in places]))


class LastToken(NamedTuple):
    """Where a pass of many tokens holds what makes its head one of the last token alone.

    Attributes:
        hidden, size: the slots of the last hidden state and of the number of tokens.
        axis: that counts the tokens.
    """

    hidden: int
    size: int
    axis: int

    @classmethod
    def of(cls, program: RiverProgram) -> LastToken | None:
        """Returns them; None where the heads read more of each token than its hidden state, or others read that."""
        plan, hidden = program.plan, program.plan.blocks[-1].hidden_out
        length = plan.query_length
        symbol = None if isinstance(length, int) else length.node.expr
        holder = number_inputs(node for node in program.slots if node.op == "placeholder").get(symbol)
        if holder is None or hidden in program.returned:
            return None
        for head in filter(None, (program.head, program.river_head)):
            if any(symbol in free_symbols(value_of(n)) for n in head.inputs if n not in (hidden, holder)):
                return None
        return cls(program.slots[hidden], program.slots[holder], plan.token_axis)

    @contextlib.contextmanager
    def alone(self, slots: list) -> Iterator[None]:
        """Inside, the hidden state is that of the last token. (The number of tokens may be a result of the graph.)"""
        hidden, size = slots[self.hidden], slots[self.size]
        slots[self.hidden] = hidden.narrow(self.axis, hidden.shape[self.axis] - 1, 1).contiguous()
        slots[self.size] = 1
        yield
        slots[self.hidden], slots[self.size] = hidden, size
