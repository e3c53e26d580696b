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


class CycleRecord(NamedTuple):
    """One cycle of exact mode, of one row: drafts, the pass that verified them, and the kept tokens.

    Attributes:
        drafted: where each drafted token came from: "river" or "lookup" (copied from the context).
        kept: where each kept token came from: as above, or "backbone" for its own token after the agreeing drafts.
        width: query length of the verifying pass; what the draft left of it was filler.
        seconds: wall time of drafting, of verifying, and of choosing and keeping tokens.
        thread: identifier of the thread it ran in.
        model: which model ran, an identifier unique in the process.
    """

    drafted: tuple[str, ...]
    kept: tuple[str, ...]
    width: int
    seconds: tuple[float, float, float]
    thread: int
    model: int

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept."""
        return sum(source != "backbone" for source in self.kept)


class ExactStats(NamedTuple):
    """Exact mode's totals of one model: sums over its cycles.

    Attributes:
        cycles: verifying passes.
        drafted, accepted: tokens.
        kept: tokens, the backbone's own included.
        by_source: of the drafted tokens of each source, how many there were and how many were kept.
    """

    cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    kept: int = 0
    by_source: Mapping[str, tuple[int, int]] = MappingProxyType({})

    def plus(self, cycle: CycleRecord) -> ExactStats:
        """Returns the sums with one more cycle."""
        by_source = dict(self.by_source)
        for source in cycle.drafted:
            there, held = by_source.get(source, (0, 0))
            by_source[source] = (there + 1, held)
        for source in cycle.kept:
            if source != "backbone":
                there, held = by_source[source]
                by_source[source] = (there, held + 1)
        return ExactStats(
            self.cycles + 1,
            self.drafted + len(cycle.drafted),
            self.accepted + cycle.accepted,
            self.kept + len(cycle.kept),
            by_source,
        )


class ExitStats:
    """Steps per exit depth (backbone blocks executed) of one model, and the cycles of exact mode.

    Attributes:
        model_id: identifies the model in traces, unique in the process.
        decode, prefill: decode steps and prompts by depth.
    """

    def __init__(self) -> None:
        self.model_id = next(_model_ids)
        self.num_blocks = 0
        self.exact = ExactStats()
        self.decode: Counter[int] = Counter()
        self.prefill: Counter[int] = Counter()
        self._lock = threading.Lock()

    @property
    def steps(self) -> int:
        """Forward passes."""
        return self.decode.total() + self.prefill.total()

    def count(self, depth: int, decode: bool) -> None:
        """Counts a pass."""
        with self._lock:
            (self.decode if decode else self.prefill)[depth] += 1

    def count_cycle(self, cycle: CycleRecord) -> None:
        """Counts a cycle of exact mode and shows it to those who observe cycles."""
        with self._lock:
            self.exact = self.exact.plus(cycle)
        cycles(cycle)


cycles: Observers[[CycleRecord]] = Observers()
