"""When a token leaves the backbone: the criteria, the rule of one graph, and what is remembered of a sequence.

=============  ============================================  =========================  ===========================
criterion      looks at                                      when it is known           a token leaves when it is
=============  ============================================  =========================  ===========================
similarity     cosine of a block's input and output          after every candidate      above the threshold
history        the same, averaged over the last tokens       after every candidate      above the threshold
confidence     entropy of the previous step's logits         before the first block     below the threshold (nats)
doubt          entropy of the logits that the river gives    after the river's head     below the threshold (nats)
=============  ============================================  =========================  ===========================

A criterion is stateless. An :class:`ExitPolicy` is a criterion with the settings of one graph; :func:`forced_depth` and
:func:`forced_threshold` replace them for a while. What is remembered of a sequence is a :class:`Memory`, found again by
the tensor that holds the sequence's KV cache (:class:`Memories`). A prompt begins a new memory.

Not handled: rows that decide for themselves. A batch leaves when its least sure row may. Beam search puts other tensors
in the cache's place at every step, which look like a new sequence: "confidence" then never leaves, and "history" sees
one token.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.passes.exit_checks import logits_of
from river_compile.passes.program import DecoderPlan, RiverProgram, Segment

from .errors import OptionError

HISTORY = 4  # tokens over which "history" averages

Threshold = float | tuple[float, ...]  # a tuple has one for each depth, see threshold_after


class Entry(Protocol):
    """What a fill remembers of one sequence."""

    def after_prompt(self) -> Entry:
        """Returns what it was when only the prompt had run, as an entry of its own."""


@dataclass
class Memory:
    """What is remembered of one sequence.

    Attributes:
        entropy: of the last step's logits, in nats, a scalar tensor (it is read when it is needed); None before any.
        scores: the last similarities seen at each depth, newest last.
        entries: what fills remember, each under its own class.
    """

    entropy: Tensor | None = None
    scores: dict[int, deque[float]] = field(default_factory=dict)
    entries: dict[type, Any] = field(default_factory=dict)

    def put(self, entry: Entry) -> None:
        """Remembers a fill's entry, in the place of an earlier one of its class."""
        self.entries[type(entry)] = entry

    def after_prompt(self) -> Memory:
        """Returns what is remembered once only the prompt has run, as a memory of its own."""
        return Memory(self.entropy, entries={key: entry.after_prompt() for key, entry in self.entries.items()})

    def read_entropy(self) -> float | None:
        """Returns the entropy as a number (from an accelerator it waits for the last step)."""
        return None if self.entropy is None else self.entropy.item()


class Criterion:
    """When a token leaves: asked before the first block, after each candidate block, and after the river's head.

    Attributes:
        name: how the option ``criterion=`` calls it.
        threshold: the default.
        never, always: thresholds at which no token leaves, and every one that has a score.
        scores_blocks: candidate blocks return their similarity.
        reads_logits: heads return the entropy of their logits.
        remembers: it uses the memory of the sequence.
    """

    name: ClassVar[str]
    threshold: ClassVar[float]
    never: ClassVar[float]
    always: ClassVar[float]
    scores_blocks: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    remembers: ClassVar[bool] = False

    def depth_before(self, threshold: float, first_exit: int, num_blocks: int, entropy: float | None) -> int | None:
        """Returns the depth where it is known before the first block, None where the blocks' scores decide.

        `entropy` is that of the previous step's logits, None where it is not known.
        """
        return None

    def leaves(self, depth: int, score: float, threshold: Threshold, memory: Memory) -> bool:
        """Tells whether a token leaves after `depth` blocks with this similarity; False for NaN."""
        raise NotImplementedError(f"criterion {self.name!r} asks no block")

    def doubts(self, entropy: float, threshold: float) -> bool:
        """Tells whether the backbone must run a token again that the river gave logits of this entropy for."""
        return False

    @property
    def may_doubt(self) -> bool:
        """Whether tokens may run through both paths."""
        return type(self).doubts is not Criterion.doubts


class Similarity(Criterion):
    """The paper's: leave once a block hardly turns the hidden state."""

    name, threshold, never, always = "similarity", 0.7, 2.0, -2.0
    scores_blocks = True

    def leaves(self, depth: int, score: float, threshold: Threshold, memory: Memory) -> bool:
        return score > threshold_after(threshold, depth)


class History(Similarity):
    """The mean of a depth's last few similarities, the token's own included: one token cannot decide alone."""

    name = "history"
    remembers = True

    def leaves(self, depth: int, score: float, threshold: Threshold, memory: Memory) -> bool:
        if score != score:  # NaN: it would stay in the mean for several tokens
            return False
        scores = memory.scores.setdefault(depth, deque(maxlen=HISTORY))
        scores.append(score)
        return sum(scores) / len(scores) > threshold_after(threshold, depth)


class Confidence(Criterion):
    """Leave at the first exit when the model was sure of the token that it is now given."""

    name, threshold, never, always = "confidence", 0.5, 0.0, float("inf")
    reads_logits = remembers = True

    def depth_before(self, threshold: float, first_exit: int, num_blocks: int, entropy: float | None) -> int | None:
        return first_exit if entropy is not None and entropy < threshold else num_blocks


class Doubt(Criterion):
    """Leave at the first exit; where the river is not sure of its answer, the backbone answers instead."""

    name, threshold, never, always = "doubt", 1.0, 0.0, float("inf")
    reads_logits = True

    def depth_before(self, threshold: float, first_exit: int, num_blocks: int, entropy: float | None) -> int | None:
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


CRITERIA: dict[str, Criterion] = {c.name: c for c in (Similarity(), History(), Confidence(), Doubt())}


class ExitOptions(Protocol):
    """The options that decide when a token leaves: fields of `RiverConfig`."""

    @property
    def criterion(self) -> str: ...
    @property
    def threshold(self) -> Threshold | None: ...
    @property
    def first_exit(self) -> int: ...
    @property
    def exit_every(self) -> int: ...
    @property
    def exit_depth(self) -> int | None: ...
    @property
    def deepest(self) -> int | None: ...
    @property
    def prefill(self) -> str: ...


def may_leave(options: ExitOptions, plan: DecoderPlan) -> bool:
    """Tells whether tokens of a graph may leave before the last block."""
    return (plan.is_decode or options.prefill == "exit") and options.exit_depth != plan.num_blocks


def candidate_depths(options: ExitOptions, plan: DecoderPlan) -> tuple[int, ...]:
    """Returns the depths after which a check stands: first_exit, then every exit_every blocks, below the deepest.

    Depth 0 (before any block) has nothing to compare and is not a candidate.
    """
    if not may_leave(options, plan) or options.exit_depth is not None or not CRITERIA[options.criterion].scores_blocks:
        return ()
    end = plan.num_blocks if options.deepest is None else options.deepest
    return tuple(range(max(options.first_exit, 1), end, options.exit_every))


def needs_entropy(options: ExitOptions, plan: DecoderPlan) -> bool:
    """Tells whether a graph's heads must return their logits' entropy; a prompt's only for the step after it."""
    criterion = CRITERIA[options.criterion]
    return options.exit_depth is None and criterion.reads_logits and (plan.is_decode or criterion.remembers)


@dataclass(frozen=True)
class ExitPolicy:
    """When the tokens of one graph leave.

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

    def reachable(self, program: RiverProgram) -> list[Segment]:
        """Returns the segments that some token may run through: all of them, but where depths are fixed or bounded."""
        if self.threshold is not None and self.deepest is None:
            return list(program.segments)
        first, last = (0, self.deepest) if self.threshold is not None else (self.fixed_depth, self.fixed_depth)
        head = program.head if last == program.plan.num_blocks or program.river_head is None else program.river_head
        return [program.prologue, *program.blocks[:last], *program.twins[first:], head]

    def last(self, num_blocks: int) -> int:
        """Returns the depth at which a token leaves that no check sent away before, with so many blocks to run."""
        return num_blocks if self.deepest is None else min(num_blocks, self.deepest)

    def depth_before(self, memory: Memory, num_blocks: int) -> tuple[int | None, float | None]:
        """Returns the depth where it is known before the first block, and the entropy that decided it."""
        if self.threshold is None:
            return self.fixed_depth, None
        entropy = memory.read_entropy()
        return self.criterion.depth_before(self.threshold, self.first_exit, self.last(num_blocks), entropy), entropy

    def leaves(self, depth: int, score: float, memory: Memory) -> bool:
        """Tells whether a token leaves after `depth` blocks with this similarity."""
        return self.criterion.leaves(depth, score, self.threshold, memory)

    @property
    def may_doubt(self) -> bool:
        """Whether a token that left may have to run through the backbone as well."""
        return self.threshold is not None and self.criterion.may_doubt

    def doubts(self, entropy: float) -> bool:
        """Tells whether the backbone must run a token again that the river gave logits of this entropy for."""
        return self.criterion.doubts(entropy, self.threshold)

    def in_this_thread(self) -> ExitPolicy:
        """Returns the policy with what this thread forces on it.

        Raises:
            ValueError: the program lacks the segments or the checks for that.
        """
        if _forced.depth is not None:
            return replace(self, threshold=None, fixed_depth=self._check_depth(_forced.depth))
        if _forced.rule is not None:
            threshold, first_exit = _forced.rule
            return replace(self, threshold=self._check_threshold(threshold), first_exit=first_exit)
        return self

    def _check_threshold(self, threshold: Threshold) -> Threshold:
        if self.threshold is None:
            raise ValueError(
                f"threshold {threshold} was asked for, but this model was compiled with "
                f"exit_depth={self.fixed_depth} and checks no block; compile it without exit_depth"
            )
        return threshold

    def _check_depth(self, depth: int) -> int:
        if self.deepest is not None and depth > self.deepest:
            raise ValueError(
                f"depth {depth} was asked for, but this model was compiled with offload={self.deepest} and "
                "offload_policy='exit': no token goes further; compile it with offload_policy='fetch'"
            )
        if self.threshold is None and depth != self.fixed_depth:
            raise ValueError(
                f"depth {depth} was asked for, but this model was compiled with exit_depth={self.fixed_depth} "
                "and has no other segments; compile it without exit_depth"
            )
        return depth


def policy_for(options: ExitOptions, program: RiverProgram) -> ExitPolicy:
    """Returns the policy of a graph, of which no pass needs to have run.

    Raises:
        OptionError: the criterion reads logits and the model returns none.
    """
    plan, leaves = program.plan, may_leave(options, program.plan)
    deepest = options.deepest if leaves else None
    if options.exit_depth is not None:  # no criterion plays a part, so none needs to remember anything
        return ExitPolicy(None, options.exit_depth if leaves else plan.num_blocks, deepest=deepest)
    if needs_entropy(options, plan) and logits_of(program) is None:
        raise OptionError(
            f"criterion={options.criterion!r} reads the logits, and this model returns none (its output is as wide as "
            "its hidden state); compile the model with its head, or use criterion='similarity'"
        )
    threshold = options.threshold if leaves else None
    return ExitPolicy(threshold, plan.num_blocks, CRITERIA[options.criterion], options.first_exit, deepest)


class _Forced(threading.local):
    """What a thread forces on its decode steps: a depth, or a threshold and a first exit."""

    depth: int | None = None
    rule: tuple[Threshold, int] | None = None


_forced = _Forced()


@contextlib.contextmanager
def forced_depth(depth: int | None) -> Iterator[None]:
    """Makes every decode step that this thread runs inside leave after `depth` blocks, whatever its exit policy.

    Args:
        depth: blocks to execute, from 0 (all twins) to the number of blocks (the plain model); None forces nothing.

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

    Checks stand where the program was compiled with them: `first_exit` can only be later than the compiled one. Inside
    :func:`forced_depth` the depth wins.

    Args:
        threshold: of the compiled criterion: a cosine or, for "confidence" and "doubt", an entropy in nats; a tuple has
            one for each depth from 1 on.
        first_exit: smallest exit depth.

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
