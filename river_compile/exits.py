"""When a token leaves the backbone: the criteria, the policy of one graph, and what is remembered of a sequence.

=============  ============================================  =========================  ===========================
criterion      looks at                                      when it is known           a token leaves when it is
=============  ============================================  =========================  ===========================
similarity     cosine of a block's input and output          after every candidate      above the threshold
confidence     entropy of the previous step's logits         before the first block     below the threshold (nats)
doubt          entropy of the logits that the river gives    after the river's head     below the threshold (nats)
=============  ============================================  =========================  ===========================

A criterion is stateless; what is remembered of a sequence is a :class:`Memory`, found again by the tensor that holds
the sequence's KV cache. A prompt begins a new memory.

Not handled: rows that decide for themselves. A batch leaves when its least sure row may. Beam search puts other tensors
in the cache's place at every step, which look like a new sequence: "confidence" then never leaves.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.passes.program import DecoderPlan, RiverProgram, Segment

WHOLE = sys.maxsize  # a forced depth: every block, however many there are

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
    """When a token leaves: asked before the first block, after each candidate block, and after the river's head.

    Attributes:
        name: how the option ``criterion=`` calls it.
        threshold: the default.
        never, always: thresholds at which no token leaves, and every one that has a score.
        scores_blocks: candidate blocks return their similarity.
        reads_logits: heads return the entropy of their logits.
        remembers: it uses the memory of the sequence.
        may_doubt: tokens may run through both paths.
    """

    name: ClassVar[str]
    threshold: ClassVar[float]
    never: ClassVar[float]
    always: ClassVar[float]
    scores_blocks: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    may_doubt: ClassVar[bool] = False

    def depth_before(self, threshold: float, first_exit: int, num_blocks: int, entropy: float | None) -> int | None:
        """Returns the depth where it is known before the first block, None if the blocks' scores decide.

        `entropy` is that of the previous step's logits, None where it is not known.
        """
        return None

    def leaves(self, depth: int, score: float, threshold: float) -> bool:
        """Says whether a token leaves after `depth` blocks with this similarity; False for NaN."""
        raise NotImplementedError(f"criterion {self.name!r} asks no block")

    def doubts(self, entropy: float, threshold: float) -> bool:
        """Says whether the backbone must run a token again for which the river gave logits of this entropy."""
        return False


class Similarity(Criterion):
    """The paper's: leave once a block hardly turns the hidden state."""

    name, threshold, never, always = "similarity", 0.7, 2.0, -2.0
    scores_blocks = True

    def leaves(self, depth: int, score: float, threshold: float) -> bool:
        return score > threshold


class Confidence(Criterion):
    """Leave at the first exit when the model was sure of the token that it is now given."""

    name, threshold, never, always = "confidence", 0.5, 0.0, float("inf")
    reads_logits = remembers = True

    def depth_before(self, threshold: float, first_exit: int, num_blocks: int, entropy: float | None) -> int:
        return first_exit if entropy is not None and entropy < threshold else num_blocks


class Doubt(Criterion):
    """Leave at the first exit; where the river is not sure of its answer, the backbone answers instead."""

    name, threshold, never, always = "doubt", 1.0, 0.0, float("inf")
    reads_logits = may_doubt = True

    def depth_before(self, threshold: float, first_exit: int, num_blocks: int, entropy: float | None) -> int:
        return first_exit if threshold > 0 else num_blocks  # a river that is never believed need not run

    def doubts(self, entropy: float, threshold: float) -> bool:
        return not entropy < threshold  # true for NaN


def threshold_after(threshold: Threshold, depth: int) -> float:
    """Returns the threshold after `depth` blocks: of a tuple the depth's own, its last for all greater depths."""
    return threshold[min(depth, len(threshold)) - 1] if isinstance(threshold, tuple) else threshold


def threshold_text(threshold: Threshold) -> str:
    """Returns a threshold as people read it."""
    if not isinstance(threshold, tuple):
        return f"{threshold:.4g}"
    return f"{min(threshold):.4g} to {max(threshold):.4g} by block"


CRITERIA: dict[str, Criterion] = {c.name: c for c in (Similarity(), Confidence(), Doubt())}


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
        if self.fixed_depth is not None or not self.criterion.scores_blocks:
            return ()
        return tuple(range(max(self.first_exit, 1), self.last(plan.num_blocks), self.exit_every))

    @property
    def never_leaves(self) -> bool:
        """Whether no token leaves but by a forced depth."""
        return self.threshold == self.criterion.never and not self.criterion.remembers

    def needs_entropy(self, plan: DecoderPlan) -> bool:
        """Says whether a graph's heads must return their logits' entropy; a prompt's only for the step after it."""
        return self.criterion.reads_logits and (plan.is_decode or self.criterion.remembers)

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

    def depth_before(self, memory: Memory, num_blocks: int) -> tuple[int | None, float | None]:
        """Returns the depth where it is known before the first block, and the entropy that decided it.

        Where the criterion remembers an entropy that lies on an accelerator, this waits for the step before.
        """
        if self.fixed_depth is not None:
            return self.fixed_depth, None
        entropy = None if memory.entropy is None else memory.entropy.item()
        threshold = threshold_after(self.threshold, self.first_exit)
        return self.criterion.depth_before(threshold, self.first_exit, self.last(num_blocks), entropy), entropy

    def leaves(self, depth: int, score: float) -> bool:
        """Says whether a token leaves after `depth` blocks with this similarity."""
        return self.criterion.leaves(depth, score, threshold_after(self.threshold, depth))

    @property
    def may_doubt(self) -> bool:
        """Whether a token that left may have to run through the backbone as well."""
        return self.fixed_depth is None and self.criterion.may_doubt

    def doubts(self, entropy: float) -> bool:
        """Says whether the backbone must run a token again for which the river gave logits of this entropy."""
        return self.criterion.doubts(entropy, threshold_after(self.threshold, self.first_exit))

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
