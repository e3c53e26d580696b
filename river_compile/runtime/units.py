"""Cut a program into units, each captured as one graph. A unit reads and writes slots.

Not handled: when units run and are captured (`state.py`).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from river_compile.lowering.native import Callee
from river_compile.passes.program import Program, Refusal, SegmentSpec

# Slots in addition to the graph's values: the latest score, and the vocabulary blocks whose logits the head computes.
SCORE, VOCAB_BLOCKS = -1, -2


def gather(indices: Sequence[int]) -> Callable[[Sequence], Sequence]:
    """Return a function that picks these slots."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda slots: [slots[i] for i in indices]


class Step:
    """A segment, its callee and the tensors of its packed matmuls."""

    __slots__ = ("_outputs", "_take", "callee", "moves", "packed", "segment")

    def __init__(self, segment: SegmentSpec, callee: Callee, packed: Sequence[Tensor], moves: bool = False) -> None:
        self.segment, self.callee, self.packed = segment, callee, tuple(packed)
        self.moves = moves  # its weights may lie at another address in every run
        self._take = gather(segment.inputs)
        self._outputs = (*segment.outputs, *[SCORE] * segment.has_score)

    def __call__(self, slots: list[Any]) -> None:
        """Read inputs from the slots and write outputs there; the score goes to `SCORE`."""
        self.run_as(self.callee, slots)

    def run_as(self, callee: Callee, slots: list[Any]) -> None:
        """Run another callee in place of the compiled segment."""
        inputs = [*self._take(slots), *self.packed]
        if self.segment.takes_vocab_blocks:
            inputs.append(slots[VOCAB_BLOCKS])
        for index, value in zip(self._outputs, callee(inputs), strict=True):
            slots[index] = value

    @property
    def reads(self) -> tuple[int, ...]:
        return (*self.segment.inputs, *[VOCAB_BLOCKS] * self.segment.takes_vocab_blocks)

    @property
    def writes(self) -> tuple[int, ...]:
        return self._outputs


@dataclass(frozen=True, eq=False)
class Unit:
    """Steps that run one after another."""

    name: str
    depth: int  # of a span: blocks executed at its end; of a tail: blocks before it
    steps: tuple[Step, ...]
    reads: tuple[int, ...]  # slots that must hold values before it runs
    writes: tuple[int, ...]  # slots that are read after it
    flag: int | None  # depth whose flag takes the score (L for a head); None without a score
    obstacle: Refusal | None  # why it cannot be captured, None if it can

    def run(self, slots: list[Any], flags: Tensor | None = None) -> None:
        """Run the steps; copy the score to host memory without waiting."""
        for step in self.steps:
            step(slots)
        if self.flag is not None and flags is not None:
            flags[self.flag].copy_(slots[SCORE], non_blocking=True)


class Units:
    """The units of one program, made on demand."""

    #     span a-b   [embedding stage,] blocks a+1..b, whose last check has a score
    #     last a-L   [embedding stage,] blocks a+1..L and the head
    #     tail d     [embedding stage,] twins d+1..L and the twins' head

    def __init__(
        self,
        program: Program,
        steps: Mapping[SegmentSpec, Step],  # of each reachable segment
        obstacle: Callable[[Step], Refusal | None],
        kept: frozenset[int] = frozenset(),  # slots that are read after a run besides the outputs
    ) -> None:
        self._program, self.steps, self._kept = program, steps, kept
        self._keeping: dict[int, Units] = {}
        self._device_obstacle = obstacle  # why a device cannot capture a step, None if it can
        self._made: dict[tuple[SegmentSpec, ...], tuple[Unit, ...]] = {}

    def span(self, start: int, end: int) -> tuple[Unit, ...]:
        """Return the units of blocks start+1..end; the first includes the embedding stage, the last the head."""
        program = self._program
        if start == end:
            return ()
        segments = (*self._first(start), *program.blocks[start:end])
        return self._units((*segments, program.head) if end == program.num_blocks else segments, start)

    def tail(self, depth: int) -> tuple[Unit, ...]:
        """Return the units of twins depth+1..L and their head; none at L."""
        program = self._program
        if depth == program.num_blocks:
            return ()
        return self._units((*self._first(depth), *program.twins[depth:], program.twin_head or program.head), depth)

    def units_for(self, depth: int) -> tuple[Unit, ...]:
        """Return the units of a token that exits after `depth` blocks."""
        return (*self.span(0, depth), *self.tail(depth))

    def keeping(self, slot: int) -> Units:
        """Return units after whose runs a slot's value can be read, too."""
        if slot not in self._keeping:
            self._keeping[slot] = Units(self._program, self.steps, self._device_obstacle, self._kept | {slot})
        return self._keeping[slot]

    def _first(self, start: int) -> tuple[SegmentSpec, ...]:
        return () if start else (self._program.prologue,)

    def _units(self, segments: tuple[SegmentSpec, ...], start: int) -> tuple[Unit, ...]:
        if segments not in self._made:
            # Segments that cannot be captured split a unit: each run of the same kind is one.
            groups = itertools.groupby(segments, lambda segment: self._obstacle(segment) is None)
            self._made[segments] = tuple(self._unit(tuple(group), start) for _, group in groups)
        return self._made[segments]

    def _obstacle(self, segment: SegmentSpec) -> Refusal | None:
        step = self.steps[segment]
        if step.moves:
            path = self._program.block_paths[segment.depth - 1]
            return Refusal("its weights have another address in every run", path)
        return segment.obstacle or self._device_obstacle(step)

    def _unit(self, segments: tuple[SegmentSpec, ...], start: int) -> Unit:
        program, last = self._program, segments[-1]
        steps = tuple(self.steps[segment] for segment in segments)
        reads: dict[int, None] = {}
        written: dict[int, None] = {}
        for step in steps:
            reads |= {slot: None for slot in step.reads if slot not in written}
            written |= dict.fromkeys(step.writes)
        is_end = last in (program.head, program.twin_head)
        needed = self._kept | set(program.returned) | ({SCORE} if is_end and last.has_score else set())
        if not is_end:
            needed |= {slot for s in program.segments if s.depth > last.depth for slot in s.inputs}
        flag = None
        if last.has_score:
            flag = program.num_blocks if is_end else last.depth
        return Unit(
            name=_name(segments, start, program.num_blocks),
            depth=last.depth if last.kind == "block" else start,
            steps=steps,
            reads=tuple(reads),
            writes=tuple(slot for slot in written if slot in needed),
            flag=flag,
            obstacle=next(filter(None, map(self._obstacle, segments)), None),
        )


def _name(segments: Sequence[SegmentSpec], start: int, num_blocks: int) -> str:
    """Return a unit's name in logs and reports."""
    kinds = {segment.kind for segment in segments}
    if "block" in kinds:
        blocks = [segment.depth for segment in segments if segment.kind == "block"]
        return f"{'last' if 'head' in kinds else 'span'} {blocks[0] - 1}-{blocks[-1]}"
    if "twin" in kinds:
        depth = next(segment.depth for segment in segments if segment.kind == "twin") - 1
        return f"{'tail' if kinds & {'head', 'twin_head'} else 'twins'} {depth}"
    if len(segments) == 1 or start == num_blocks:
        return "prologue" if segments[0].kind == "prologue" else "head"
    return segments[0].name
