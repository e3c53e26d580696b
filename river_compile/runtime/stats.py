"""What is counted and recorded of a model's steps and of exact mode's cycles, and who is told of each.

Not handled: what to do with it; :mod:`river_compile.runtime.trace` keeps it, the report shows the sums.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, ParamSpec

P = ParamSpec("P")

_model_ids = itertools.count(1)


class Observers(Generic[P]):
    """Functions that are called, wherever in the process something happens."""

    def __init__(self) -> None:
        self._functions: tuple[Callable[P, object], ...] = ()
        self._lock = threading.Lock()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Calls them all."""
        for function in self._functions:
            function(*args, **kwargs)

    @contextlib.contextmanager
    def added(self, function: Callable[P, object]) -> Iterator[None]:
        """Inside, a function is one of them."""
        with self._lock:
            self._functions = (*self._functions, function)
        try:
            yield
        finally:
            with self._lock:
                self._functions = tuple(f for f in self._functions if f is not function)


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

    def count(self, step: StepRecord) -> None:
        """Counts a step."""
        with self._lock:
            (self._decode if step.decode else self._prefill)[step.depth] += 1
            self._doubted += step.doubted

    @property
    def doubted(self) -> int:
        """Decode steps that ran through the river and then through the backbone."""
        with self._lock:
            return self._doubted

    def depths(self, decode: bool = True) -> dict[int, int]:
        """Returns {exit depth in backbone blocks executed: steps}, ascending."""
        with self._lock:
            return dict(sorted((self._decode if decode else self._prefill).items()))


class StepRecord(NamedTuple):
    """One forward pass.

    Attributes:
        depth: backbone blocks executed before the rows left; all of them for a doubted step.
        similarities: the exit score after each candidate block that ran.
        decode: False for a prompt.
        thread: identifier of the thread it ran in.
        model: which model ran, an identifier unique in the process.
        entropy: of the logits that decided, in nats: the previous step's ("confidence"), or the river's ("doubt").
        river_from: backbone blocks before the river's part of a doubted step, None for other steps.
        seconds: wall time of the step on the host, without Dynamo's guards.
    """

    depth: int
    similarities: tuple[float, ...]
    decode: bool
    thread: int
    model: int
    entropy: float | None = None
    river_from: int | None = None
    seconds: float = 0.0

    @property
    def doubted(self) -> bool:
        """Whether the step ran through the river first, and then again through the backbone."""
        return self.river_from is not None


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


cycles: Observers[[CycleRecord]] = Observers()


def record_cycle(cycle: CycleRecord, stats: ExactStats) -> None:
    """Counts a cycle of exact mode and tells those who observe cycles."""
    stats.count(cycle)
    cycles(cycle)
