"""Decides how long to draft: as long as the next draft is expected to gain more than its time is worth.

Time is worth what it brings on average: the tokens kept per second so far. (To maximize tokens per second in the long
run is to maximize each cycle's tokens minus its seconds times that rate.) A draft step has a cost of its own; drafts
also make the verifying pass wider, whose widths are few, so what the next widths would bring is looked at as a whole.

Not handled: when drafts share their first tokens (trees).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from operator import mul
from typing import Any, NamedTuple, Protocol

from river_compile.runtime.draft_stats import AcceptanceRate, PassTimes

_RATE_FADES_BY = 0.95  # what a cycle leaves of the average before it
_RISKED = 0.005  # of a batch's time
_LENT = 1.0  # passes that the last row of a batch may be behind: drafts hold by chance
_MOST_LEAD = 4.0  # passes that count


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

    def verify_now(self, rows: Sequence[RowDraft], drafted: int, river: float) -> int | None:
        """Returns how many tokens of each draft and its copy to verify, or None to draft another token first.

        Args:
            rows: those that are being generated.
            drafted: tokens of the longest draft.
            river: how likely the river's next token is to hold.
        """
        ...

    def note(self, kept: Mapping[Any, int], steps: int, width: int) -> None:
        """Learns from a cycle: tokens that each row kept, draft steps, and the width of its verification."""
        ...

    def take(self, times: PassTimes) -> None:
        """Goes on with passes of another number of rows."""
        ...


class ByGain:
    """Drafts as long as it pays.

    One row tries what it does not know, which costs it little. Wide passes of many rows are dear, so a batch goes by
    what they take at most, and every row is to be as far as it would be without drafts: what is risked, and what is
    lost where drafts hold less often than was thought, comes out of the lead of the last row, and of half a hundredth
    of the time.

    Args:
        times: of the passes.
        width: the verification width for a number of drafted tokens.
        together: whether rows keep only what held for all of them.
    """

    def __init__(self, times: PassTimes, width: Callable[[int], int], together: bool) -> None:
        self._times, self._width, self._together = times, width, together
        self._kept = self._seconds = 0.0  # tokens of a row, and their time; earlier ones fade
        self._leads: dict[Hashable, float] = {}  # of the rows: tokens that drafts brought less passes that they took
        self._least = 0.0  # of them

    def verify_now(self, rows: Sequence[RowDraft], drafted: int, river: float) -> int | None:
        if self._times.at_most(1) == math.inf:
            return 0  # (a batch waits for what it takes without drafts)
        prices = functools.cache(self._prices)
        one, lead = self._times.of(1), self._times.lead
        worth = len(rows) * (self._kept / self._seconds if self._seconds else 1 / one)  # tokens a second

        def gain(tokens: float, steps: int, count: int) -> float:
            (draft, draft_at_most), (verify, verify_at_most) = prices(PassTimes.DRAFT), prices(self._width(count))
            seconds, at_most = steps * draft + verify, steps * draft_at_most + verify_at_most
            if at_most > seconds and at_most > (1 + lead) * one:
                seconds = at_most  # (it is not known, and trying it is too much)
            if steps + count and seconds + drafted * draft > (1 + lead + _LENT) * one:
                return -math.inf
            return tokens - worth * seconds

        copied = self._expected([row.reaches_with([token.chance for token in row.copy]) for row in rows])
        stop, count = max((gain(copied[n], 0, n), n) for n in self._ends(len(copied) - 1))
        chances = [max(river, row.copy[0].chance if row.copy else 0.0) for row in rows]
        tokens = self._expected([row.reaches for row in rows])[-1]
        for steps, held in enumerate(self._held(rows, chances, drafted), 1):
            tokens += held
            if gain(tokens, steps, drafted + steps) > stop:
                return None
        return count

    def note(self, kept: Mapping[Any, int], steps: int, width: int) -> None:
        times = self._times
        self._kept = _RATE_FADES_BY * self._kept + sum(kept.values()) / len(kept)
        self._seconds = _RATE_FADES_BY * self._seconds + steps * times.of(PassTimes.DRAFT) + times.of(width)
        if times.rows == 1 or times.at_most(1) == math.inf:
            return
        passes = (steps * times.typical(PassTimes.DRAFT) + times.typical(width)) / times.typical(1)
        drafted = steps > 0 or width > 1
        self._leads = {
            row: self._leads.get(row, self._least) + (tokens - passes if drafted else 0.0)
            for row, tokens in kept.items()
        }
        before, self._least = self._least, min(self._leads.values(), default=self._least)
        times.lead = min(max(times.lead + self._least - before + _RISKED, -_LENT), _MOST_LEAD)

    def take(self, times: PassTimes) -> None:
        self._times = times

    def _prices(self, kind: int | str) -> tuple[float, float]:
        """Returns the seconds that a pass is thought to take, and those that it may take."""
        seconds = self._times.of(kind)
        return seconds, seconds if kind == 1 else self._times.at_most(kind)

    def _ends(self, longest: int) -> list[int]:
        """Returns the draft lengths that fill a pass, up to the longest."""
        ends, n = [], 0
        while n < longest:
            ends.append(n)
            n = min(self._width(n + 1) - 1, longest)
        return [*ends, longest]

    def _expected(self, reaches: Sequence[Sequence[float]]) -> list[float]:
        """Returns how many tokens are expected to hold of the first 0, 1, 2 ... of each draft."""
        if self._together:
            columns = [len(reaches) * math.prod(column) for column in zip(*reaches, strict=False)]
        else:
            columns = [math.fsum(column) for column in zip_longest(*reaches, fillvalue=0.0)]
        return [*accumulate(columns, initial=0.0)]

    def _held(self, rows: Sequence[RowDraft], chances: Sequence[float], drafted: int) -> Iterator[float]:
        """Yields how many of the drafts' next tokens are expected to hold, where each does with its row's chance."""
        reaches = [row.reach for row in rows]
        for count in range(drafted + 1, max(row.room for row in rows) + 1):
            reaches = [reach * chance for reach, chance in zip(reaches, chances, strict=True)]
            if self._together:
                yield len(rows) * math.prod(reaches) if all(count <= row.room for row in rows) else 0.0
            else:
                yield math.fsum(reach for reach, row in zip(reaches, rows, strict=True) if count <= row.room)


class FixedLength:
    """Drafts as many tokens as there is room for, or copies: the same for the same text, at any speed.

    Args:
        width: the verification width for a number of drafted tokens.
    """

    def __init__(self, width: Callable[[int], int]) -> None:
        self._width = width

    def verify_now(self, rows: Sequence[RowDraft], drafted: int, river: float) -> int | None:
        if any(row.open and not row.copies(river) for row in rows):
            return None
        return self._width(drafted) - 1 if drafted else max(len(row.copy) for row in rows)

    def note(self, kept: Mapping[Any, int], steps: int, width: int) -> None:
        pass  # nothing depends on it

    def take(self, times: PassTimes) -> None:
        pass
