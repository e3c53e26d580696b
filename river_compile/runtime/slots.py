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
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from river_compile.passes.nodes import memory_of, mutated_inputs, rank, value_of
from river_compile.passes.program import RiverProgram
from river_compile.passes.segments import number_inputs

# The last slot belongs to no value of the graph: the number that the latest exit check or head returned.
SCORE = -1

# Copies of values, each with its slot.
Saved = Sequence[tuple[int, Tensor]]


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


def cache_slots(program: RiverProgram, block: int | None = None) -> tuple[int | None, int | None]:
    """Returns the slots of a tensor that a block keeps its tokens in, before a step and after it, None if unknown.

    That is the tensor that is written in place, or the one that a step gets and the longer one that it returns, which
    the next step gets. Without `block` it is the first one that keeps anything, which tells sequences apart.
    """
    plan, slots = program.plan, program.slots
    if block is None:
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


class WrittenInPlace:
    """The writes to undo before a decode step's blocks run again after their twins.

    A dynamic cache needs nothing of this, nor do entries written at a counted position (``index_copy_``): the second
    run overwrites them.
    """

    def __init__(self, program: RiverProgram) -> None:
        self._counters, self._moved = _written_in_place(program)

    def save(self, slots: list, depth: int) -> Saved:
        """Saves the state that a tail after `depth` blocks would destroy, for :meth:`rewind`."""
        return [(i, slots[i].clone()) for block in self._moved[depth:] for i in block if slots[i] is not None]

    def rewind(self, slots: list, start: int, end: int, saved: Saved = ()) -> None:
        """Makes blocks start+1..end ready to run once more for this token."""
        for index, value in saved:
            slots[index].copy_(value)
        for block in self._counters[start:end]:  # (blocks may share a counter: each of them advanced it)
            for index in block:
                slots[index].sub_(1)


def _written_in_place(program: RiverProgram) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the tensors that a program's blocks write in place and no second run overwrites.

    Returns:
        By block, the slots of the integer scalars that it advances by one token; and by block, those of whatever else
        it writes in place (a static sliding window that is full moves all its entries).
    """
    plan, slots = program.plan, program.slots
    counters: list[dict[int, None]] = [{} for _ in plan.blocks]
    moved: list[dict[int, None]] = [{} for _ in plan.blocks]
    for node, part in plan.part_of.items():
        if not 1 <= part <= plan.num_blocks or node.target is Tensor.index_copy_:
            continue
        for target in mutated_inputs(node):
            counter = memory_of(target)  # (a first step may count through a `to` that changes nothing)
            target = counter if _is_counter(counter) else target
            if target in slots and plan.part_of.get(target) != part:
                kind = counters if _is_counter(target) else moved
                kind[part - 1][slots[target]] = None
    return list(map(list, counters)), list(map(list, moved))


def _is_counter(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point()
