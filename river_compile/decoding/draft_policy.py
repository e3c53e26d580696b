"""Decides how long to draft: as long as the next draft is expected to gain more than its time is worth.

Time is worth what it brings on average: the tokens kept per second so far. (To maximize tokens per second in the long
run is to maximize each cycle's tokens minus its seconds times that rate.) A draft step has a cost of its own; drafts
also make the verifying pass wider, whose widths are few, so what the next widths would bring is looked at as a whole.

Not handled: when drafts share their first tokens (trees).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, islice
from operator import mul
from typing import NamedTuple, Protocol

from river_compile.runtime.draft_stats import AcceptanceRate, PassTimes

_RATE_FADES_BY = 0.95  # what a cycle leaves of the average before it


class Proposed(NamedTuple):
    """One drafted token.

    Attributes:
        token: its id.
        source: "river" or "lookup".
        rate: what its chance is read from, by `evidence`.
    """

    token: int
    source: str
    rate: AcceptanceRate
    evidence: float

    @property
    def chance(self) -> float:
        """How likely it is to hold, given that those before it did."""
        return self.rate.chance(self.evidence)


@dataclass
class RowDraft:
    """A draft on its way.

    Attributes:
        room: most tokens that it may have.
        proposed: the tokens so far.
        reaches: how likely the draft is to hold up to each of them.
        copy: what a continuation from the context would add.
        reach: how likely the whole draft is to hold.
    """

    room: int
    proposed: list[Proposed] = field(default_factory=list)
    reaches: list[float] = field(default_factory=list)
    copy: list[Proposed] = field(default_factory=list)
    reach: float = 1.0

    @property
    def open(self) -> bool:
        """Whether another token may be added."""
        return len(self.proposed) < self.room

    def copies(self, river: float) -> bool:
        """Whether the continuation from the context is as likely to hold as the river's next token."""
        return bool(self.copy) and self.copy[0].chance >= river

    def add(self, proposed: Proposed) -> None:
        """Adds a token."""
        self.reach *= proposed.chance
        self.reaches.append(self.reach)
        self.proposed.append(proposed)


class DraftPolicy(Protocol):
    """Says after each draft step whether to go on."""

    def verify_now(self, draft: RowDraft, river: float) -> int | None:
        """Returns how many tokens of the draft and its copy to verify, or None to draft another token first.

        Args:
            draft: so far.
            river: how likely the river's next token is to hold.
        """
        ...

    def note(self, kept: int, steps: int, width: int) -> None:
        """Learns from a cycle: kept tokens, draft steps, and the width of its verification."""
        ...


class ByGain:
    """Drafts as long as it pays. What is not known is tried, which costs little.

    Args:
        times: of the passes.
        width: the verification width for a number of drafted tokens.
    """

    def __init__(self, times: PassTimes, width: Callable[[int], int]) -> None:
        self._times, self._width = times, width
        self._kept = self._seconds = 0.0  # tokens, and their time; earlier ones fade

    def verify_now(self, draft: RowDraft, river: float) -> int | None:
        seconds_of = functools.cache(self._times.of)
        worth = self._kept / self._seconds if self._seconds else 1 / seconds_of(1)  # tokens a second
        drafted, room = len(draft.proposed), draft.room - len(draft.proposed)

        def gain(tokens: float, steps: int, count: int) -> float:
            return tokens - worth * (steps * seconds_of(PassTimes.DRAFT) + seconds_of(self._width(count)))

        copied = accumulate((token.chance for token in draft.copy[:room]), mul, initial=draft.reach)
        expected = [*accumulate([*draft.reaches, *islice(copied, 1, None)], initial=0.0)]
        stop, count = max((gain(expected[n], 0, n), n) for n in self._ends(len(expected) - 1))
        chance = max(river, draft.copy[0].chance if draft.copy else 0.0)
        tokens, reach = expected[drafted], draft.reach
        for steps in range(1, room + 1):
            reach *= chance
            tokens += reach
            if gain(tokens, steps, drafted + steps) > stop:
                return None
        return count

    def note(self, kept: int, steps: int, width: int) -> None:
        times = self._times
        self._kept = _RATE_FADES_BY * self._kept + kept
        self._seconds = _RATE_FADES_BY * self._seconds + steps * times.of(PassTimes.DRAFT) + times.of(width)

    def _ends(self, longest: int) -> list[int]:
        """Returns the draft lengths that fill a pass, up to the longest."""
        ends, n = [], 0
        while n < longest:
            ends.append(n)
            n = min(self._width(n + 1) - 1, longest)
        return [*ends, longest]


class FixedLength:
    """Drafts as many tokens as there is room for, or copies: the same for the same text, at any speed.

    Args:
        width: the verification width for a number of drafted tokens.
    """

    def __init__(self, width: Callable[[int], int]) -> None:
        self._width = width

    def verify_now(self, draft: RowDraft, river: float) -> int | None:
        if draft.open and not draft.copies(river):
            return None
        return self._width(len(draft.proposed)) - 1 if draft.proposed else len(draft.copy)

    def note(self, kept: int, steps: int, width: int) -> None:
        pass  # nothing depends on it
