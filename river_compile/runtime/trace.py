"""Counts where tokens leave, and records every step on request.

``with trace() as t:`` records all steps that run anywhere in the process while it is open, each with the thread it ran
in, so that generation in a worker thread (as streamers use it) is seen too.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .plots import plot_cycles, plot_depths

_model_ids = itertools.count(1)


class ExitStats:
    """Steps per exit depth of one model, prefill and decode apart, and the cycles of exact mode.

    Attributes:
        model_id: identifies the model in traces, unique in the process.
    """

    def __init__(self) -> None:
        self.model_id = next(_model_ids)
        self.exact = ExactStats()
        self.num_blocks = 0
        self._lock = threading.Lock()
        self._decode: Counter[int] = Counter()
        self._prefill: Counter[int] = Counter()
        self._doubted = 0

    def count(self, depth: int, decode: bool, doubted: bool = False) -> None:
        with self._lock:
            (self._decode if decode else self._prefill)[depth] += 1
            self._doubted += doubted

    @property
    def doubted(self) -> int:
        """Decode steps that ran through the river and then through the backbone."""
        with self._lock:
            return self._doubted

    def depths(self, decode: bool = True) -> dict[int, int]:
        """Returns {exit depth in backbone blocks executed: steps}, ascending."""
        with self._lock:
            return dict(sorted((self._decode if decode else self._prefill).items()))

    def reset(self) -> None:
        with self._lock:
            self._decode.clear()
            self._prefill.clear()
            self._doubted = 0
        self.exact.reset()


@dataclass(frozen=True)
class Outcome:
    """Where the rows of one step left, and why.

    Attributes:
        depth: backbone blocks executed; all of them for a doubted step.
        similarities: the exit score after each candidate block that ran.
        entropy: of the logits that decided, in nats: the previous step's, or the river's; None where none did.
        doubted: the step ran through the river first, and then again through the backbone.
        river_from: backbone blocks before the river's part of a doubted step, None for other steps.
    """

    depth: int
    similarities: Sequence[float] = ()
    entropy: float | None = None
    doubted: bool = False
    river_from: int | None = None


@dataclass(frozen=True)
class StepRecord:
    """One forward pass.

    Attributes:
        depth: backbone blocks executed before the rows left; all of them for a doubted step.
        similarities: the exit score after each candidate block that ran.
        decode: False for a prompt.
        thread: identifier of the thread it ran in.
        model: which model ran, an identifier unique in the process.
        entropy: of the logits that decided, in nats: the previous step's ("confidence"), or the river's ("doubt").
        doubted: the step ran through the river first, and then again through the backbone.
        river_from: backbone blocks before the river's part of a doubted step, None for other steps.
    """

    depth: int
    similarities: tuple[float, ...]
    decode: bool
    thread: int
    model: int
    entropy: float | None = None
    doubted: bool = False
    river_from: int | None = None


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
        rows: rows that were still being generated.
    """

    drafted: tuple[str, ...]
    kept: tuple[str, ...]
    width: int
    held_back: int
    seconds: tuple[float, float, float]
    thread: int
    model: int
    rows: int = 1

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept."""
        return sum(source != "backbone" for source in self.kept)


@dataclass
class ExactStats:
    """What exact mode did with one model: sums over its cycles.

    Attributes:
        cycles: verifying passes.
        drafted, accepted: tokens per row.
        kept: tokens per row, the backbone's own included.
        row_cycles: rows that were being generated, summed over the cycles of batches with two and more.
        held_back: those of them that dropped a draft that held, because another row's did not.
    """

    cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    kept: int = 0
    row_cycles: int = 0
    held_back: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def count(self, cycle: CycleRecord) -> None:
        with self._lock:
            self.cycles += 1
            self.drafted += len(cycle.drafted)
            self.accepted += cycle.accepted
            self.kept += len(cycle.kept)
            if cycle.rows > 1:
                self.row_cycles += cycle.rows
                self.held_back += cycle.held_back

    def copy(self) -> ExactStats:
        """Returns the sums as they are now."""
        with self._lock:
            return ExactStats(self.cycles, self.drafted, self.accepted, self.kept, self.row_cycles, self.held_back)

    def reset(self) -> None:
        with self._lock:
            self.cycles = self.drafted = self.accepted = self.kept = self.row_cycles = self.held_back = 0


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
    def doubted(self) -> int:
        """Decode steps that ran through both paths."""
        return sum(t.doubted for t in self.tokens)

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
        """Draws the tokens above their texts as a PNG; returns the path.

        Bars are exit depths. Where cycles of exact mode were recorded, they are the tokens' places in their cycles,
        coloured by where the tokens came from.

        Args:
            path: the file to write.
            texts: the decoded text of each token but a prompt's first: one for each of :attr:`tokens`, in exact mode
                for each token that the cycles kept. Numbers stand in where it is None.

        Raises:
            ValueError: nothing was recorded, or `texts` has another length.
        """
        if self.cycles:
            return plot_cycles(path, texts, [(cycle.drafted, cycle.kept) for cycle in self.cycles])
        tokens = self.tokens
        return plot_depths(path, texts, [t.depth for t in tokens], [t.doubted for t in tokens], self.num_blocks)


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


def record_step(stats: ExitStats, decode: bool, outcome: Outcome) -> None:
    """Adds a step to every open trace."""
    if not _open:
        return
    step = StepRecord(
        outcome.depth,
        tuple(outcome.similarities),
        decode,
        threading.get_ident(),
        stats.model_id,
        outcome.entropy,
        outcome.doubted,
        outcome.river_from,
    )
    for t in _open:
        t.num_blocks = max(t.num_blocks, stats.num_blocks)
        t.steps.append(step)


def record_cycle(cycle: CycleRecord, stats: ExactStats) -> None:
    """Counts a cycle of exact mode and adds it to every open trace."""
    stats.count(cycle)
    for t in _open:
        t.cycles.append(cycle)
