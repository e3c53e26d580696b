"""Counters and records of a model's steps and of exact mode's cycles, and their observers.

Not handled: what to do with it; :mod:`river_compile.reporting.trace` keeps it, the report shows the sums.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
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

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._functions)

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


class StepRecord(NamedTuple):
    """One forward pass.

    Attributes:
        depth: backbone blocks executed before the rows left.
        similarities: the exit score after each candidate block that ran.
        decode: False for a prompt.
        thread: identifier of the thread it ran in.
        model: which model ran, an identifier unique in the process.
        entropy: of the previous step's logits, in nats, where that decided ("confidence").
        seconds: wall time of the step on the host, without Dynamo's guards.
    """

    depth: int
    similarities: tuple[float, ...]
    decode: bool
    thread: int
    model: int
    entropy: float | None = None
    seconds: float = 0.0


class RowCycle(NamedTuple):
    """One row's part of a cycle of exact mode.

    Attributes:
        row: its number in the batch.
        drafted: where each drafted token came from: "river" or "lookup" (copied from the context).
        kept: where each kept token came from: as above, or "backbone" for its own token after the agreeing drafts.
        held_back: whether its next draft held but was dropped, because another row's did not.
    """

    row: int
    drafted: tuple[str, ...]
    kept: tuple[str, ...]
    held_back: bool = False

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept."""
        return sum(source != "backbone" for source in self.kept)


class CycleRecord(NamedTuple):
    """One cycle of exact mode: drafts, the pass that verified them, and the kept tokens.

    Attributes:
        rows: the rows that were being generated.
        width: query length of the verifying pass; what a row's draft left of it was filler.
        seconds: wall time of drafting, of verifying, and of choosing and keeping tokens.
        thread: identifier of the thread it ran in.
        model: which model ran, an identifier unique in the process.
    """

    rows: tuple[RowCycle, ...]
    width: int
    seconds: tuple[float, float, float]
    thread: int
    model: int

    @property
    def drafted(self) -> tuple[str, ...]:
        """The sources of all rows' drafts, row after row."""
        return tuple(source for row in self.rows for source in row.drafted)

    @property
    def kept(self) -> tuple[str, ...]:
        """The sources of all rows' kept tokens, row after row."""
        return tuple(source for row in self.rows for source in row.kept)

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept, of all rows."""
        return sum(row.accepted for row in self.rows)

    @property
    def held_back(self) -> int:
        """Rows that dropped a draft that held."""
        return sum(row.held_back for row in self.rows)


class ExactStats(NamedTuple):
    """Exact mode's totals of one model: sums over its cycles and their rows.

    Attributes:
        cycles: verifying passes.
        row_cycles: rows that were being generated in them.
        drafted, accepted: tokens.
        kept: tokens, the backbone's own included.
        held_back: rows that dropped a draft that held, because another row's did not.
        by_source: of the drafted tokens of each source, how many there were and how many were kept.
    """

    cycles: int = 0
    row_cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    kept: int = 0
    held_back: int = 0
    by_source: Mapping[str, tuple[int, int]] = MappingProxyType({})

    def plus(self, cycle: CycleRecord) -> ExactStats:
        """Returns the sums with one more cycle."""
        drafted = accepted = kept = held_back = 0
        by_source = dict(self.by_source)
        for row in cycle.rows:
            drafted, kept, held_back = drafted + len(row.drafted), kept + len(row.kept), held_back + row.held_back
            for source in row.drafted:
                there, held = by_source.get(source, (0, 0))
                by_source[source] = (there + 1, held)
            for source in row.kept:
                if source != "backbone":
                    there, held = by_source[source]
                    by_source[source] = (there, held + 1)
                    accepted += 1
        return ExactStats(
            self.cycles + 1,
            self.row_cycles + len(cycle.rows),
            self.drafted + drafted,
            self.accepted + accepted,
            self.kept + kept,
            self.held_back + held_back,
            by_source,
        )


class ExitStats:
    """Steps per exit depth (backbone blocks executed) of one model, and the cycles of exact mode.

    Attributes:
        model_id: identifies the model in traces, unique in the process.
        decode, prefill: decode steps and prompts by depth.
        prompts: how many of these there were.
    """

    def __init__(self) -> None:
        self.model_id = next(_model_ids)
        self.num_blocks = 0
        self.exact = ExactStats()
        self.decode: Counter[int] = Counter()
        self.prefill: Counter[int] = Counter()
        self.prompts = 0
        self._lock = threading.Lock()

    @property
    def steps(self) -> int:
        """Forward passes."""
        return self.decode.total() + self.prefill.total()

    def count(self, depth: int, decode: bool) -> None:
        """Counts a pass."""
        with self._lock:
            (self.decode if decode else self.prefill)[depth] += 1
            self.prompts += not decode

    def count_cycle(self, cycle: CycleRecord) -> None:
        """Counts a cycle of exact mode and shows it to those who observe cycles."""
        with self._lock:
            self.exact = self.exact.plus(cycle)
        cycles(cycle)


cycles: Observers[[CycleRecord]] = Observers()
