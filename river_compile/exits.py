"""Exit criteria: what tells a token that may leave the backbone from one that may not.

=============  ============================================  =========================  ===========================
criterion      looks at                                      when it is known           a token leaves when it is
=============  ============================================  =========================  ===========================
similarity     cosine of a block's input and output          after every candidate      above the threshold
history        the same, averaged over the last tokens       after every candidate      above the threshold
confidence     entropy of the previous step's logits         before the first block     below the threshold (nats)
doubt          entropy of the logits that the river gives    after the river's head     below the threshold (nats)
=============  ============================================  =========================  ===========================

A criterion is stateless; what it remembers of a sequence is a :class:`Memory`, found again by the tensor that holds the
sequence's KV cache (:class:`Memories`). A prompt begins a new memory.

Not handled: rows that decide for themselves. A batch leaves when its least sure row may. Beam search puts other tensors
in the cache's place at every step, which look like a new sequence: "confidence" then never leaves, and "history" sees
one token.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from river_compile.fills.base import Gaps

HISTORY = 4  # tokens over which "history" averages

Threshold = float | tuple[float, ...]  # a tuple has one for each depth, see threshold_after


@dataclass
class Memory:
    """What is remembered of one sequence.

    Attributes:
        entropy: of the last step's logits, in nats, a scalar tensor (it is read when it is needed); None before any.
        scores: the last similarities seen at each depth, newest last.
        gaps: which KV entries its cache lacks, for fills that leave some out.
    """

    entropy: Tensor | None = None
    scores: dict[int, deque[float]] = field(default_factory=dict)
    gaps: Gaps | None = None

    def after_prompt(self) -> Memory:
        """Returns what is remembered once only the prompt has run, as a memory of its own."""
        return Memory(self.entropy, gaps=self.gaps and self.gaps.after_prompt())

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


def mean_scores(scores: Sequence[float], window: int = HISTORY) -> list[float]:
    """Returns the mean of each score and up to ``window - 1`` before it: what "history" compares."""
    return [sum(part) / len(part) for part in (scores[max(0, i + 1 - window) : i + 1] for i in range(len(scores)))]
