"""Decides how long to draft: as long as the next draft is expected to gain more than its time is worth.

Time is worth what it brings on average: the tokens kept per second so far. (To maximize tokens per second in the long
run is to maximize each cycle's tokens minus its seconds times that rate.) A draft step has a cost of its own; drafts
also make the verifying pass wider, whose widths are few, so what the next widths would bring is looked at as a whole.

Not handled: when drafts share their first tokens (trees).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
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
    """The draft of one row.

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

    def reaches_with(self, chances: Sequence[float]) -> list[float]:
        """Returns the reaches of the draft and of further tokens with these chances."""
        room = self.room - len(self.proposed)
        return [*self.reaches, *list(accumulate(chances[:room], mul, initial=self.reach))[1:]]


class DraftPolicy(Protocol):
    """Says after each draft step whether to go on."""

    def verify_now(self, rows: Sequence[RowDraft], drafted: int, river: float | None) -> int | None:
        """Returns how many tokens of each draft and its copy to verify, or None to draft another token first.

        Args:
            rows: those that are being generated.
            drafted: tokens of the longest draft.
            river: how likely the river's next token is to hold; None where it drafts none.
        """
        ...

    def note(self, tokens: int, steps: int, width: int) -> None:
        """Learns from a cycle: kept tokens, draft steps, and the width of its verification."""
        ...

    def take(self, times: PassTimes, share: float) -> None:
        """Goes on with passes of fewer rows: `share` of those before."""
        ...


class ByGain:
    """Drafts as long as it pays.

    Args:
        times: of the passes.
        width: the verification width for a number of drafted tokens.
        together: whether rows keep only what held for all of them.
    """

    def __init__(self, times: PassTimes, width: Callable[[int], int], together: bool) -> None:
        self._times, self._width, self._together = times, width, together
        self._kept = self._seconds = 0.0

    def verify_now(self, rows: Sequence[RowDraft], drafted: int, river: float | None) -> int | None:
        copied = [row.reaches_with([token.chance for token in row.copy]) for row in rows]
        stop, count = max(self._value(copied, n, 0) for n in self._ends(max(map(len, copied))))
        if river is None:
            return count
        most = max(row.room for row in rows)
        chances = [max(river, row.copy[0].chance if row.copy else 0.0) for row in rows]
        for more in range(1, most - drafted + 1):
            ahead = [row.reaches_with([chance] * more) for row, chance in zip(rows, chances, strict=True)]
            if self._value(ahead, drafted + more, more)[0] > stop:
                return None
        return count

    def note(self, tokens: int, steps: int, width: int) -> None:
        self._kept = _RATE_FADES_BY * self._kept + tokens
        self._seconds = _RATE_FADES_BY * self._seconds + self._cost(steps, width)

    def take(self, times: PassTimes, share: float) -> None:
        self._times = times
        self._kept *= share

    def _cost(self, steps: int, width: int) -> float:
        return steps * self._times.of(PassTimes.DRAFT) + self._times.of(width)

    def _ends(self, longest: int) -> list[int]:
        """Returns the draft lengths that fill a pass, up to the longest."""
        ends, n = [], 0
        while n < longest:
            ends.append(n)
            n = min(self._width(n + 1) - 1, longest)
        return [*ends, longest]

    def _value(self, reaches: Sequence[Sequence[float]], count: int, steps: int) -> tuple[float, int]:
        """Returns the tokens expected of `count` drafted ones, less what their time is worth, and `count`."""
        if self._together:
            tokens = len(reaches) * math.fsum(map(math.prod, zip(*(row[:count] for row in reaches), strict=False)))
        else:
            tokens = math.fsum(math.fsum(row[:count]) for row in reaches)
        seconds = self._cost(steps, self._width(count))
        per_second = self._kept / self._seconds if self._seconds else len(reaches) / self._times.of(1)
        return tokens - per_second * seconds, count


class ByChance:
    """Drafts until a draft's chance to hold in whole falls below a limit: the same for the same text, at any speed.

    Args:
        stop_below: the limit.
        width: the verification width for a number of drafted tokens.
    """

    def __init__(self, stop_below: float, width: Callable[[int], int]) -> None:
        self._stop_below, self._width = stop_below, width

    def verify_now(self, rows: Sequence[RowDraft], drafted: int, river: float | None) -> int | None:
        if river is not None and any(
            row.open and row.reach >= self._stop_below and not row.copies(river) for row in rows
        ):
            return None
        return self._width(drafted) - 1 if drafted else max(len(row.copy) for row in rows)

    def note(self, tokens: int, steps: int, width: int) -> None:
        pass  # nothing depends on it

    def take(self, times: PassTimes, share: float) -> None:
        pass
