"""Cuts a rewritten decoder into units of capture: spans of blocks between exit checks, and one tail per exit depth.

    span a-b    [prologue,] blocks a+1..b, and the flag of the check after block b
    last a-L    [prologue,] blocks a+1..L and the head
    tail d      [prologue,] twins d+1..L and the river's head
    twins d, head    both alone, where the head cannot be captured and the twins can (spans: "span a-L" and "last L-L")
    prologue    the prologue alone, where it cannot be captured (spans then start at block 1, and tails with twins)

A unit reads and writes slots. Those that other units or the caller need afterwards get buffers; all others live in the
graph's own memory for the length of one replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from river_compile.passes.capture_safety import HostNumber, host_numbers, idle_numbers, obstacle
from river_compile.passes.nodes import is_tensor
from river_compile.passes.program import Refusal, RiverProgram, Segment
from river_compile.runtime.runner import Step
from river_compile.runtime.slots import SCORE, gather

Kind = Literal["prologue", "span", "last", "tail", "twins", "head"]


def buffer_like(value: Tensor) -> Tensor:
    """Returns an uninitialised tensor of the same shape, strides, dtype and device, which any mode may write to.

    Compiled code relies on strides, those of expanded dimensions (0) too.
    """
    with torch.inference_mode(False):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def copy_into(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies values into tensors of the same shapes, on a GPU those of one dtype by one kernel.

    Of an expanded dimension, the one element that is there is copied. (A copy alone is a memcpy, which takes a captured
    graph's node of its own; several kernels in a line start faster.)
    """
    alike: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for buffer, value in zip(buffers, values, strict=True):
        if 0 in buffer.stride():
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in buffer.stride())
            buffer, value = buffer[once], value[once]
        targets, sources = alike.setdefault((value.dtype, value.device), ([], []))
        targets.append(buffer)
        sources.append(value)
    for targets, sources in alike.values():
        torch._foreach_copy_(targets, sources)


@dataclass(frozen=True, eq=False)
class CaptureUnit:
    """Steps that are captured as one graph."""

    kind: Kind
    start: int  # blocks executed before it
    end: int  # of a span the blocks executed at its end, otherwise `start`
    steps: tuple[Step, ...]
    reads: tuple[int, ...]  # slots whose values must be there when it starts, ascending
    keys: tuple[int, ...]  # those of them whose address or value a capture depends on, tensors first
    tensors: int  # how many of these are tensors
    writes: tuple[int, ...]  # slots of the tensors that are needed when it has ended
    # what it hands on besides, computed by the host: slot, function, slots of its arguments
    numbers: tuple[tuple[int, Callable[..., int], tuple[int, ...]], ...]
    # where the score of its exit check goes in host memory, a float32 scalar; None without one
    flag: Tensor | None
    obstacle: Refusal | None  # why it cannot be captured, if it cannot

    @functools.cached_property
    def inputs_in(self) -> Callable[[Sequence], Sequence]:
        """Picks the slots that `keys` name, tensors first."""
        return gather(self.keys)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The slots among `keys` that hold numbers."""
        return self.keys[self.tensors :]

    @property
    def name(self) -> str:
        """How logs and reports call it: "span 0-2", "last 3-4", "tail 2", "twins 2", "prologue" or "head"."""
        if self.kind in ("prologue", "head"):
            return self.kind
        return f"{self.kind} {self.start}" if self.kind in ("tail", "twins") else f"{self.kind} {self.start}-{self.end}"

    def run(self, slots: list) -> None:
        """Runs the steps on the slots and sends the score to the host, without waiting for it."""
        for step in self.steps:
            step(slots)
        if self.flag is not None:
            self.flag.copy_(slots[SCORE], non_blocking=True)

    def count(self, slots: list) -> None:
        """Computes the numbers that it hands on."""
        for index, compute, arguments in self.numbers:
            slots[index] = compute(*[slots[i] for i in arguments])

    def run_into(self, slots: list, outputs: Mapping[int, Tensor]) -> None:
        """Runs the steps on the slots and copies the later needed values into buffers, by slot."""
        self.run(slots)
        copy_into([*outputs.values()], [slots[index] for index in outputs])


class Partition:
    """The units of one program, each made when it is asked for.

    Args:
        flags: float32 host memory, one value per block, for the score of the check after it.
        device_obstacle: why the device cannot capture what a step runs, None where it can.

    Attributes:
        prologue: the prologue as a unit, None where it is part of the first span.
    """

    def __init__(
        self,
        program: RiverProgram,
        steps: Mapping[Segment, Step],
        flags: Tensor,
        device_obstacle: Callable[[Step], Refusal | None],
    ) -> None:
        self._program, self._steps, self._flags, self._device_obstacle = program, steps, flags, device_obstacle
        self._num_blocks = program.plan.num_blocks
        moving = [block.depth for block in program.blocks if block in steps and steps[block].moves]
        # (blocks after this one have weights that move from run to run, and are not captured)
        self._resident = moving[0] - 1 if moving else self._num_blocks
        self._units: dict[tuple[Kind, int, int], CaptureUnit] = {}
        self._tails: dict[int, list[CaptureUnit]] = {}
        self._spans: dict[tuple[int, int], list[CaptureUnit]] = {}
        self._ways: dict[int, list[CaptureUnit]] = {}
        self._judged: dict[fx.Graph, tuple[Refusal | None, frozenset[int]]] = {}  # (which many segments share)
        self.prologue: CaptureUnit | None = None
        if self._obstacle(program.prologue) is not None:
            self.prologue = self._unit("prologue", 0, 0)

    def spans(self, start: int, end: int) -> list[CaptureUnit]:
        """Returns the units of blocks start+1..end, and the head's: several if not all can be captured."""
        if start == end:
            return []
        if (start, end) not in self._spans:
            cut = [self._resident] if start < self._resident < end else []
            pairs = zip((start, *cut), (*cut, end), strict=True)
            self._spans[start, end] = [unit for a, b in pairs for unit in self._span(a, b)]
        return self._spans[start, end]

    def way(self, depth: int) -> list[CaptureUnit]:
        """Returns the units of a token that leaves after `depth` blocks."""
        if depth not in self._ways:
            tail = self.tail(depth) if depth < self._num_blocks else []
            self._ways[depth] = [*self.spans(0, depth), *tail]
        return self._ways[depth]

    def tail(self, depth: int) -> list[CaptureUnit]:
        """Returns the units of twins depth+1..L and their head: two if the head alone has obstacles."""
        if depth not in self._tails:
            alone = self._head_is_alone("tail", depth)
            units = [self._unit("twins", depth, depth), self._head()] if alone else [self._unit("tail", depth, depth)]
            self._tails[depth] = units
        return self._tails[depth]

    def _span(self, start: int, end: int) -> list[CaptureUnit]:
        if end < self._num_blocks:
            return [self._unit("span", start, end)]
        if self._head_is_alone("last", start):
            return [self._unit("span", start, end), self._unit("last", end, end)]
        return [self._unit("last", start, end)]

    def _head(self) -> CaptureUnit:
        return self._unit("head", self._num_blocks, self._num_blocks)

    def _head_is_alone(self, kind: Kind, start: int) -> bool:
        """Says whether a unit's head alone cannot be captured."""
        *others, head = map(self._obstacle, self._segments(kind, start, self._num_blocks))
        return head is not None and bool(others) and not any(others)

    def _unit(self, kind: Kind, start: int, end: int) -> CaptureUnit:
        if (kind, start, end) not in self._units:
            self._units[kind, start, end] = self._make(kind, start, end)
        return self._units[kind, start, end]

    def _obstacle(self, segment: Segment) -> Refusal | None:
        if self._steps[segment].moves:
            path = self._program.plan.blocks[segment.depth - 1].path
            return Refusal("offloaded weights lie elsewhere in every run", path)
        return self._judge(segment)[0] or self._device_obstacle(self._steps[segment])

    def _judge(self, segment: Segment) -> tuple[Refusal | None, frozenset[int]]:
        """Returns why a segment's graph cannot be captured, and which of its inputs are idle numbers."""
        if segment.graph not in self._judged:
            found = obstacle(segment, self._program.plan.device), idle_numbers(segment)
            self._judged[segment.graph] = found
        return self._judged[segment.graph]

    def _segments(self, kind: Kind, start: int, end: int) -> list[Segment]:
        program = self._program
        if kind == "prologue":
            return [program.prologue]
        twins, head = list(program.twins[start:]), program.river_head or program.head
        first = [] if start or self.prologue is not None else [program.prologue]
        if kind in ("tail", "twins", "head"):
            return [*([*first, *twins] if kind != "head" else []), *([head] if kind != "twins" else [])]
        segments = [*first, *program.blocks[start:end]]
        return [*segments, program.head] if kind == "last" else segments

    def _make(self, kind: Kind, start: int, end: int) -> CaptureUnit:
        slots, is_end = self._program.slots, kind in ("last", "tail", "head")
        segments = self._segments(kind, start, end)
        reads: dict[int, bool] = {}  # slot -> whether a capture depends on it
        written: dict[fx.Node, None] = {}
        numbers: list[HostNumber] = []
        for segment in segments:
            _, idle = self._judge(segment)
            for place, node in enumerate(segment.inputs):
                if node not in written:
                    reads[slots[node]] = reads.get(slots[node], False) or place not in idle
            written |= dict.fromkeys(segment.outputs)
            numbers += host_numbers(segment)
        tensors = {slots[node] for segment in segments for node in segment.inputs if is_tensor(node)}
        keys = sorted((index for index in reads if reads[index]), key=lambda index: (index not in tensors, index))
        counted = {number.node for number in numbers}
        needed = set(self._program.returned)
        if not is_end:
            done = self._num_blocks if kind == "twins" else end
            needed |= {node for s in self._program.segments if s.depth > done for node in s.inputs}
        writes = sorted(slots[n] for n in written if n in needed and n not in counted)
        flag = None
        if segments[-1].has_score and is_end:
            writes.append(SCORE)
        elif segments[-1].has_score:
            flag = self._flags[end - 1]
        return CaptureUnit(
            kind=kind,
            start=start,
            end=end,
            steps=tuple(self._steps[segment] for segment in segments),
            reads=tuple(sorted(reads)),
            keys=tuple(keys),
            tensors=sum(index in tensors for index in keys),
            writes=tuple(writes),
            numbers=tuple((slots[n.node], n.compute, tuple(slots[i] for i in n.inputs)) for n in numbers),
            flag=flag,
            obstacle=next(filter(None, map(self._obstacle, segments)), None),
        )
