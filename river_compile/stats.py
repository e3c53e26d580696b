"""Counts where tokens leave, and records every step on request.

``with trace() as t:`` records all steps that run anywhere in the process while it is open, each with the thread it ran
in, so that generation in a worker thread (as streamers use it) is seen too.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


class ExitStats:
    """Steps per exit depth of one model; prefill and decode apart."""

    def __init__(self, model_id: int) -> None:
        self.model_id = model_id
        self.num_blocks = 0
        self._lock = threading.Lock()
        self._decode: Counter[int] = Counter()
        self._prefill: Counter[int] = Counter()

    def count(self, depth: int, decode: bool) -> None:
        with self._lock:
            (self._decode if decode else self._prefill)[depth] += 1

    def depths(self, decode: bool = True) -> dict[int, int]:
        """Returns {exit depth in backbone blocks executed: steps}, ascending."""
        with self._lock:
            return dict(sorted((self._decode if decode else self._prefill).items()))

    def reset(self) -> None:
        with self._lock:
            self._decode.clear()
            self._prefill.clear()


@dataclass(frozen=True)
class StepRecord:
    """One forward pass.

    Attributes:
        depth: backbone blocks executed before the rows left.
        similarities: the exit score after each candidate block that ran.
        decode: False for a prompt.
        thread: identifier of the thread it ran in.
        model: which model ran, an identifier unique in the process.
    """

    depth: int
    similarities: tuple[float, ...]
    decode: bool
    thread: int
    model: int


@dataclass(frozen=True)
class CycleRecord:
    """One cycle of exact mode: a draft, its verification, and what was kept of it.

    Attributes:
        drafted: where each drafted token came from: "river" or "lookup" (copied from the context).
        kept: where each kept token came from: as above, or "backbone" for its own token behind the agreeing drafts.
        width: query length of the verifying pass; ``width - 1 - len(drafted)`` of it was filler.
        held_back: rows whose next draft held but was dropped, because another row's did not.
        seconds: wall time of drafting, of verifying, and of choosing and keeping tokens.
        thread: identifier of the thread it ran in.
        model: which model ran, an identifier unique in the process.
    """

    drafted: tuple[str, ...]
    kept: tuple[str, ...]
    width: int
    held_back: int
    seconds: tuple[float, float, float]
    thread: int
    model: int

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept."""
        return sum(source != "backbone" for source in self.kept)


@dataclass
class Trace:
    """Steps recorded while a ``trace()`` was open, in order.

    Attributes:
        steps: every forward pass, prompts included.
        cycles: every cycle of exact mode; its drafts and verifications are among the steps too.
    """

    steps: list[StepRecord] = field(default_factory=list)
    num_blocks: int = 0
    cycles: list[CycleRecord] = field(default_factory=list)

    @property
    def tokens(self) -> list[StepRecord]:
        """The decode steps: one per token after a prompt's first."""
        return [step for step in self.steps if step.decode]

    @property
    def mean_depth(self) -> float:
        """Mean exit depth of the decode steps, NaN where there are none."""
        tokens = self.tokens
        return sum(t.depth for t in tokens) / len(tokens) if tokens else float("nan")

    @property
    def kept_sources(self) -> dict[str, int]:
        """Tokens that exact mode kept, by where they came from (a prompt's first token is in no cycle)."""
        return dict(Counter(source for cycle in self.cycles for source in cycle.kept))

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the first, second ... drafted tokens that exact mode kept."""
        longest = max((len(cycle.drafted) for cycle in self.cycles), default=0)
        reached = [[c.accepted > i for c in self.cycles if len(c.drafted) > i] for i in range(longest)]
        return [sum(kept) / len(kept) for kept in reached]

    def plot(self, path: str | Path, texts: list[str] | None = None) -> Path:
        """Draws every token's exit depth above its text as a PNG; returns the path.

        Args:
            path: the file to write.
            texts: the decoded text of each token of :attr:`tokens`; numbers stand in where it is None.

        Raises:
            ValueError: nothing was recorded, or `texts` has another length than :attr:`tokens`.
        """
        from .plot import plot_depths

        return plot_depths(self, path, texts)


_open: tuple[Trace, ...] = ()
_open_lock = threading.Lock()


class trace:
    """Context manager that records every step; see the module's text."""

    def __enter__(self) -> Trace:
        global _open
        self._trace = Trace()
        with _open_lock:
            _open = (*_open, self._trace)
        return self._trace

    def __exit__(self, *_: object) -> None:
        global _open
        with _open_lock:
            _open = tuple(t for t in _open if t is not self._trace)


def record_step(stats: ExitStats, depth: int, scores: list[float], decode: bool) -> None:
    """Adds a step to every open trace."""
    if not _open:
        return
    step = StepRecord(depth, tuple(scores), decode, threading.get_ident(), stats.model_id)
    for t in _open:
        t.num_blocks = max(t.num_blocks, stats.num_blocks)
        t.steps.append(step)


def record_cycle(cycle: CycleRecord) -> None:
    """Adds a cycle of exact mode to every open trace."""
    for t in _open:
        t.cycles.append(cycle)
