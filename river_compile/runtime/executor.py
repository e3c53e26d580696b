"""Runs a RiverProgram: backbone blocks until an exit, twins for the rest, then the head.

Values live in a list of registers, one per input and per value that crosses a segment's border; a step gathers its
inputs from there, calls compiled code and stores the outputs. The registers of a call belong to that call, so threads
may run one executor at the same time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from river_compile.exits import CRITERIA, Criterion, Memories, Memory, Threshold
from river_compile.fills.base import Fill, place_of
from river_compile.lowering.compile import Callee
from river_compile.passes.program import RiverProgram, Segment

from .rewind import rewind_of
from .slots import cache_registers, capacity_check, gather
from .trace import ExitStats, Outcome, record_step

if TYPE_CHECKING:
    from river_compile.offload.streaming import Streamer


class Step:
    """A segment bound to its registers and weights.

    Attributes:
        moves: whether it may compute with weights at another address in every run.
    """

    __slots__ = ("_callee", "_handed_on", "_outputs", "_take", "name", "packed")
    moves = False

    def __init__(
        self, segment: Segment, callee: Callee, packed: Sequence[Tensor], register: dict[fx.Node, int]
    ) -> None:
        self.name = segment.name
        self._callee = callee
        self.packed = list(packed)
        self._take = gather([register[node] for node in segment.inputs])
        self._outputs = [register[node] for node in segment.outputs]
        self._handed_on = [(register[new], register[old]) for new, old in segment.handed_on]

    def __call__(self, registers: list) -> Sequence:
        """Runs the segment on the registers and returns its outputs (an exit score last, where it has one)."""
        outputs = self._callee([*self._take(registers), *self.packed])
        for index, value in zip(self._outputs, outputs):  # noqa: B905  (a score may follow)
            registers[index] = value
        for new, old in self._handed_on:
            registers[new] = registers[old]
        return outputs


@dataclass(frozen=True)
class ExitRule:
    """When a token leaves.

    Attributes:
        threshold: of the criterion, None where it plays no part.
        fixed_depth: blocks to execute where there is no threshold.
        criterion: what the threshold is compared with.
        first_exit: smallest exit depth.
        deepest: depth at which every token leaves at the latest, None where it may go through all blocks.
    """

    threshold: Threshold | None
    fixed_depth: int
    criterion: Criterion = CRITERIA["similarity"]
    first_exit: int = 1
    deepest: int | None = None


_forced = threading.local()


@contextlib.contextmanager
def forced_depth(depth: int) -> Iterator[None]:
    """Makes every decode step that this thread runs inside leave after `depth` blocks, whatever its exit rule.

    Raises (in the step):
        ValueError: the program was compiled for one other fixed depth and lacks the segments.
    """
    before = getattr(_forced, "depth", None)
    _forced.depth = depth
    try:
        yield
    finally:
        _forced.depth = before


@contextlib.contextmanager
def forced_threshold(threshold: Threshold, first_exit: int = 1) -> Iterator[None]:
    """Makes every decode step that this thread runs inside use another threshold and first exit than were compiled.

    Checks stand where the program was compiled with them: `first_exit` can only be later than the compiled one. Inside
    :func:`forced_depth` the depth wins.

    Raises (in the step):
        ValueError: the program was compiled for a fixed depth and has no checks.
    """
    before = getattr(_forced, "threshold", None)
    _forced.threshold = (threshold, first_exit)
    try:
        yield
    finally:
        _forced.threshold = before


class RiverExecutor:
    """Callable that stands in for a traced graph.

    Args:
        program: the rewritten graph.
        steps: the compiled step of each segment that this program can reach.
        rule: when tokens leave.
        stats: counts exits.
        memories: what criterion and fill remember of the model's sequences; shared by the model's graphs.
        fill: what stands in for the entries of skipped blocks.

    Attributes:
        prologue, blocks, twins, head, river_head: the steps; None stands for a segment that cannot be reached.
        size: number of registers, the graph's inputs first, the fill's last.
        fill: what stands in for the entries of skipped blocks.
        place: where the fill finds its values.
        decodes: whether the graph is a decode step's.
        streamer: brings in the weights of offloaded blocks, None where there is nothing to bring.
    """

    def __init__(
        self,
        program: RiverProgram,
        steps: Mapping[Segment, Step],
        rule: ExitRule,
        stats: ExitStats,
        memories: Memories | None = None,
        fill: Fill | None = None,
    ) -> None:
        plan = program.plan
        register = program.slots
        self.size = len(register) + 1  # (one more for what the fill knows of the sequence)
        self.prologue = steps[program.prologue]
        self.blocks = [steps.get(block) for block in program.blocks]
        self.twins = [steps.get(twin) for twin in program.twins] or [None for _ in program.blocks]
        self.head = steps.get(program.head)
        self.river_head = self.head if program.river_head is None else steps.get(program.river_head, self.head)
        self._has_score = [block.has_score for block in program.blocks]
        self._return = gather([register[node] for node in program.returned])
        self._check_capacity = capacity_check(plan, register)
        self._rule = rule
        self._stats = stats
        self.decodes = plan.is_decode
        self._memories = memories or Memories()
        self._cache_in, self._cache_out = cache_registers(plan, register)
        self._rewind = rewind_of(plan, register)
        self.fill = fill = fill or Fill()
        self.place = place_of(program, register)
        self.blocks = fill.blocks(self.blocks, [steps.get(segment) for segment in program.catch_up], self.place)
        self._remembers = rule.criterion.remembers or fill.remembers
        self.streamer: Streamer | None = None

    def __call__(self, *args: object) -> tuple:
        registers = [*args, *[None] * (self.size - len(args))]
        rule = self._rule_of_step()
        memory = self._recall(registers)
        with torch._C._DisableAutocast():
            self.prologue(registers)
            if self._check_capacity is not None:
                self._check_capacity(registers)
            limit = self.fill.begin(registers, memory, self.place)
            outcome = self._run_blocks(registers, rule, memory, limit)
            if rule.threshold is not None and rule.criterion.may_doubt and outcome.depth < len(self.blocks):
                outcome = self._finish_or_doubt(registers, outcome, rule)
            else:
                outputs = self._finish(registers, outcome.depth)
                self.fill.end(registers, memory, self.place, outcome.depth)
                self._keep(registers, memory, outputs)
        self._close(outcome)
        return tuple(self._return(registers))

    def _close(self, outcome: Outcome) -> None:
        """Ends a step."""
        self._stats.count(outcome.depth, self.decodes, outcome.doubted)
        record_step(self._stats, self.decodes, outcome)
        if self.streamer is not None:
            self.streamer.forget()

    def _run_blocks(self, registers: list, rule: ExitRule, memory: Memory, limit: int) -> Outcome:
        """Runs backbone blocks until the exit, which comes after `limit` of them at the latest."""
        depth, entropy = self._depth_before(rule, memory)
        if depth is not None:
            for block in self.blocks[: min(depth, limit)]:
                block(registers)
            return Outcome(min(depth, limit), entropy=entropy)
        scores: list[float] = []
        reachable = self.blocks[: limit if rule.deepest is None else min(limit, rule.deepest)]
        for depth, block in enumerate(reachable, start=1):
            outputs = block(registers)
            if self._has_score[depth - 1] and depth >= rule.first_exit:
                scores.append(outputs[-1].item())
                if rule.criterion.leaves(depth, scores[-1], rule.threshold, memory):
                    return Outcome(depth, scores)
        return Outcome(len(reachable), scores)

    def _depth_before(self, rule: ExitRule, memory: Memory) -> tuple[int | None, float | None]:
        """Returns the depth where it is known before the first block, and the entropy that it was told by."""
        if rule.threshold is None:
            return rule.fixed_depth, None
        entropy = memory.read_entropy()
        num_blocks = len(self.blocks[: rule.deepest])
        return rule.criterion.depth_before(rule.threshold, rule.first_exit, num_blocks, entropy), entropy

    def _finish(self, registers: list, depth: int) -> Sequence:
        """Runs the twins behind `depth` and the head; returns the head's outputs."""
        for twin in self.twins[depth:]:
            twin(registers)
        return (self.head if depth == len(self.blocks) else self.river_head)(registers)

    def _finish_or_doubt(self, registers: list, outcome: Outcome, rule: ExitRule) -> Outcome:
        """Finishes through the river and, where its logits leave doubt, once more through the backbone."""
        moved = self._rewind.save(registers, outcome.depth)
        entropy = self._finish(registers, outcome.depth)[-1].item()
        if not rule.criterion.doubts(entropy, rule.threshold):
            return Outcome(outcome.depth, entropy=entropy)
        self._rewind.back(registers, outcome.depth, moved)
        for block in self.blocks[outcome.depth :]:
            block(registers)
        self.head(registers)
        return Outcome(len(self.blocks), entropy=entropy, doubted=True, river_from=outcome.depth)

    def _recall(self, registers: list) -> Memory:
        """Returns what is remembered of the sequence; for a prompt only what its cache lacks."""
        if not self._remembers or self._cache_in is None:
            return Memory()
        memory = self._memories.recall(registers[self._cache_in])
        return memory if self.decodes else Memory(gaps=memory.gaps)

    def _keep(self, registers: list, memory: Memory, outputs: Sequence) -> None:
        if self._remembers and self._cache_out is not None:
            memory.entropy = outputs[-1] if self._rule.criterion.reads_logits else None
            self._memories.keep(registers[self._cache_out], memory)

    def _rule_of_step(self) -> ExitRule:
        """Returns the exit rule with what this thread forces on it."""
        threshold, depth = getattr(_forced, "threshold", None), getattr(_forced, "depth", None)
        if self.decodes and depth is not None:
            return replace(self._rule, threshold=None, fixed_depth=self._check_depth(depth))
        if self.decodes and threshold is not None:
            return replace(self._rule, threshold=self._check_threshold(threshold[0]), first_exit=threshold[1])
        return self._rule

    def _check_threshold(self, threshold: Threshold) -> Threshold:
        """Returns a forced threshold after making sure that this program has checks."""
        if self._rule.threshold is None:
            raise ValueError(
                f"threshold {threshold} was asked for, but this model was compiled with "
                f"exit_depth={self._rule.fixed_depth} and checks no block; compile it without exit_depth"
            )
        return threshold

    def _check_depth(self, depth: int) -> int:
        """Returns a forced depth after making sure that its segments are there."""
        deepest = self._rule.deepest
        if deepest is not None and depth > deepest:
            raise ValueError(
                f"depth {depth} was asked for, but this model was compiled with offload={deepest} and "
                "offload_policy='exit': no token goes further; compile it with offload_policy='fetch'"
            )
        head = self.head if depth == len(self.blocks) else self.river_head
        if any(step is None for step in (*self.blocks[:depth], *self.twins[depth:], head)):
            raise ValueError(
                f"depth {depth} was asked for, but this model was compiled with exit_depth={self._rule.fixed_depth} "
                "and has no other segments; compile it without exit_depth"
            )
        return depth
