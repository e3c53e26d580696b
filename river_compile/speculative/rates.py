"""What is learned while generating: how often drafted tokens hold, and how long passes take.

Not handled: what to do with it (:mod:`.plan`).
"""

from __future__ import annotations

import statistics
from bisect import bisect
from collections import deque
from collections.abc import Hashable, Sequence

_PRIOR_WEIGHT = 4.0
_MEMORY = 200.0  # judged tokens per bin after which older ones fade
_FADES_BY = 0.97  # what is left of what was learned after a cycle in which nothing was judged
_SAMPLES = 9  # latest times of a kind of pass, the least of which counts


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

    def fade(self) -> None:
        """Forgets a little, so that drafts which stopped paying are tried again after a while."""
        for i, prior in enumerate(self._prior):
            start = _PRIOR_WEIGHT * prior
            self._kept[i] = start + _FADES_BY * (self._kept[i] - start)
            self._judged[i] = _PRIOR_WEIGHT + _FADES_BY * (self._judged[i] - _PRIOR_WEIGHT)


class PassTimes:
    """How long draft steps and verifying passes of each width take, for one model and batch.

    Of the latest ones the shortest counts, and the first one does not: graphs are compiled and captured in between.
    Before a kind of pass was measured it counts as in `_guess`, in proportion to those that were.
    """

    DRAFT = "draft"

    def __init__(self) -> None:
        self._begun: set[Hashable] = set()
        self._times: dict[Hashable, deque[float]] = {}

    def note(self, kind: int | str, seconds: float) -> None:
        """Takes in the time of one pass: `DRAFT`, or the width of a verification."""
        if kind in self._begun:
            self._times.setdefault(kind, deque(maxlen=_SAMPLES)).append(seconds)
        self._begun.add(kind)

    def of(self, kind: int | str) -> float:
        """Returns the seconds of a pass."""
        if kind in self._times:
            return min(self._times[kind])
        scales = [min(times) / _guess(known) for known, times in list(self._times.items())]
        return _guess(kind) * (statistics.median(scales) if scales else 1.0)


def _guess(kind: Hashable) -> float:
    """Returns what a pass costs in units of one of a single token, on the cheap side so that it will be tried."""
    return 0.3 if kind == PassTimes.DRAFT else 1 + 0.02 * (int(str(kind)) - 1)
