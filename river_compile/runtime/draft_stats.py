"""Statistics of generation: acceptance rates of drafted tokens, and times of passes.

Not handled: what to do with it (:mod:`river_compile.decoding.draft_policy`).
"""

from __future__ import annotations

import math
from bisect import bisect, bisect_left
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType

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
    """How long draft steps and verifying passes of each width take, for one model and number of rows.

    Of the latest ones the shortest counts, and none in which something was compiled or captured. A kind of pass that
    was measured a few times only, or long ago, costs at best what it would beside each of those that are known: what is
    thought to be dear would not be tried again. At most it costs what the passes of any number of rows say, whose time
    is about a function of their tokens: flat while weights are waited for, then in proportion, so convex.

    Args:
        preparations: returns how many graphs were compiled and captured so far.
        rows: of the batch.
        all_rows: the model's times by number of rows, these among them.

    Attributes:
        preparing: seconds of those passes in which something was compiled or captured.
        lead: by how many passes of one token a batch is ahead of doing without drafts; what it may risk.
    """

    DRAFT = "draft"

    def __init__(
        self,
        preparations: Callable[[], int] = lambda: 0,
        rows: int = 1,
        all_rows: Mapping[int, PassTimes] = MappingProxyType({}),
    ) -> None:
        self.rows = rows
        self._preparations, self._prepared = preparations, preparations()
        self._all_rows = all_rows
        self._times: dict[Hashable, deque[float]] = {}
        self._measured: dict[Hashable, int] = {}  # when a kind was measured last, in passes
        self._passes = 0
        self._prompt: tuple[int, float] | None = None  # tokens of the latest one, in all rows, and its seconds
        self.preparing = 0.0
        self.lead = math.inf if rows == 1 else 0.0

    def note(self, kind: int | str, seconds: float) -> None:
        """Takes in the time of one pass: `DRAFT`, or the width of a verification."""
        self.note_all([(kind, seconds)])

    def note_all(self, passes: Sequence[tuple[int | str, float]]) -> None:
        """Takes in the times of passes of which it is not known for which one something was prepared."""
        before, self._prepared = self._prepared, self._preparations()
        if self._prepared != before:
            self.preparing += sum(seconds for _, seconds in passes)
            return
        for kind, seconds in passes:
            if self._passes - self._measured.get(kind, self._passes) > _LONG_AGO:
                self._times.pop(kind, None)
            self._times.setdefault(kind, deque(maxlen=_SAMPLES)).append(seconds)
            self._passes += 1
            self._measured[kind] = self._passes

    def note_prompt(self, width: int, seconds: float) -> None:
        """Takes in the time of a prompt's pass in which nothing was compiled or captured."""
        self._prompt = self.rows * width, seconds

    def of(self, kind: int | str) -> float:
        """Returns the seconds of a pass, at best those of a kind that is not known."""
        times = self._times.get(kind, ())
        enough = _ENOUGH if self.rows == 1 else 1  # (a batch does not try dear passes again so soon)
        if len(times) >= enough and self._passes - self._measured[kind] <= _LONG_AGO:
            return min(times)
        known: dict[Hashable, float] = {
            k: min(of_k) for k, of_k in list(self._times.items()) if len(of_k) >= enough and k != kind
        }
        passes = {k: seconds for k, seconds in known.items() if k != PassTimes.DRAFT}
        at_best = max(_at_best(kind, k, seconds) for k, seconds in (passes or known or {1: 1.0}).items())
        return min([*times, at_best])

    def at_most(self, kind: int | str) -> float:
        """Returns the seconds that a pass takes at most; infinity where no pass of one token each is known.

        (One row, which tries what it does not know, goes by its best.)
        """
        if self.rows == 1:
            return self.of(kind)
        if kind in self._times:
            return min(self._times[kind])
        if 1 not in self._times:
            return math.inf
        one, others = self.at_most(1), [times for rows, times in list(self._all_rows.items()) if rows != self.rows]
        if kind == PassTimes.DRAFT:  # (a row more takes as many sums in a draft step as in a pass)
            drafts = [times._draft_and_one for times in others]
            return min([one, *(draft + max(one - their_one, 0.0) for draft, their_one in drafts)])
        points: dict[int, float] = {}
        for times in others:
            for n, seconds in times._by_tokens(_ENOUGH).items():
                points[n] = max(seconds, points.get(n, 0.0))
        # (More rows see more caches, so a pass of as many tokens of fewer rows takes less.)
        slower = max(one / most_at(self.rows, points), 1.0) if points else 1.0
        points = {n: slower * seconds for n, seconds in points.items()} | self._by_tokens(1)
        return most_at(self.rows * int(kind), points)

    def typical(self, kind: int | str) -> float:
        """Returns what the latest passes of a kind took, neither the fastest nor the slowest; or the most."""
        times = sorted(self._times.get(kind, ()))
        return times[len(times) // 2] if times else self.at_most(kind)

    @property
    def _draft_and_one(self) -> tuple[float, float]:
        """The seconds of a draft step, infinity where they are not known, and of a pass of one token."""
        draft, one = self._times.get(PassTimes.DRAFT, ()), self._times.get(1, ())
        return (min(draft), min(one)) if min(len(draft), len(one)) >= _ENOUGH else (math.inf, 0.0)

    def _by_tokens(self, enough: int) -> dict[int, float]:
        """Returns the seconds of passes by their tokens in all rows."""
        passes = {
            self.rows * kind: min(times)
            for kind, times in list(self._times.items())
            if isinstance(kind, int) and len(times) >= enough
        }
        return passes if self._prompt is None else {**dict([self._prompt]), **passes}

    @property
    def measured(self) -> bool:
        """Whether any pass was."""
        return bool(self._times)


def most_at(tokens: int, seconds: Mapping[int, float]) -> float:
    """Returns the most that a pass of so many tokens takes, given passes of other numbers, if times are convex.

    Between two of them that is on the line through both. Beyond the last one they grow in proportion at least, which is
    the most where they were flat until there, and as between the last two.
    """
    known = sorted(seconds)
    after = bisect_left(known, tokens)
    if after < len(known) and (known[after] == tokens or after == 0):
        return seconds[known[after]]
    last = known[after - 1]
    if after < len(known):
        share = (tokens - last) / (known[after] - last)
        return (1 - share) * seconds[last] + share * seconds[known[after]]
    before = known[-2] if len(known) > 1 else 0
    slope = (seconds[last] - seconds.get(before, 0.0)) / (last - before)
    return seconds[last] + max(slope, seconds[last] / last) * (tokens - last)


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
    """What one model's calls of generate learned: rates by whether they sample, and times of passes by rows."""

    def __init__(self) -> None:
        self.rates: dict[bool, DraftRates] = {}
        self.times: dict[int, PassTimes] = {}

    def times_of(self, rows: int, preparations: Callable[[], int]) -> PassTimes:
        """Returns the times of so many rows, new ones where no batch of that size has run."""
        if rows not in self.times:
            self.times[rows] = PassTimes(preparations, rows, self.times)
        return self.times[rows]
