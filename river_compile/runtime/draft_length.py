"""How long to draft: as long as the next token is expected to gain more than its time is worth.

Time is worth what it brings on average: the tokens kept per second so far. (To maximize tokens per second in the long
run is to maximize each cycle's tokens minus its seconds times that rate.) How likely tokens are to hold and how long
passes take is learned while generating. Not handled: drafts with alternatives (trees).
"""

from __future__ import annotations

import math
from bisect import bisect, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

RIVER, LOOKUP = "river", "lookup"  # who drafted a token: the river, or a copy of what followed in the context
# Upper edges of the bins in which acceptance rates are learned: nats of entropy, and tokens of the repeated ending.
ENTROPY_EDGES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0)
MATCH_EDGES = (2.5, 3.5, 4.5, 6.5, 9.5)
# What the rates are before anything was judged: exp(-entropy / 2), about what a 4-bit twin shows; longer repetitions go
# on more often.
_BY_ENTROPY = [math.exp(-(a + b) / 4) for a, b in zip((0.0, *ENTROPY_EDGES), (*ENTROPY_EDGES, 4.0), strict=True)]
_BY_MATCH = [0.15, 0.3, 0.5, 0.75, 0.9, 0.97]
_NEXT = 0.7  # of the river's next token, whose entropy is not known yet
_FROM_OTHER_TEXTS = 16.0  # judged tokens
_PRIOR_WEIGHT = 4.0
_MEMORY = 200.0  # judged tokens per bin after which older ones fade
_FADES_BY = 0.97  # what is left of what was learned after a cycle in which nothing was judged
_RATE_FADES_BY = 0.95  # what a cycle leaves of the average before it
_SAMPLES = 9  # latest times of a kind of pass, the least of which counts
_ENOUGH = 3  # times of a kind of pass that are believed
_LONG_AGO = 500  # cycles after which a kind that was not measured since is tried again
_DRAFT = 0  # stands for the width of a draft step among the widths of passes
_DRAFT_COSTS = 0.3  # of a pass of one token, before it was measured


class AcceptanceRate:
    """A running estimate of how often drafted tokens hold, in bins of some feature.

    Args:
        edges: upper edges of the bins, ascending; a last bin holds what lies above.
        prior: the estimate per bin before anything was judged.
    """

    def __init__(self, edges: Sequence[float], prior: Sequence[float]) -> None:
        self._edges, self._prior = tuple(edges), tuple(prior)
        self._kept = [_PRIOR_WEIGHT * p for p in prior]
        self._judged = [_PRIOR_WEIGHT] * (len(edges) + 1)

    def probability(self, feature: float) -> float:
        """Returns how likely a token with this feature is to hold."""
        i = bisect(self._edges, feature)
        return self._kept[i] / self._judged[i]

    def learn(self, feature: float, held: bool) -> None:
        """Takes in one judged token."""
        i = bisect(self._edges, feature)
        if self._judged[i] >= _MEMORY:
            self._kept[i], self._judged[i] = self._kept[i] / 2, self._judged[i] / 2
        self._kept[i] += held
        self._judged[i] += 1

    def cap_weight(self, most: float) -> None:
        """Counts what was learned as no more than `most` judged tokens in each bin: another text may be otherwise."""
        for i, judged in enumerate(self._judged):
            share = min(most / judged, 1.0)
            self._kept[i], self._judged[i] = share * self._kept[i], share * judged

    def decay(self) -> None:
        """Forgets a little, so that drafts which stopped paying are tried again after a while."""
        for i, prior in enumerate(self._prior):
            start = _PRIOR_WEIGHT * prior
            self._kept[i] = start + _FADES_BY * (self._kept[i] - start)
            self._judged[i] = _PRIOR_WEIGHT + _FADES_BY * (self._judged[i] - _PRIOR_WEIGHT)


class DraftToken(NamedTuple):
    """One drafted token.

    Attributes:
        token: its id.
        source: `RIVER` or `LOOKUP`.
        feature: nats of the entropy that the river drew it from, or tokens of the ending whose continuation it copies.
        probability: that it holds, given that those before it did.
    """

    token: int
    source: str
    feature: float
    probability: float


@dataclass
class Draft:
    """A draft on its way.

    Attributes:
        room: most tokens that it may have.
        tokens: so far.
        prefixes: the probability that the draft holds up to each of them.
        steps: that the river took.
        copy: what a continuation from the context would add.
    """

    room: int
    tokens: list[DraftToken] = field(default_factory=list)
    prefixes: list[float] = field(default_factory=list)
    steps: int = 0
    copy: list[DraftToken] = field(default_factory=list)

    def add(self, token: DraftToken) -> None:
        """Adds a token."""
        self.prefixes.append(token.probability * (self.prefixes[-1] if self.prefixes else 1.0))
        self.tokens.append(token)


class DraftLength:
    """Decides how long drafts are; learns from cycle to cycle, and from call to call of one model.

    Args:
        adaptive: by what drafts gain and cost. Otherwise they have as many tokens as there is room for: the same for
            the same text, at any speed.
    """

    def __init__(self, adaptive: bool = True) -> None:
        self._adaptive = adaptive
        river, lookup = AcceptanceRate(ENTROPY_EDGES, _BY_ENTROPY), AcceptanceRate(MATCH_EDGES, _BY_MATCH)
        self._rates = {RIVER: river, LOOKUP: lookup}
        self._next = AcceptanceRate([], [_NEXT])
        self._widths: Sequence[int] = (1,)
        self._times: dict[int, deque[float]] = {}  # by width of the pass
        self._measured: dict[int, int] = {}  # in which cycle a width was measured last
        self._cycles = 0
        self._kept = self._seconds = 0.0  # tokens, and their time; earlier ones fade
        self._costs: tuple[float, list[float]] | None = None

    def carry_over(self, widths: Sequence[int]) -> DraftLength:
        """Returns this for another text, of which it knows as much as a few tokens of its own would tell.

        Args:
            widths: of verifying passes, ascending.
        """
        self._widths, self._costs, self._kept, self._seconds = widths, None, 0.0, 0.0
        for rate in (*self._rates.values(), self._next):
            rate.cap_weight(_FROM_OTHER_TEXTS)
        return self

    def token(self, token: int, source: str, feature: float) -> DraftToken:
        """Returns a drafted token with the probability that it holds."""
        return DraftToken(token, source, feature, self._rates[source].probability(feature))

    def plan(self, draft: Draft) -> tuple[int, int]:
        """Returns how many steps the river is to take now, and, where it is none, how many tokens to verify.

        Those are the draft's, then its copy's.
        """
        return self._by_gain(draft) if self._adaptive else self._by_room(draft)

    def learn(self, draft: Draft, kept: Sequence[str], drafting: float, verifying: float) -> None:
        """Learns from a cycle.

        Args:
            draft: that was verified.
            kept: where each kept token came from; the last one is the backbone's own where the draft did not hold.
            drafting, verifying: seconds.
        """
        for token, source in zip(draft.tokens, kept, strict=False):
            held = source == token.source
            self._rates[token.source].learn(token.feature, held)
            if token.source == RIVER:
                self._next.learn(0.0, held)
        if not draft.steps:
            self._next.decay()
        width = self._width(len(draft.tokens))
        self._measure(width, verifying)
        if draft.steps:
            self._measure(_DRAFT, drafting / draft.steps)
        self._cycles += 1
        self._kept = _RATE_FADES_BY * self._kept + len(kept)
        took = draft.steps * self.seconds(_DRAFT) + self.seconds(width)
        self._seconds = _RATE_FADES_BY * self._seconds + took
        self._costs = None

    def seconds(self, width: int) -> float:
        """Returns the seconds of a pass of some width, 0 for a draft step: its least of late, or a bound from below.

        A kind of pass that was measured a few times only, or long ago, costs at best what it would beside each of those
        that are known: what is thought to be dear would not be tried again.
        """
        times = self._times.get(width, ())
        if len(times) >= _ENOUGH and self._cycles - self._measured[width] <= _LONG_AGO:
            return min(times)
        known = {w: min(ts) for w, ts in self._times.items() if w not in (width, _DRAFT) and len(ts) >= _ENOUGH}
        at_best = max(seconds * _share(width, w) for w, seconds in (known or {1: 1.0}).items())
        return min([*times, at_best])

    def _by_gain(self, draft: Draft) -> tuple[int, int]:
        step, passes = self._costs = self._costs or self._in_tokens()
        drafted, likely = len(draft.tokens), [*draft.prefixes]
        for token in draft.copy:
            likely.append(token.probability * (likely[-1] if likely else 1.0))
        expected = [*accumulate(likely, initial=0.0)]  # tokens that hold, by tokens verified
        fill = [width - 1 for width in self._widths if width <= len(likely)]  # (a pass is as wide as one of few)
        best, count = max((expected[n] - passes[n], n) for n in (*fill, len(likely)))
        steps, tokens, reach = 0, expected[drafted], likely[drafted - 1] if drafted else 1.0
        chance = self._next.probability(0.0)
        for more in range(1, draft.room - drafted + 1):
            reach *= chance
            tokens += reach
            gain = tokens - more * step - passes[drafted + more]
            if gain > best:
                best, steps = gain, more
        return steps, count

    def _by_room(self, draft: Draft) -> tuple[int, int]:
        drafted = len(draft.tokens)
        leads = bool(draft.copy) and draft.copy[0].probability >= self._next.probability(0.0)
        if drafted < draft.room and not leads:
            return draft.room - drafted, drafted
        return 0, self._width(drafted) - 1 if drafted else len(draft.copy)

    def _in_tokens(self) -> tuple[float, list[float]]:
        """Returns the cost of a draft step, and of a pass by the tokens that it verifies, each in tokens."""
        worth = self._kept / self._seconds if self._seconds else 1 / self.seconds(1)
        passes, start = [], 0
        for width in self._widths:
            passes += [worth * self.seconds(width)] * (width - start)
            start = width
        return worth * self.seconds(_DRAFT), passes

    def _width(self, drafted: int) -> int:
        return self._widths[bisect_right(self._widths, drafted)]

    def _measure(self, width: int, seconds: float) -> None:
        if self._cycles - self._measured.get(width, self._cycles) > _LONG_AGO:
            del self._times[width]
        self._times.setdefault(width, deque(maxlen=_SAMPLES)).append(seconds)
        self._measured[width] = self._cycles


def _share(width: int, known: int) -> float:
    """Returns what a pass costs at best beside one of a known width.

    A wider one little more, as where weights are waited for; a narrower one in proportion, as where sums are.
    """
    if width == _DRAFT:
        return _DRAFT_COSTS * _share(1, known)
    return width / known if width < known else (1 + 0.02 * (width - 1)) / (1 + 0.02 * (known - 1))
