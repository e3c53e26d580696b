"""Whether drafting pays: exact mode's time per kept token beside that of a plain step, and when to do without drafts.

Every cycle tells what a kept token costs. What a plain step costs is measured now and then by one that leaves no trace:
the backbone runs the last token, and the cache is cut back. So measuring changes no text, not even a sampled one.

Where drafts are slower by more than `_MARGIN`, the river drafts nothing for `_REST` tokens (copies from the context,
which cost no pass, go on), then tries again, and rests twice as long each time that they are slower still. Cycles in
which something was compiled or captured, or that used a width for the first time, do not count, and neither does the
slowest one of a window.

Not handled: drafts that pay for some rows of a batch.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from river_compile.distributed.ranks import ALONE, Ranks
from river_compile.runtime.stats import CycleRecord, PayoffLog
from river_compile.state import ModelState

Clock = Callable[[], float]

_WINDOW = 8  # drafting cycles that are compared with the plain steps
_PLAIN = 3  # plain steps that make a median
_FRESH = 128  # kept tokens after which a plain step is measured again
_MARGIN = 1.1
_REST, _LONGEST_REST = 64, 1024  # kept tokens without drafts


@dataclass
class Pays:
    """Watches the cycles of one model at one batch size, over any number of texts.

    Attributes:
        log: what is told of it.
        preparations: returns how many graphs were compiled and captured so far.
        ranks: that share the model; all of them go by the first one's clock.
        clock: seconds, from wherever.
    """

    log: PayoffLog
    preparations: Callable[[], int]
    ranks: Ranks = ALONE
    clock: Clock = time.perf_counter
    _drafted: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _plain: deque[float] = field(default_factory=lambda: deque(maxlen=2 * _PLAIN - 1))
    _widths: set[int] = field(default_factory=set)
    _prepared: int = -1  # preparations after the latest pass
    _since_plain: float = 0  # kept tokens of a row
    _rest: int = _REST
    _left: float = 0  # tokens of the rest

    @property
    def resting(self) -> bool:
        """Whether the loop is to do without the river's drafts."""
        return self._left > 0

    def measure_plain(self, plain_pass: Callable[[], object]) -> float | None:
        """Runs a plain step and takes its time, where that is due; returns the seconds, None where it is not.

        Args:
            plain_pass: returns when its result is there.
        """
        enough = len(self._plain) >= _PLAIN and self._since_plain < _FRESH
        if self.resting or enough or len(self._drafted) < _WINDOW // 2:
            return None
        start = self.clock()
        plain_pass()
        (seconds,) = self.ranks.agree([self.clock() - start])
        self._take(1, seconds, self._plain_took)
        return seconds

    def note(self, cycle: CycleRecord) -> None:
        """Takes a cycle in; decides whether the next ones draft."""
        kept, seconds = len(cycle.kept) / len(cycle.rows), sum(cycle.seconds)
        self._since_plain += kept
        if self.resting:
            self.log.tokens_without += kept
            self._left -= kept
        elif cycle.drafted:
            self._take(cycle.width, seconds, lambda s: self._drafted.append((kept, s)))
            self._judge()
            return
        if not cycle.drafted:
            self._take(cycle.width, seconds, self._plain_took)

    def _take(self, width: int, seconds: float, counts: Callable[[float], object]) -> None:
        before, self._prepared = self._prepared, self.preparations()
        if self._prepared == before and width in self._widths:
            counts(seconds)
        self._widths.add(width)

    def _plain_took(self, seconds: float) -> None:
        self._plain.append(seconds)
        self._since_plain = 0

    def _judge(self) -> None:
        if len(self._drafted) < _WINDOW or len(self._plain) < _PLAIN:
            return
        slowest = max(self._drafted, key=lambda cycle: cycle[1] / cycle[0])
        tokens = sum(kept for kept, _ in self._drafted) - slowest[0]
        per_token = (sum(seconds for _, seconds in self._drafted) - slowest[1]) / tokens
        plain = statistics.median(self._plain)
        self.log.seconds = (per_token, plain)
        if per_token <= _MARGIN * plain:
            self._rest = _REST
            return
        self.log.times_off += 1
        self.log.why = (per_token, plain)
        self._left, self._rest = self._rest, min(2 * self._rest, _LONGEST_REST)
        self._drafted.clear()


class _AllPays(dict[tuple[int, bool], Pays]):
    """Those of one model, by batch size and whether verification is strict."""


def pays_of(state: ModelState, log: PayoffLog, strict: bool, preparations: Callable[[], int], rows: int) -> Pays:
    """Returns what watches a model's cycles with so many rows."""
    every = state.of(_AllPays)
    return every.setdefault((rows, strict), Pays(log, preparations, state.of(Ranks)))
