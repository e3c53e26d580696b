"""Runs a RiverProgram: backbone blocks until an exit, twins for the rest, then the head.

Values live in a list of registers, one per input and per value that crosses a segment's border; a step gathers its
inputs from there, calls compiled code and stores the outputs. The registers of a call belong to that call, so threads
may run one executor at the same time.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from river_compile.passes.types import DecoderPlan, RiverProgram, Segment

from .errors import CacheFullError
from .lowering import Callee
from .stats import ExitStats, record_step


class Step:
    """A segment bound to its registers and weights."""

    __slots__ = ("_callee", "_outputs", "_take", "name", "packed")

    def __init__(
        self, segment: Segment, callee: Callee, packed: Sequence[Tensor], register: dict[fx.Node, int]
    ) -> None:
        self.name = segment.name
        self._callee = callee
        self.packed = list(packed)
        self._take = gather([register[node] for node in segment.inputs])
        self._outputs = [register[node] for node in segment.outputs]

    def __call__(self, registers: list) -> Sequence:
        """Runs the segment on the registers and returns its outputs (an exit score last, where it has one)."""
        outputs = self._callee([*self._take(registers), *self.packed])
        for index, value in zip(self._outputs, outputs):  # noqa: B905  (a score may follow)
            registers[index] = value
        return outputs


def gather(indices: Sequence[int]) -> Callable[[list], Sequence]:
    """Returns a function that picks these registers."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda registers: [registers[i] for i in indices]


@dataclass(frozen=True)
class ExitRule:
    """When a token leaves.

    Attributes:
        threshold: the similarity that a block must exceed, None where checks play no part.
        fixed_depth: blocks to execute where there is no threshold.
    """

    threshold: float | None
    fixed_depth: int


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
def forced_threshold(threshold: float, first_exit: int = 1) -> Iterator[None]:
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


class RiverExecutor:
    """Callable that stands in for a traced graph.

    Args:
        program: the rewritten graph.
        steps: the compiled step of each segment that this program can reach, by segment name.
        rule: when tokens leave.
        stats: counts exits.

    Attributes:
        prologue, blocks, twins, head, river_head: the steps; None stands for a segment that cannot be reached.
        size: number of registers, the graph's inputs first.
    """

    def __init__(self, program: RiverProgram, steps: dict[str, Step], rule: ExitRule, stats: ExitStats) -> None:
        plan = program.plan
        register = registers_of(program)
        depths = range(1, plan.num_blocks + 1)
        self.size = len(register)
        self.prologue = steps["prologue"]
        self.blocks = [steps.get(f"block_{d}") for d in depths]
        self.twins = [steps.get(f"twin_{d}") for d in depths]
        self.head = steps.get("head")
        self.river_head = steps.get("river_head", self.head)
        self._has_score = [block.has_score for block in program.blocks]
        self._return = gather([register[node] for node in program.returned])
        self._check_capacity = capacity_check(plan, register)
        self._rule = rule
        self._stats = stats
        self._decode = plan.is_decode

    def __call__(self, *args: object) -> tuple:
        registers = [*args, *[None] * (self.size - len(args))]
        with torch._C._DisableAutocast():
            self.prologue(registers)
            if self._check_capacity is not None:
                self._check_capacity(registers)
            depth, scores = self._run_blocks(registers)
            for twin in self.twins[depth:]:
                twin(registers)
            (self.head if depth == len(self.blocks) else self.river_head)(registers)
        self._stats.count(depth, self._decode)
        record_step(self._stats, depth, scores, self._decode)
        return tuple(self._return(registers))

    def _run_blocks(self, registers: list) -> tuple[int, list[float]]:
        """Runs backbone blocks until the exit; returns the blocks executed and the similarities seen."""
        threshold, fixed_depth, first_exit = self._rule_now()
        scores: list[float] = []
        if threshold is None:
            for block in self.blocks[:fixed_depth]:
                block(registers)
            return fixed_depth, scores
        for depth, (block, has_score) in enumerate(zip(self.blocks, self._has_score, strict=True), start=1):
            outputs = block(registers)
            if has_score and depth >= first_exit:
                score = outputs[-1].item()
                scores.append(score)
                if score > threshold:  # false for NaN: a token whose score is no number stays
                    return depth, scores
        return len(self.blocks), scores

    def _rule_now(self) -> tuple[float | None, int, int]:
        """Returns what holds for this step: threshold (None: none), depth without one, first exit with one."""
        threshold, fixed_depth, first_exit = self._rule.threshold, self._rule.fixed_depth, 1
        forced_rule = getattr(_forced, "threshold", None)
        if forced_rule is not None and self._decode:
            threshold, first_exit = self._check_rule(forced_rule)
        forced = getattr(_forced, "depth", None)
        if forced is not None and self._decode:
            threshold, fixed_depth = None, self._check_depth(forced)
        return threshold, fixed_depth, first_exit

    def _check_rule(self, rule: tuple[float, int]) -> tuple[float, int]:
        """Returns a forced threshold and first exit after making sure that this program has checks."""
        if self._rule.threshold is None:
            raise ValueError(
                f"threshold {rule[0]} was asked for, but this model was compiled with "
                f"exit_depth={self._rule.fixed_depth} and checks no block; compile it without exit_depth"
            )
        return rule

    def _check_depth(self, depth: int) -> int:
        """Returns a forced depth after making sure that its segments are there."""
        head = self.head if depth == len(self.blocks) else self.river_head
        if any(step is None for step in (*self.blocks[:depth], *self.twins[depth:], head)):
            raise ValueError(
                f"depth {depth} was asked for, but this model was compiled with exit_depth={self._rule.fixed_depth} "
                "and has no other segments; compile it without exit_depth"
            )
        return depth


def registers_of(program: RiverProgram) -> dict[fx.Node, int]:
    """Numbers the values that a run keeps: first the graph's inputs in order, then what crosses segments' borders."""
    placeholders = [n for n in program.plan.graph_module.graph.nodes if n.op == "placeholder"]
    crossing = [n for s in (program.prologue, *program.blocks, program.head) for n in s.outputs]
    return {node: i for i, node in enumerate([*placeholders, *crossing])}
