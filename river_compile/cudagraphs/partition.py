"""Cuts a rewritten decoder into units of capture: pieces between exit checks, and one tail per exit depth.

    piece a-b   [prologue,] blocks a+1..b, and the flag of the check after block b
    last a-L    [prologue,] blocks a+1..L and the head
    tail d      twins d+1..L and the river's head
    prologue    the prologue alone, where it cannot be captured (the pieces then start at block 1)

A unit reads and writes registers. Those that other units or the caller need afterwards get buffers; all others live in
the graph's own memory for the length of one replay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from river_compile.passes.graph_safety import HostNumber, host_numbers, idle_numbers, obstacle
from river_compile.passes.nodes import value_of
from river_compile.passes.program import Refusal, RiverProgram, Segment
from river_compile.runtime.executor import Step

_MOVING = "offloaded weights lie elsewhere in every run"


def buffer_like(value: Tensor) -> Tensor:
    """Returns an uninitialised tensor of the same shape, strides, dtype and device, which any mode may write to.

    Compiled code relies on strides, those of expanded dimensions (0) too.
    """
    with torch.inference_mode(False):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def copy_into(buffer: Tensor, value: Tensor) -> None:
    """Copies a value into a tensor of the same strides; of an expanded dimension, the one element that is there."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in buffer.stride())
    buffer[once].copy_(value[once])


_HEADS = ("head", "river_head")


@dataclass(frozen=True, eq=False)
class Unit:
    """Steps that are captured as one graph.

    Attributes:
        name: "piece 0-2", "last 3-4", "tail 2" or "prologue".
        depth: blocks executed at a piece's end, or before a tail.
        blocks: numbers (from 1) of the backbone blocks in it.
        steps: what it runs, in order.
        reads: registers whose values must be there when it starts, ascending.
        keys: those of them whose address or value a capture depends on.
        writes: registers of the tensors that are needed when it has ended, ascending.
        numbers: what it hands on besides, computed by the host: register, function, registers of its arguments.
        flag: where its score (of the exit check or the head) goes in host memory, a float32 scalar; None without one.
        score: the register that keeps the head's score, None without one.
        obstacle: why it cannot be captured, None where nothing speaks against it.
    """

    name: str
    depth: int
    blocks: tuple[int, ...]
    steps: tuple[Step, ...]
    reads: tuple[int, ...]
    keys: tuple[int, ...]
    writes: tuple[int, ...]
    numbers: tuple[tuple[int, Callable[..., int], tuple[int, ...]], ...]
    flag: Tensor | None
    score: int | None
    obstacle: Refusal | None

    def run(self, registers: list) -> None:
        """Runs the steps on the registers and sends the exit score to the host, without waiting for it."""
        outputs: Sequence = ()
        for step in self.steps:
            outputs = step(registers)
        if self.flag is not None:
            self.flag.copy_(outputs[-1], non_blocking=True)
        if self.score is not None:
            registers[self.score] = outputs[-1]

    def count(self, registers: list) -> None:
        """Computes the numbers that it hands on."""
        for index, compute, arguments in self.numbers:
            registers[index] = compute(*[registers[i] for i in arguments])

    def run_into(self, registers: list, outputs: dict[int, Tensor]) -> None:
        """Runs the steps on a copy of the registers and copies what is needed afterwards into buffers."""
        own = list(registers)
        self.run(own)
        for index, buffer in outputs.items():
            copy_into(buffer, own[index])


class UnitMaker:
    """Makes the units of one program.

    Args:
        program: the rewritten decoder.
        steps: the compiled step of each segment that can be reached.
        flags: float32 host memory, one value per depth from 0 to L; the head's score takes the place of L.
        deepest: blocks that a token executes at most, None for L.

    Attributes:
        ends: the depths at which pieces end: the candidates, the depth before the first block whose weights move from
            run to run (which is not captured), and the deepest.
        score: the register behind all others, which keeps the head's score.
        prologue: the prologue as a unit, where it cannot be part of the first piece.
    """

    def __init__(
        self,
        program: RiverProgram,
        steps: Mapping[Segment, Step],
        flags: Tensor,
        deepest: int | None = None,
    ) -> None:
        self._program = program
        self._steps = steps
        self._register = program.slots
        self._flags = flags
        self.score = len(program.slots)
        self._num_blocks = program.plan.num_blocks
        moving = [block.depth for block in program.blocks if block in steps and steps[block].moves]
        self._resident = moving[0] - 1 if moving else self._num_blocks
        last = self._num_blocks if deepest is None else deepest
        between = {self._resident} if 0 < self._resident < last else set()
        self.ends = (*sorted(between | set(program.candidates)), last)
        self._home = value_of(program.plan.blocks[0].hidden_in).device
        blocked = obstacle(program.prologue, self._home)
        self.prologue = None
        if blocked is not None:
            self.prologue = self._make("prologue", 0, (), [program.prologue], blocked)
        self._made: dict[tuple, Unit] = {}

    def pieces(self, start: int, end: int) -> list[Unit]:
        """Returns the units of blocks start+1..end: two where only the first blocks can be captured."""
        cut = [self._resident] if start < self._resident < end else []
        return [self.piece(a, b) for a, b in zip((start, *cut), (*cut, end), strict=True)]

    def piece(self, start: int, end: int) -> Unit:
        """Returns the unit of blocks start+1..end, with the prologue where it starts at 0 and the head at the end."""
        if ("piece", start, end) not in self._made:
            segments = [] if start or self.prologue is not None else [self._program.prologue]
            blocks = tuple(range(start + 1, end + 1))
            segments += self._program.blocks[start:end]
            last = end == self._num_blocks
            if last:
                segments.append(self._program.head)
            moving = [d for d in blocks if d > self._resident]
            blocked = Refusal(_MOVING, self._program.plan.blocks[moving[0] - 1].path) if moving else None
            unit = self._make(f"{'last' if last else 'piece'} {start}-{end}", end, blocks, segments, blocked)
            self._made["piece", start, end] = unit
        return self._made["piece", start, end]

    def tail(self, depth: int) -> Unit:
        """Returns the unit of twins depth+1..L and the head that they take."""
        if ("tail", depth) not in self._made:
            segments = [*self._program.twins[depth:], self._program.river_head or self._program.head]
            self._made["tail", depth] = self._make(f"tail {depth}", depth, (), segments)
        return self._made["tail", depth]

    def inputs(self, name: str) -> list[int]:
        """Returns the registers that a segment reads, the graph's inputs among them."""
        return [self._register[node] for s in self._program.segments if s.name == name for node in s.inputs]

    def packed(self, name: str) -> list[Tensor]:
        """Returns the packed weights of a segment's 4-bit products."""
        return [tensor for segment, step in self._steps.items() if segment.name == name for tensor in step.packed]

    def _make(
        self, name: str, depth: int, blocks: tuple[int, ...], segments: list[Segment], blocked: Refusal | None = None
    ) -> Unit:
        for segment in segments:
            blocked = blocked or obstacle(segment, self._home)
        reads: dict[int, bool] = {}  # register -> whether a capture depends on it
        written: dict = {}
        numbers: list[HostNumber] = []
        for segment in segments:
            idle = idle_numbers(segment)
            for node in segment.inputs:
                if node not in written:
                    index = self._register[node]
                    reads[index] = reads.get(index, False) or node not in idle
            written |= dict.fromkeys(segment.outputs)
            numbers += host_numbers(segment)
        counted = {number.node for number in numbers}
        later = self._read_later(segments, depth)
        with_head = segments[-1].kind in _HEADS
        scored = segments[-1].has_score
        writes = sorted(self._register[n] for n in written if n in later and n not in counted)
        if scored and with_head:
            writes.append(self.score)
        return Unit(
            name,
            depth,
            blocks,
            tuple(self._steps[segment] for segment in segments),
            tuple(sorted(reads)),
            tuple(index for index in sorted(reads) if reads[index]),
            tuple(writes),
            tuple((self._register[n.node], n.compute, tuple(self._register[i] for i in n.inputs)) for n in numbers),
            self._flags[self._num_blocks if with_head else depth] if scored else None,
            self.score if scored and with_head else None,
            blocked,
        )

    def _read_later(self, segments: list[Segment], depth: int) -> set:
        """Returns the values that a unit's followers or the caller read."""
        if segments[-1].kind in _HEADS:  # nothing follows
            return set(self._program.returned)
        program = self._program
        follow = [*program.blocks[depth:], *program.twins[depth:], program.head, program.river_head]
        return {node for s in follow if s is not None for node in s.inputs} | set(program.returned)
