"""Statistics of generation: acceptance rates of drafted tokens, and times of passes.

Not handled: what to do with it (:mod:`river_compile.decoding.draft_policy`).
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import deque
from collections.abc import Callable, Hashable, Sequence

# Upper edges of the bins in which acceptance rates are learned: nats of entropy, and tokens of the repeated ending.
ENTROPY_EDGES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0)
MATCH_EDGES = (2.5, 3.5, 4.5, 6.5, 9.5)
# What the rates are before anything was judged: exp(-entropy / 2), about what a 4-bit twin shows; longer repetitions go
# on more often.
_BY_ENTROPY = [math.exp(-(a + b) / 4) for a, b in zip((0.0, *ENTROPY_EDGES), (*ENTROPY_EDGES, 4.0), strict=True)]
_BY_MATCH = [0.15, 0.3, 0.5, 0.75, 0.9, 0.97]
_FROM_OTHER_TEXTS = 16.0  # judged tokens
_RIVER = 0.7  # of the river's next token, whose entropy is not known yet
_PRIOR_WEIGHT = 4.0
_MEMORY = 200.0  # judged tokens per bin after which older ones fade
_FADES_BY = 0.97  # what is left of what was learned after a cycle in which nothing was judged
_SAMPLES = 9  # latest times of a kind of pass, the least of which counts
_ENOUGH = 3  # times of a kind of pass that are believed
_LONG_AGO = 500  # passes after which a kind that was not measured since is tried again


class AcceptanceRate:
    """A running estimate of how often drafted tokens hold, in bins of some evidence.

    Args:
        edges: upper edges of the bins, ascending; a last bin holds what lies above.
        prior: the estimate per bin before anything was judged.
    """

    def __init__(self, edges: Sequence[float], prior: Sequence[float]) -> None:
        self._edges, self._prior = tuple(edges), tuple(prior)
        self._kept = [_PRIOR_WEIGHT * p for p in prior]
        self._judged = [_PRIOR_WEIGHT] * (len(edges) + 1)

    def chance(self, evidence: float) -> float:
        """Returns how likely a token with this evidence is to hold."""
        i = bisect(self._edges, evidence)
        return self._kept[i] / self._judged[i]

    def learn(self, evidence: float, held: bool) -> None:
        """Takes in one judged token."""
        i = bisect(self._edges, evidence)
        if self._judged[i] >= _MEMORY:
            self._kept[i], self._judged[i] = self._kept[i] / 2, self._judged[i] / 2
        self._kept[i] += held
        self._judged[i] += 1

    def weigh(self, most: float) -> None:
        """Counts what was learned as no more than `most` judged tokens in each bin: another text may be otherwise."""
        for i, judged in enumerate(self._judged):
            share = min(most / judged, 1.0)
            self._kept[i], self._judged[i] = share * self._kept[i], share * judged

    def fade(self) -> None:
        """Forgets a little, so that drafts which stopped paying are tried again after a while."""
        for i, prior in enumerate(self._prior):
            start = _PRIOR_WEIGHT * prior
            self._kept[i] = start + _FADES_BY * (self._kept[i] - start)
            self._judged[i] = _PRIOR_WEIGHT + _FADES_BY * (self._judged[i] - _PRIOR_WEIGHT)


class PassTimes:
    """How long draft steps and verifying passes of each width take, of one row of one model.

    Of the latest ones the shortest counts, and none in which something was compiled or captured. A kind of pass that
    was measured a few times only, or long ago, costs at best what it would beside each of those that are known: what is
    thought to be dear would not be tried again.

    Args:
        preparations: returns how many graphs were compiled and captured so far.
    """

    DRAFT = "draft"

    def __init__(self, preparations: Callable[[], int] = lambda: 0) -> None:
        self._preparations, self._prepared = preparations, preparations()
        self._times: dict[Hashable, deque[float]] = {}
        self._measured: dict[Hashable, int] = {}  # when a kind was measured last, in passes
        self._passes = 0

    def note(self, kind: int | str, seconds: float) -> None:
        """Takes in the time of one pass: `DRAFT`, or the width of a verification."""
        self.note_all([(kind, seconds)])

    def note_all(self, passes: Sequence[tuple[int | str, float]]) -> None:
        """Takes in the times of passes of which it is not known for which one something was prepared."""
        before, self._prepared = self._prepared, self._preparations()
        if self._prepared != before:
            return
        for kind, seconds in passes:
            if self._passes - self._measured.get(kind, self._passes) > _LONG_AGO:
                self._times.pop(kind, None)
            self._times.setdefault(kind, deque(maxlen=_SAMPLES)).append(seconds)
            self._passes += 1
            self._measured[kind] = self._passes

    def of(self, kind: int | str) -> float:
        """Returns the seconds of a pass, at best those of a kind that is not known."""
        times = self._times.get(kind, ())
        if len(times) >= _ENOUGH and self._passes - self._measured[kind] <= _LONG_AGO:
            return min(times)
        known: dict[Hashable, float] = {
            k: min(of_k) for k, of_k in list(self._times.items()) if len(of_k) >= _ENOUGH and k != kind
        }
        passes = {k: seconds for k, seconds in known.items() if k != PassTimes.DRAFT}
        at_best = max(_at_best(kind, k, seconds) for k, seconds in (passes or known or {1: 1.0}).items())
        return min([*times, at_best])


def _at_best(kind: Hashable, known: Hashable, seconds: float) -> float:
    """Returns what a pass costs at best where one of a known kind costs `seconds`.

    A wider one little more, as where weights are waited for; a narrower one in proportion, as where sums are.
    """
    width, known_width = _width(kind), _width(known)
    share = width / known_width if width < known_width else (1 + 0.02 * (width - 1)) / (1 + 0.02 * (known_width - 1))
    return seconds * share * _part(kind) / _part(known)


def _width(kind: Hashable) -> int:
    return 1 if kind == PassTimes.DRAFT else int(str(kind))


def _part(kind: Hashable) -> float:
    return 0.3 if kind == PassTimes.DRAFT else 1.0


class DraftRates:
    """How often drafted tokens held so far: in one call, or in all calls of a model that go on with the same object.

    Attributes:
        by_entropy: the river's, by the entropy of what it drew them from.
        by_match: copied ones, by the length of the ending that repeats.
        river: the river's next one, of which nothing is known yet.
    """

    def __init__(self) -> None:
        self.by_entropy = AcceptanceRate(ENTROPY_EDGES, _BY_ENTROPY)
        self.by_match = AcceptanceRate(MATCH_EDGES, _BY_MATCH)
        self.river = AcceptanceRate([], [_RIVER])

    def go_on(self) -> DraftRates:
        """Returns these for another text, of which they say as much as a few tokens of its own."""
        for rate in (self.by_entropy, self.by_match, self.river):
            rate.weigh(_FROM_OTHER_TEXTS)
        return self


class DraftHistory:
    """What one model's calls of generate learned: rates by whether they sample, and times of passes of one row.

    Args:
        preparations: returns how many graphs were compiled and captured so far.
    """

    def __init__(self, preparations: Callable[[], int] = lambda: 0) -> None:
        self.rates: dict[bool, DraftRates] = {}
        self.times = PassTimes(preparations)
