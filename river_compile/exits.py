"""When a token leaves the backbone: criteria as bars, the policy of one graph, and what is remembered of a sequence.

A token leaves after d of L blocks where its *score* is above ``bars[d]``. No score is above `NEVER`; at `ALWAYS` a
token leaves whatever its score. A criterion says which score is read, and turns its threshold into a bar:

===========  ===========================================  ==========================  ==========
criterion    score                                        read                        bar
===========  ===========================================  ==========================  ==========
similarity   cosine of a block's input and output         after every candidate       threshold
confidence   minus the entropy of the previous logits     before the first block      -threshold
doubt        minus the entropy of the river's own logits  after the river's head      -threshold
===========  ===========================================  ==========================  ==========

"doubt" compares with ``bars[L]``: the backbone answers anew unless the score is above it. A score that is no number is
above no bar. Bars are numbers that a device compares with as well, so that a step needs no host to decide.

What is remembered of a sequence is a :class:`Memory`, found again by the tensor that holds the sequence's KV cache. A
prompt begins a new memory.

Not handled: rows that decide for themselves. A batch leaves when its least sure row may. Beam search puts other tensors
in the cache's place at every step, which look like a new sequence: "confidence" then never leaves. A device follows no
criterion that decides otherwise than by a bar (the host does).
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.passes.program import DecoderPlan, RiverProgram, Segment

WHOLE = sys.maxsize  # a forced depth: every block, however many there are
NEVER = math.inf
ALWAYS = math.nan  # (one object: tuples of bars are found again by it)

Threshold = float | tuple[float, ...]  # a tuple has one for each depth, see threshold_after


@dataclass
class Memory:
    """What is remembered of one sequence.

    Attributes:
        entropy: of the last step's logits, in nats, a scalar tensor; None before any.
        entries: what fills remember, each under its own class.
    """

    entropy: Tensor | None = None
    entries: dict[type, Any] = field(default_factory=dict)


class Criterion:
    """Which score is read, and what it must be above for a token to leave. Stateless.

    Attributes:
        name: how the option ``criterion=`` calls it.
        threshold: the default.
        never, always: thresholds at which no token leaves, and every one that has a score.
        reads: the score: of a "block", of the "previous" step's logits, or of the river's "answer".
    """

    name: ClassVar[str]
    threshold: ClassVar[float]
    never: ClassVar[float]
    always: ClassVar[float]
    reads: ClassVar[Literal["block", "previous", "answer"]]

    def bar(self, threshold: float) -> float:
        """Returns what a score must be above."""
        height = float(threshold if self.reads == "block" else -threshold)
        return NEVER if math.isnan(height) else height

    def leaves(self, depth: int, score: float, threshold: float) -> bool:
        """Says whether a token leaves after `depth` blocks. A class with another answer is asked on the host alone."""
        return score > self.bar(threshold)


class Similarity(Criterion):
    """The paper's: leave once a block hardly turns the hidden state."""

    name, threshold, never, always, reads = "similarity", 0.7, 2.0, -2.0, "block"


class Confidence(Criterion):
    """Leave at the first exit when the model was sure of the token that it is now given."""

    name, threshold, never, always, reads = "confidence", 0.5, 0.0, math.inf, "previous"


class Doubt(Criterion):
    """Leave at the first exit; where the river is not sure of its answer, the backbone answers instead."""

    name, threshold, never, always, reads = "doubt", 1.0, 0.0, math.inf, "answer"


def threshold_after(threshold: Threshold, depth: int) -> float:
    """Returns the threshold after `depth` blocks: of a tuple the depth's own, its last for all greater depths."""
    return threshold[min(depth, len(threshold)) - 1] if isinstance(threshold, tuple) else threshold


def threshold_text(threshold: Threshold) -> str:
    """Returns a threshold as people read it."""
    if not isinstance(threshold, tuple):
        return f"{threshold:.4g}"
    return f"{min(threshold):.4g} to {max(threshold):.4g} by block"


CRITERIA: dict[str, Criterion] = {c.name: c for c in (Similarity(), Confidence(), Doubt())}


class Taken(NamedTuple):
    """The way that a step took.

    Attributes:
        depth: backbone blocks executed before it left; all of them for a doubted step.
        scores: those that were asked for after blocks.
        entropy: of the logits that decided, None where none did.
        river_from: backbone blocks before the river's part of a doubted step, None for other steps.
    """

    depth: int
    scores: tuple[float, ...] = ()
    entropy: float | None = None
    river_from: int | None = None


class ExitBars(NamedTuple):
    """When the token of one step leaves.

    Attributes:
        bars: by depth, from 0 to L.
        last: the depth at which it leaves where no score let it leave before.
        stops: depths with a check.
        first: the first depth whose score counts.
        reads: as in :class:`Criterion`; None where the depth is known.
        judge: says in the place of the bars whether a token leaves, given depth and score; None: the bars decide.
        given: the entropy of the previous step's logits, a float32 scalar where these lie; None: none is known.
    """

    bars: tuple[float, ...]
    last: int
    stops: tuple[int, ...] = ()
    first: int = 0
    reads: str | None = None
    judge: Callable[[int, float], bool] | None = None
    given: Tensor | None = None

    @property
    def for_device(self) -> bool:
        """Whether a device can follow."""
        return self.judge is None and (self.reads != "previous" or self.first < self.last)

    def leaves(self, depth: int, score: float) -> bool:
        """Says whether a token with this score leaves; at L, whether its answer is believed."""
        return score > self.bars[depth] if self.judge is None else self.judge(depth, score)

    def taken(self, outcome: Sequence[float]) -> Taken:
        """Returns the way that a step took, given the scores at each depth, the answer's score, and the depth."""
        *scores, answer, end = outcome
        depth = int(end)
        if self.reads == "answer":
            return Taken(depth, (), -answer, self.last if depth == len(scores) else None)
        if self.reads == "previous":
            return Taken(depth, (), None if self.given is None else -scores[self.first])
        return Taken(depth, tuple(scores[d] for d in self.stops if self.first <= d <= depth))


@dataclass(frozen=True)
class ExitPolicy:
    """When the tokens of one graph leave.

    Attributes:
        criterion: decides, where no depth is fixed.
        threshold: of the criterion.
        first_exit: smallest exit depth.
        exit_every: distance between depths with a check.
        fixed_depth: blocks that every token executes, None where the criterion decides.
        deepest: depth at which every token leaves at the latest, None where it may go through all blocks.
    """

    criterion: Criterion
    threshold: Threshold
    first_exit: int
    exit_every: int
    fixed_depth: int | None
    deepest: int | None

    def may_leave(self, plan: DecoderPlan) -> bool:
        """Says whether tokens of a graph may leave before the last block."""
        return self.fixed_depth != plan.num_blocks

    def candidates(self, plan: DecoderPlan) -> tuple[int, ...]:
        """Returns the depths after which a check stands. Depth 0 has nothing to compare and is not one of them."""
        if self.fixed_depth is not None or self.criterion.reads != "block":
            return ()
        return tuple(range(max(self.first_exit, 1), self.last(plan.num_blocks), self.exit_every))

    @property
    def never_leaves(self) -> bool:
        """Whether no token leaves but by a forced depth."""
        return self.threshold == self.criterion.never and self.criterion.reads != "previous"

    def needs_entropy(self, plan: DecoderPlan) -> bool:
        """Says whether a graph's heads must return their logits' entropy; a prompt's only for the step after it."""
        return self.criterion.reads == "previous" or (self.criterion.reads == "answer" and plan.is_decode)

    def reachable(self, program: RiverProgram) -> list[Segment]:
        """Returns the segments that some token may run through: all of them, but where depths are fixed or bounded."""
        if self.fixed_depth is None and self.deepest is None:
            return list(program.segments)
        first, last = (0, self.deepest) if self.fixed_depth is None else (self.fixed_depth, self.fixed_depth)
        head = program.head if last == program.plan.num_blocks or program.river_head is None else program.river_head
        return [program.prologue, *program.blocks[:last], *program.twins[first:], head]

    def last(self, num_blocks: int) -> int:
        """Returns the depth at which a token leaves that no check sent away before, with so many blocks to run."""
        return num_blocks if self.deepest is None else min(num_blocks, self.deepest)

    def forks(self, plan: DecoderPlan) -> tuple[int, ...]:
        """Returns the depths at which a graph's tokens may part: 0, where a depth can be forced, and each check."""
        if self.fixed_depth is not None:
            return ()
        checks = self.candidates(plan) if self.criterion.reads == "block" else (self.first_exit,)
        return tuple(depth for depth in sorted({0, *checks}) if depth < self.last(plan.num_blocks))

    def why_host_decides(self, plan: DecoderPlan) -> str | None:
        """Returns why no device can follow, None where one can."""
        if bars_of(self, self.candidates(plan), plan.num_blocks).for_device:
            return None
        return f"criterion={self.criterion.name!r} with first_exit={self.first_exit} is more than one comparison"

    def at(self, depth: int) -> ExitPolicy:
        """Returns the policy by which every token leaves after `depth` blocks.

        Raises:
            ValueError: the program lacks the segments for that.
        """
        made = self._at.get(depth)
        if made is None:
            self._check_depth(depth)
            made = self._at[depth] = replace(self, fixed_depth=depth)
        return made

    @functools.cached_property
    def _at(self) -> dict[int, ExitPolicy]:
        return {}

    def in_this_thread(self) -> ExitPolicy:
        """Returns the policy with what this thread forces on it.

        Raises:
            ValueError: the program lacks the segments or the checks for that.
        """
        how = _forced.depth, _forced.rule
        if how == (None, None):
            return self
        if _forced.latest is None or _forced.latest[0] is not self or _forced.latest[1] != how:
            _forced.latest = self, how, self._forced_to(*how)
        return _forced.latest[2]

    def _forced_to(self, depth: int | None, rule: tuple[Threshold, int] | None) -> ExitPolicy:
        if depth is not None:
            return self.at(depth)
        assert rule is not None
        threshold, first_exit = rule
        if self.fixed_depth is not None:
            raise ValueError(
                f"threshold {threshold} was asked for, but this model was compiled with "
                f"exit_depth={self.fixed_depth} and checks no block; compile it without exit_depth"
            )
        return replace(self, threshold=threshold, first_exit=first_exit)

    def _check_depth(self, depth: int) -> None:
        asked = "the whole backbone" if depth == WHOLE else f"depth {depth}"
        if self.deepest is not None and depth > self.deepest:
            raise ValueError(
                f"{asked} was asked for, but this model was compiled with offload={self.deepest} and "
                "offload_policy='exit': no token goes further; compile it with offload_policy='fetch'"
            )
        if self.fixed_depth not in (None, depth):
            raise ValueError(
                f"{asked} was asked for, but this model was compiled with exit_depth={self.fixed_depth} "
                "and has no other segments; compile it without exit_depth"
            )


@functools.lru_cache(maxsize=256)
def bars_of(policy: ExitPolicy, candidates: tuple[int, ...], num_blocks: int) -> ExitBars:
    """Returns the bars of a policy for a graph with checks after `candidates`."""
    bars, last = [NEVER] * num_blocks + [ALWAYS], policy.last(num_blocks)
    if policy.fixed_depth is not None:
        last = min(policy.fixed_depth, num_blocks)
        bars[last] = ALWAYS
        return ExitBars(tuple(bars), last)
    criterion, first = policy.criterion, policy.first_exit
    stops: tuple[int, ...] = ()

    def judge(depth: int, score: float) -> bool:
        at = depth if criterion.reads == "block" else policy.first_exit
        return criterion.leaves(at, score, threshold_after(policy.threshold, at))

    bar = criterion.bar(threshold_after(policy.threshold, first))
    if criterion.reads == "block":
        stops = tuple(depth for depth in candidates if depth <= last)
        for depth in stops:
            bars[depth] = criterion.bar(threshold_after(policy.threshold, depth)) if depth >= first else NEVER
    elif criterion.reads == "previous":
        first = min(first, last)
        bars[first] = bar
    elif first < last and bar < 0:
        bars[first], bars[num_blocks], last = ALWAYS, bar, first
    else:  # (a river that is never believed need not run)
        return ExitBars(tuple(bars), last)
    is_own = type(criterion).leaves is not Criterion.leaves
    return ExitBars(tuple(bars), last, stops, first, criterion.reads, judge if is_own else None)


class _Forced(threading.local):
    """What a thread forces on its decode steps: a depth, or a threshold and a first exit.

    Attributes:
        latest: a policy, what was forced on it, and what it became: the same as in the step before, nearly always.
    """

    depth: int | None = None
    rule: tuple[Threshold, int] | None = None
    latest: tuple[ExitPolicy, object, ExitPolicy] | None = None


_forced = _Forced()


@contextlib.contextmanager
def forced_depth(depth: int | None) -> Iterator[None]:
    """Makes every decode step that this thread runs inside leave after `depth` blocks, whatever its exit policy.

    Args:
        depth: blocks to execute, from 0 (all twins) to the number of blocks or `WHOLE` (the plain model); None forces
            nothing.

    Raises (from the decode step):
        ValueError: the program was compiled for one other fixed depth and lacks the segments.
    """
    before, _forced.depth = _forced.depth, depth
    try:
        yield
    finally:
        _forced.depth = before


@contextlib.contextmanager
def forced_threshold(threshold: Threshold, first_exit: int = 1) -> Iterator[None]:
    """Makes every decode step that this thread runs inside use another threshold and first exit than were compiled.

    Checks stay where they were compiled. Inside :func:`forced_depth` the depth wins.

    Args:
        threshold: of the compiled criterion: a cosine or, for "confidence" and "doubt", an entropy in nats; a tuple has
            one for each depth from 1 on.
        first_exit: smallest exit depth, no less than the compiled one.

    Raises (from the decode step):
        ValueError: the program was compiled for a fixed depth and has no checks.
    """
    before, _forced.rule = _forced.rule, (threshold, first_exit)
    try:
        yield
    finally:
        _forced.rule = before


class Memories:
    """The memories of a model's sequences, each kept as long as the sequence's cache is."""

    def __init__(self) -> None:
        self._by_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def recall(self, cache: Tensor | None) -> Memory:
        """Returns the memory of the sequence that a cache tensor belongs to, a new one where there is none."""
        if cache is None:
            return Memory()
        with self._lock:
            return self._by_cache.get(cache) or Memory()

    def keep(self, cache: Tensor | None, memory: Memory) -> None:
        """Remembers for the step that will bring this cache tensor."""
        if cache is not None:
            with self._lock:
                self._by_cache[cache] = memory
