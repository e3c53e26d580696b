"""Decide who drafts, and how long: as long as the next token is expected to gain more than its time is worth.

Not handled: drafts with alternatives (trees), or with tokens of two models.
"""

from __future__ import annotations

import math
from bisect import bisect, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from river_compile.decoding.pass_times import PassTimes

# Sources of drafted tokens: the twins, a smaller model, the checkpoint's own MTP layers, or a copy from the context.
TWINS, ASSISTANT, MTP, LOOKUP = "river", "assistant", "mtp", "lookup"
# Upper edges of the bins of acceptance rates: nats of entropy, and tokens of the repeated ending.
ENTROPY_EDGES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0)
MATCH_EDGES = (2.5, 3.5, 4.5, 6.5, 9.5)
# Prior rates: exp(-entropy / 2), about that of 4-bit twins; longer repetitions continue more often.
_BY_ENTROPY = [math.exp(-(a + b) / 4) for a, b in zip((0.0, *ENTROPY_EDGES), (*ENTROPY_EDGES, 4.0), strict=True)]
_BY_MATCH = [0.15, 0.3, 0.5, 0.75, 0.9, 0.97]
_NEXT = 0.7  # of the next draft step, whose entropy is not known yet
_FROM_OTHER_TEXTS = 16.0  # verified tokens
_PRIOR_WEIGHT = 4.0
_MEMORY = 200.0  # verified tokens per bin after which older ones fade
_DECAY = 0.97  # per cycle without draft steps, of the learned rate
_SPEED_DECAY = 0.95  # per cycle, of the average speed
_SHORT = 1024  # tokens: the cache of shorter contexts takes little of a pass's time


class AcceptanceRate:
    """A running estimate of the acceptance rate of drafted tokens, in bins of a feature."""

    def __init__(self, edges: Sequence[float], prior: Sequence[float]) -> None:
        self._edges = tuple(edges)  # upper edges of the bins, ascending; the last bin has none
        self._prior = tuple(prior)  # the rate per bin
        self._accepted = [_PRIOR_WEIGHT * p for p in prior]
        self._verified = [_PRIOR_WEIGHT] * (len(edges) + 1)

    def probability(self, feature: float) -> float:
        """Return the acceptance rate of tokens with this feature."""
        i = bisect(self._edges, feature)
        return self._accepted[i] / self._verified[i]

    def learn(self, feature: float, accepted: bool) -> None:
        """Count one verified token."""
        i = bisect(self._edges, feature)
        if self._verified[i] >= _MEMORY:
            self._accepted[i], self._verified[i] = self._accepted[i] / 2, self._verified[i] / 2
        self._accepted[i] += accepted
        self._verified[i] += 1

    def cap_weight(self, most: float) -> None:
        """Cap each bin's weight at `most` tokens: another text may differ."""
        for i, verified in enumerate(self._verified):
            share = min(most / verified, 1.0)
            self._accepted[i], self._verified[i] = share * self._accepted[i], share * verified

    def decay(self) -> None:
        """Fade lower rates towards the prior, so that drafts which stopped paying are tried again."""
        for i, prior in enumerate(self._prior):
            if self._accepted[i] < prior * self._verified[i]:
                start = _PRIOR_WEIGHT * prior
                self._accepted[i] = start + _DECAY * (self._accepted[i] - start)
                self._verified[i] = _PRIOR_WEIGHT + _DECAY * (self._verified[i] - _PRIOR_WEIGHT)


class DraftToken(NamedTuple):
    """One drafted token."""

    token: int  # its id
    source: str  # `TWINS`, `ASSISTANT`, `MTP` or `LOOKUP`
    feature: float  # entropy in nats, or tokens of the repeated ending (lookup)
    probability: float  # of acceptance, if those before it are accepted


@dataclass
class Draft:
    """A draft in progress."""

    room: int  # most tokens that it may have
    tokens: list[DraftToken] = field(default_factory=list)
    prefixes: list[float] = field(default_factory=list)  # by token: the probability that all up to it are accepted
    steps: int = 0  # draft steps that ran
    source: str = ""  # whose steps they are
    copy: list[DraftToken] = field(default_factory=list)  # the continuation by prompt lookup
    behind: Mapping[str, int] = field(default_factory=dict)  # steps that a source runs first, by source
    longest: Mapping[str, int] = field(default_factory=dict)  # most steps of the sources that have a limit

    def room_for(self, source: str) -> int:
        """Return how many steps of a source may follow."""
        room = self.room - len(self.tokens)
        return min(room, self.longest[source] - self.steps) if source in self.longest else room

    def add(self, token: DraftToken) -> None:
        self.prefixes.append(token.probability * (self.prefixes[-1] if self.prefixes else 1.0))
        self.tokens.append(token)


class Plan(NamedTuple):
    """How a draft continues."""

    source: str  # whose steps run now
    steps: int  # 0: none, the draft is complete
    verified: int  # tokens to verify then: the draft's, and after them its copy's


class DraftLength:
    """Decides who drafts and how long; learns from cycle to cycle, and from call to call of one model."""

    # Not adaptive: as many tokens as there is room for, the same for the same text at any speed.
    def __init__(self, adaptive: bool = True) -> None:
        self._adaptive = adaptive
        self._rates = {source: AcceptanceRate(ENTROPY_EDGES, _BY_ENTROPY) for source in (TWINS, ASSISTANT, MTP)}
        self._next = {source: AcceptanceRate([], [_NEXT]) for source in self._rates}
        self._rates[LOOKUP] = AcceptanceRate(MATCH_EDGES, _BY_MATCH)
        self._widths: Sequence[int] = (1,)
        self._times = PassTimes()  # of passes in contexts of about this size
        self._times_by_size = {0: self._times}  # by how often a context must be halved to be short
        self._kept = self._seconds = 0.0  # emitted tokens and their time; earlier ones fade
        self._costs: list[float] | None = None  # of passes, in tokens

    def carry_over(
        self, widths: Sequence[int], context: int = 0, reads: Callable[[int], float] | None = None
    ) -> DraftLength:
        """Prepare for another text; earlier ones count little.

        Args:
            widths: of its verifying passes, ascending.
            context: tokens of its prompt.
            reads: the bytes of weights that a pass of a width reads, in those of one token; None: all read the same.
        """
        size, by_size = (context // _SHORT).bit_length(), self._times_by_size
        if size not in by_size:
            near = min(by_size, key=lambda known: abs(known - size))
            by_size[size] = PassTimes(by_size[near])
        self._times = by_size[size]
        self._times.set_reads(reads)
        self._widths, self._costs, self._kept, self._seconds = widths, None, 0.0, 0.0
        for rate in (*self._rates.values(), *self._next.values()):
            rate.cap_weight(_FROM_OTHER_TEXTS)
        return self

    def token(self, token: int, source: str, feature: float) -> DraftToken:
        """Return a drafted token with its acceptance probability."""
        return DraftToken(token, source, feature, self._rates[source].probability(feature))

    def plan(self, draft: Draft, sources: Sequence[str]) -> Plan:
        """Return how a draft continues, by a source that can run; the first of them where nothing else decides."""
        if draft.source:  # a draft has tokens of one source
            sources = [draft.source]
        if not self._adaptive:
            return self._by_room(draft, sources)
        unknown = [] if draft.source else [source for source in sources if not self._times.is_known(source)]
        plan = self._by_gain(draft, unknown or sources)
        tried = [source for source in unknown if draft.room_for(source)]
        # One that seems not to pay takes a single step a few times, since nothing else tells how often it holds.
        return Plan(tried[0], 1, 0) if tried and not (plan.steps or plan.verified) else plan

    def learn(self, draft: Draft, kept: Sequence[str], drafting: float, verifying: float) -> None:
        """Learn from a cycle: sources of the emitted tokens, and seconds of drafting and verifying."""
        for token, source in zip(draft.tokens, kept, strict=False):
            accepted = source == token.source
            self._rates[token.source].learn(token.feature, accepted)
            if token.source == draft.source:
                self._next[draft.source].learn(0.0, accepted)
        for source, rate in self._next.items():
            if source != draft.source:
                rate.decay()
        width = self._width(len(draft.tokens))
        steps = draft.steps + draft.behind.get(draft.source, 0)
        self._times.add(width, verifying)
        if draft.steps:
            self._times.add(draft.source, drafting / steps)
        self._times.end_cycle()
        self._kept = _SPEED_DECAY * self._kept + len(kept)
        took = self.seconds(width) + (steps * self.seconds(draft.source) if draft.steps else 0.0)
        self._seconds = _SPEED_DECAY * self._seconds + took
        self._costs = None

    def seconds(self, what: int | str) -> float:
        """Return the seconds of a pass by width, or of a source's draft step: the recent minimum, or an estimate."""
        return self._times.seconds(what)

    def _by_gain(self, draft: Draft, sources: Sequence[str]) -> Plan:
        # Maximizing tokens per second in the long run maximizes each cycle's tokens minus its time at the average
        # speed.
        passes = self._costs = self._costs or self._passes_in_tokens()
        drafted, likely = len(draft.tokens), [*draft.prefixes]
        for token in draft.copy:
            likely.append(token.probability * (likely[-1] if likely else 1.0))
        expected = [*accumulate(likely, initial=0.0)]  # accepted tokens, by tokens verified
        fill = [width - 1 for width in self._widths if width <= len(likely)]  # a pass has one of a few widths
        best, count = max((expected[n] - passes[n], n) for n in (*fill, len(likely)))
        plan = Plan("", 0, count)
        for source in sources:
            tokens, reach = expected[drafted], likely[drafted - 1] if drafted else 1.0
            chance, step = self._next[source].probability(0.0), self._worth * self.seconds(source)
            for more in range(1, draft.room_for(source) + 1):
                reach *= chance
                tokens += reach
                gain = tokens - more * step - passes[drafted + more]
                if gain > best:
                    best, plan = gain, Plan(source, more, count)
        return plan

    def _by_room(self, draft: Draft, sources: Sequence[str]) -> Plan:
        drafted = len(draft.tokens)
        for source in sources[:1] if sources and draft.room_for(sources[0]) else ():
            if not draft.copy or draft.copy[0].probability < self._next[source].probability(0.0):
                return Plan(source, draft.room_for(source), drafted)
        return Plan("", 0, self._width(drafted) - 1 if drafted else len(draft.copy))

    @property
    def _worth(self) -> float:
        """The average speed, in tokens a second."""
        return self._kept / self._seconds if self._seconds else 1 / self.seconds(1)

    def _passes_in_tokens(self) -> list[float]:
        """Return the cost of a pass by verified tokens, in tokens."""
        passes: list[float] = []
        for width in self._widths:
            passes += [self._worth * self.seconds(width)] * (width - len(passes))
        return passes

    def _width(self, drafted: int) -> int:
        return self._widths[bisect_right(self._widths, drafted)]


class DraftLengths(dict[tuple[bool, int], DraftLength]):
    """What a model's calls have learned about their drafts, by `do_sample` and the number of their assistant."""
