"""Early exit: criteria, the exit policy of a graph, and the state of a sequence between steps.

A token exits if its *score* is above a threshold. "similarity": the cosine of a block's input and output, read after
each candidate block. "confidence": minus the entropy of the previous logits, read before the first block. NaN is above
no threshold. Not handled: rows that exit alone (the batch waits for its least sure row); beam search with "confidence".
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.errors import OptionError
from river_compile.passes.program import Program, SegmentSpec

WHOLE = sys.maxsize  # as a depth: all blocks of any model

Threshold = float | tuple[float, ...]  # a tuple has one per depth, see threshold_after


@dataclass(frozen=True)
class Criterion:
    """Which score decides whether a token exits."""

    name: str
    threshold: float  # default
    never: float  # threshold at which no token exits
    always: float  # threshold at which each token with a score exits
    reads: Literal["block", "previous"]  # the score: of a block, or of the previous step's logits

    def score_threshold(self, threshold: float) -> float:
        """Return the value that a score must exceed, for a threshold as users give it."""
        return threshold if self.reads == "block" else -threshold


# "similarity" is the paper's: exit when a block hardly turns the hidden state. "confidence": exit at the first exit if
# the model was sure of its previous prediction.
CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("similarity", threshold=0.7, never=2.0, always=-2.0, reads="block"),
        Criterion("confidence", threshold=0.5, never=0.0, always=math.inf, reads="previous"),
    )
}


def threshold_after(threshold: Threshold, depth: int) -> float:
    """Return the threshold after `depth` blocks; a tuple's last value holds for all greater depths."""
    return threshold[min(depth, len(threshold)) - 1] if isinstance(threshold, tuple) else threshold


def threshold_text(threshold: Threshold) -> str:
    """Format a threshold for users."""
    if not isinstance(threshold, tuple):
        return f"{threshold:.4g}"
    return f"{min(threshold):.4g} to {max(threshold):.4g} by layer"


class ExitThresholds(NamedTuple):
    """The exit checks of one step."""

    last: int  # depth at which a token exits if no check let it exit earlier
    stops: tuple[tuple[int, float | None], ...] = ()  # depth of each check, threshold of its score (None: not read)
    early: tuple[int, float] | None = None  # depth and threshold of the check before the first block


@dataclass(frozen=True)
class ExitPolicy:
    """When the tokens of one graph exit."""

    criterion: Criterion
    threshold: Threshold
    first_exit: int  # smallest exit depth
    exit_every: int  # distance between depths with a check
    fixed_depth: int | None  # blocks that every token executes, `WHOLE` for all; None: the criterion decides
    deepest: int | None  # largest exit depth; None: all blocks

    def may_leave(self, num_blocks: int) -> bool:
        """Whether tokens may exit before the last block."""
        return self.fixed_depth is None or self.fixed_depth < num_blocks

    def candidates(self, num_blocks: int) -> tuple[int, ...]:
        """Return the depths with a check; never 0, where there is nothing to compare."""
        if self.fixed_depth is not None or self.criterion.reads != "block":
            return ()
        return tuple(range(max(self.first_exit, 1), self.last(num_blocks), self.exit_every))

    def reachable(self, program: Program) -> list[SegmentSpec]:
        """Return the segments that a token may run through: all of them, unless depths are fixed or bounded."""
        if self.fixed_depth is None and self.deepest is None:
            return list(program.segments)
        first, last = 0, self.deepest
        if self.fixed_depth is not None:
            first = last = min(self.fixed_depth, program.num_blocks)
        head = program.head if last == program.num_blocks or program.twin_head is None else program.twin_head
        return [program.prologue, *program.blocks[:last], *program.twins[first:], head]

    def last(self, num_blocks: int) -> int:
        """Return the depth at which a token exits that passed no check."""
        return num_blocks if self.deepest is None else min(num_blocks, self.deepest)

    def at(self, depth: int) -> ExitPolicy:
        """Return the policy with a fixed depth; raise an OptionError if the program lacks the segments for it."""
        made = self._at.get(depth)
        if made is None:
            self._check_depth(depth)
            made = self._at[depth] = replace(self, fixed_depth=depth)
        return made

    @functools.cached_property
    def _at(self) -> dict[int, ExitPolicy]:
        return {}

    def in_this_thread(self) -> ExitPolicy:
        """Apply `forced_depth` and `forced_threshold` of this thread; raise an OptionError if they cannot hold."""
        if _forced.depth is not None:
            return self.at(_forced.depth)
        if _forced.rule is None:
            return self
        threshold, first_exit = _forced.rule
        if self.fixed_depth is not None:
            raise OptionError(
                f"Threshold {threshold} is not available: this model was compiled with exit_depth={self.fixed_depth} "
                "and has no exit checks. Compile it without exit_depth",
                id="RC025",
            )
        return replace(self, threshold=threshold, first_exit=first_exit)

    def _check_depth(self, depth: int) -> None:
        asked = "Full depth" if depth == WHOLE else f"Depth {depth}"
        if self.deepest is not None and depth > self.deepest:
            raise OptionError(
                f"{asked} is not available: this model was compiled with offload_policy='exit', so no token goes "
                f"further than layer {self.deepest}. Compile it with offload_policy='fetch'",
                id="RC025",
            )
        if self.fixed_depth not in (None, depth):
            raise OptionError(
                f"{asked} is not available: this model was compiled with exit_depth={self.fixed_depth} and has no "
                "other segments. Compile it without exit_depth",
                id="RC025",
            )


@functools.lru_cache(maxsize=256)
def thresholds_of(policy: ExitPolicy, candidates: tuple[int, ...], num_blocks: int) -> ExitThresholds:
    """Return the thresholds of a policy for a graph with checks after `candidates`."""
    if policy.fixed_depth is not None:
        return ExitThresholds(min(policy.fixed_depth, num_blocks))
    last, first = policy.last(num_blocks), policy.first_exit

    def threshold(depth: int) -> float:
        return policy.criterion.score_threshold(threshold_after(policy.threshold, depth))

    if policy.criterion.reads == "previous":
        return ExitThresholds(last, early=(min(first, last), threshold(first)))
    # A check before the first exit ends a span too, so captured spans are the same for all first exits.
    return ExitThresholds(last, tuple((d, threshold(d) if d >= first else None) for d in candidates))


class _Forced(threading.local):
    """A thread's settings for its decode steps."""

    depth: int | None = None
    rule: tuple[Threshold, int] | None = None  # threshold and first exit


_forced = _Forced()


@contextlib.contextmanager
def forced_depth(depth: int | None) -> Iterator[None]:
    """Make every decode step of this thread exit after `depth` blocks, whatever its exit policy.

    Args:
        depth: blocks to execute, from 0 (all twins) to the number of blocks or `WHOLE` (full depth); None changes
            nothing.

    Raises (from the decode step):
        OptionError: (a ``ValueError``) the program was compiled for one other fixed depth and lacks the segments.
    """
    before = _forced.depth
    _forced.depth = before if depth is None else depth
    try:
        yield
    finally:
        _forced.depth = before


@contextlib.contextmanager
def forced_threshold(threshold: Threshold, first_exit: int = 1) -> Iterator[None]:
    """Make every decode step of this thread use another threshold and first exit than those it was compiled with.

    Checks stay at their depths. Inside :func:`forced_depth` the depth wins.

    Args:
        threshold: of the compiled criterion: a cosine or, for "confidence", an entropy in nats; a tuple has one for
            each depth from 1 on.
        first_exit: smallest exit depth, no less than the compiled one.

    Raises (from the decode step):
        OptionError: (a ``ValueError``) the program was compiled for a fixed depth and has no checks.
    """
    before, _forced.rule = _forced.rule, (threshold, first_exit)
    try:
        yield
    finally:
        _forced.rule = before


@dataclass
class SequenceState:
    """The state of a KV cache's sequence between steps."""

    entropy: Tensor | None = None  # of the latest logits, nats, a scalar; None: unknown
    filled: int | None = None  # tokens in the cache after all launched steps; None: unknown
    version: int = 0  # PyTorch's version of the tensor that counts them on the device
    left: int | None = None  # version of the keys after the last decode step; None after a prompt


class SequenceStates:
    """The states of a model's sequences, found by a tensor of the KV cache and kept as long as it lives."""

    def __init__(self) -> None:
        self._by_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def get(self, cache: Tensor) -> SequenceState:
        """Return the state of the cache that a tensor belongs to, a new one if there is none."""
        with self._lock:
            state: SequenceState = self._by_cache.setdefault(cache, SequenceState())
            return state

    def put(self, cache: Tensor, state: SequenceState) -> None:
        """Set the state of a cache by another of its tensors: a cache that grows has a new one at each step."""
        with self._lock:
            self._by_cache[cache] = state
