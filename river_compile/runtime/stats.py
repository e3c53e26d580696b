"""Counters and records of a model's steps and speculation steps, and their observers."""

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
    """Callbacks for an event anywhere in the process. Thread-safe."""

    def __init__(self) -> None:
        self._functions: tuple[Callable[P, object], ...] = ()
        self._lock = threading.Lock()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        for function in self._functions:
            function(*args, **kwargs)

    def __bool__(self) -> bool:
        return bool(self._functions)

    @contextlib.contextmanager
    def added(self, function: Callable[P, object]) -> Iterator[None]:
        """Register a function inside the context."""
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
        depth: backbone layers that ran before the exit, 0 to the model's number of layers.
        scores: exit score after each candidate layer that ran.
        decode: False for a prompt.
        thread: identifier of the thread that ran it (`threading.get_ident`).
        model: number of the model, unique in the process.
        entropy: of the previous step's logits, in nats, if it decided (criterion "confidence"); else None.
        seconds: wall time on the host, without Dynamo's guards.
    """

    depth: int
    scores: tuple[float, ...]
    decode: bool
    thread: int
    model: int
    entropy: float | None = None
    seconds: float = 0.0


class CycleRecord(NamedTuple):
    """One cycle of speculative decoding: the drafts, the verifying pass and the emitted tokens.

    Attributes:
        drafted: source of each drafted token: "river" (the twins), "assistant", "mtp" or "lookup" (the context).
        emitted: source of each emitted token: as above, or "backbone" for the token after the accepted drafts.
        width: query length of the verifying pass, padding included.
        seconds: wall time of drafting, verifying and accepting.
        thread: identifier of the thread that ran it (`threading.get_ident`).
        model: number of the model, unique in the process.
    """

    drafted: tuple[str, ...]
    emitted: tuple[str, ...]
    width: int
    seconds: tuple[float, float, float]
    thread: int
    model: int

    @property
    def accepted(self) -> int:
        """Drafted tokens that were accepted."""
        return sum(source != "backbone" for source in self.emitted)


class ExactStats(NamedTuple):
    """Totals of exact mode for one model."""

    cycles: int = 0  # verifying passes
    drafted: int = 0  # tokens
    accepted: int = 0  # drafted tokens
    emitted: int = 0  # tokens, the backbone's own included
    by_source: Mapping[str, tuple[int, int]] = MappingProxyType({})  # (drafted, accepted) tokens by source

    def plus(self, cycle: CycleRecord) -> ExactStats:
        """Return the totals with one more cycle."""
        by_source = dict(self.by_source)
        for source in cycle.drafted:
            drafted, accepted = by_source.get(source, (0, 0))
            by_source[source] = (drafted + 1, accepted)
        for source in cycle.emitted:
            if source != "backbone":
                drafted, accepted = by_source[source]
                by_source[source] = (drafted, accepted + 1)
        return ExactStats(
            self.cycles + 1,
            self.drafted + len(cycle.drafted),
            self.accepted + cycle.accepted,
            self.emitted + len(cycle.emitted),
            by_source,
        )


class ExitStats:
    """Steps by exit depth (backbone blocks executed) and exact mode's totals, of one model."""

    def __init__(self) -> None:
        self.model_id = next(_model_ids)  # unique in the process
        self.num_blocks = 0
        self.exact = ExactStats()
        self.decode: Counter[int] = Counter()  # steps by depth; `prefill`: prompts
        self.prefill: Counter[int] = Counter()
        self._lock = threading.Lock()

    @property
    def steps(self) -> int:
        return self.decode.total() + self.prefill.total()

    def count(self, depth: int, decode: bool) -> None:
        with self._lock:
            (self.decode if decode else self.prefill)[depth] += 1

    def count_cycle(self, cycle: CycleRecord) -> None:
        """Count a cycle and notify the observers of `cycles`."""
        with self._lock:
            self.exact = self.exact.plus(cycle)
        cycles(cycle)


cycles: Observers[[CycleRecord]] = Observers()
