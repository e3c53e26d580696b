"""When a token leaves the backbone: criteria, the policy of one graph, and what is remembered of a sequence.

A token leaves where its *score* is above a bar. A criterion says which score is read, and turns its threshold into a
bar:

===========  ===========================================  =======================  ==========
criterion    score                                        read                     bar
===========  ===========================================  =======================  ==========
similarity   cosine of a block's input and output         after every candidate    threshold
confidence   minus the entropy of the previous logits     before the first block   -threshold
===========  ===========================================  =======================  ==========

NaN is above no bar, and nothing is above a bar of NaN.

"confidence" remembers the entropy of a sequence, found again by the tensor that holds the sequence's KV cache.

Not handled: rows that decide for themselves. A batch leaves when its least sure row may. Beam search puts other tensors
in the cache's place at every step, which look like a new sequence: "confidence" then never leaves.
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

from river_compile.passes.program import Program, SegmentSpec

WHOLE = sys.maxsize  # a forced depth, or a first exit: all blocks, however many there are

Threshold = float | tuple[float, ...]  # a tuple has one for each depth, see threshold_after


@dataclass(frozen=True)
class Criterion:
    """Which score is read, and what it must be above for a token to leave.

    Attributes:
        name: how the option ``criterion=`` calls it.
        threshold: the default.
        never, always: thresholds at which no token leaves, and every one that has a score.
        reads: the score: of a "block", or of the "previous" step's logits.
    """

    name: str
    threshold: float
    never: float
    always: float
    reads: Literal["block", "previous"]

    def bar(self, threshold: float) -> float:
        """Returns what a score must be above."""
        return threshold if self.reads == "block" else -threshold


# "similarity" is the paper's: leave once a block hardly turns the hidden state. "confidence" leaves at the first exit
# when the model was sure of the token that it is now given.
CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("similarity", threshold=0.7, never=2.0, always=-2.0, reads="block"),
        Criterion("confidence", threshold=0.5, never=0.0, always=math.inf, reads="previous"),
    )
}


def threshold_after(threshold: Threshold, depth: int) -> float:
    """Returns the threshold after `depth` blocks: of a tuple the depth's own, its last for all greater depths."""
    return threshold[min(depth, len(threshold)) - 1] if isinstance(threshold, tuple) else threshold


def threshold_text(threshold: Threshold) -> str:
    """Returns a threshold as people read it."""
    if not isinstance(threshold, tuple):
        return f"{threshold:.4g}"
    return f"{min(threshold):.4g} to {max(threshold):.4g} by block"


class ExitBars(NamedTuple):
    """When the token of one step leaves.

    Attributes:
        last: the depth at which it leaves where no score let it leave before.
        stops: depths with a check, each with the bar of its score, None where the score is not read.
        early: a depth, and the bar above which the score of the previous logits sends the token there; None: no score
            of those is read.
    """

    last: int
    stops: tuple[tuple[int, float | None], ...] = ()
    early: tuple[int, float] | None = None


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

    def may_leave(self, num_blocks: int) -> bool:
        """Says whether tokens may leave before the last of so many blocks."""
        return self.fixed_depth != num_blocks

    def candidates(self, num_blocks: int) -> tuple[int, ...]:
        """Returns the depths after which a check stands. Depth 0 has nothing to compare and is not one of them."""
        if self.fixed_depth is not None or self.criterion.reads != "block":
            return ()
        return tuple(range(max(self.first_exit, 1), self.last(num_blocks), self.exit_every))

    def reachable(self, program: Program) -> list[SegmentSpec]:
        """Returns the segments that some token may run through: all of them, but where depths are fixed or bounded."""
        if self.fixed_depth is None and self.deepest is None:
            return list(program.segments)
        first, last = (0, self.deepest) if self.fixed_depth is None else (self.fixed_depth, self.fixed_depth)
        head = program.head if last == program.num_blocks or program.river_head is None else program.river_head
        return [program.prologue, *program.blocks[:last], *program.twins[first:], head]

    def last(self, num_blocks: int) -> int:
        """Returns the depth at which a token leaves that no check sent away before, with so many blocks to run."""
        return num_blocks if self.deepest is None else min(num_blocks, self.deepest)

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
        if _forced.depth is not None:
            return self.at(_forced.depth)
        if _forced.rule is None:
            return self
        threshold, first_exit = _forced.rule
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
    if policy.fixed_depth is not None:
        return ExitBars(min(policy.fixed_depth, num_blocks))
    last, first = policy.last(num_blocks), policy.first_exit

    def bar(depth: int) -> float:
        return policy.criterion.bar(threshold_after(policy.threshold, depth))

    if policy.criterion.reads == "previous":
        return ExitBars(last, early=(min(first, last), bar(first)))
    # (A check before the first exit ends a span too, so that captured spans are the same for all first exits.)
    return ExitBars(last, tuple((d, bar(d) if d >= first else None) for d in candidates))


class _Forced(threading.local):
    """What a thread forces on its decode steps: a depth, or a threshold and a first exit."""

    depth: int | None = None
    rule: tuple[Threshold, int] | None = None


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
        threshold: of the compiled criterion: a cosine or, for "confidence", an entropy in nats; a tuple has one for
            each depth from 1 on.
        first_exit: smallest exit depth, no less than the compiled one.

    Raises (from the decode step):
        ValueError: the program was compiled for a fixed depth and has no checks.
    """
    before, _forced.rule = _forced.rule, (threshold, first_exit)
    try:
        yield
    finally:
        _forced.rule = before


@dataclass
class Memory:
    """What is known of a KV cache.

    Attributes:
        entropy: of its latest logits, in nats, a scalar; None where none is known.
        filled: tokens in it once all steps launched so far have run; None where that is not known.
        version: how often PyTorch had seen the tensor change that counts them on the device.
        left: how often it had seen the keys change when a decode step left them; None after a prompt.
    """

    entropy: Tensor | None = None
    filled: int | None = None
    version: int = 0
    left: int | None = None


class Memories:
    """The memories of a model's KV caches, each kept as long as a tensor of the cache is."""

    def __init__(self) -> None:
        self._by_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def of(self, cache: Tensor) -> Memory:
        """Returns the memory of the cache that a tensor belongs to, a new one where there is none yet."""
        with self._lock:
            memory: Memory = self._by_cache.setdefault(cache, Memory())
            return memory

    def keep(self, cache: Tensor, memory: Memory) -> None:
        """Makes a memory that of the pass which will bring this tensor, another one each time where a cache grows."""
        with self._lock:
            self._by_cache[cache] = memory
