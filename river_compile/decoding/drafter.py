"""Drafts tokens for the backbone to verify: copied from the context if it repeats itself, else by the river.

A copied continuation costs nothing (:mod:`.lookup`); the river drafts token after token. Which of both a row takes, and
how long it drafts, is decided by how likely the tokens are to hold (:mod:`.draft_policy`). That is learned while
generating: from the entropy of the river's distribution, or from the length of the repeated ending.

Every row has a draft of its own length; a step of the river is a pass of the whole batch. Not handled: drafts with
alternatives (trees).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from river_compile.decoding.draft_policy import DraftPolicy, Proposed, RowDraft
from river_compile.decoding.lookup import SuffixAutomaton
from river_compile.distributed.ranks import ALONE, Ranks
from river_compile.kernels.native.load import entropy
from river_compile.runtime.draft_stats import AcceptanceRate, DraftRates, PassTimes


@dataclass(frozen=True)
class DraftStep:
    """How the river drafts one token further.

    Attributes:
        scores: (aligned ids of the batch ``[B, S]``, rows, tokens drafted so far) -> scores for the next tokens of
            these rows ``[N, V]``.
        choose: (scores ``[N, V]``, rows, tokens drafted so far) -> tokens ``[N]``.
    """

    scores: Callable[[Tensor, Sequence[Any], int], Tensor]
    choose: Callable[[Tensor, Sequence[Any], int], Tensor]


@dataclass(frozen=True)
class Draft:
    """What is proposed for each row of a batch, in its order, and how many steps the river took for it."""

    rows: dict[Hashable, list[Proposed]]
    steps: int = 0

    @property
    def longest(self) -> int:
        return max(map(len, self.rows.values()))

    def columns(self, filler: Tensor) -> Tensor:
        """Returns the tokens ``[B, longest]``; shorter drafts end with their row's filler ``[B]``."""
        longest = self.longest
        ends = filler.tolist()
        tokens = [
            [p.token for p in row] + [end] * (longest - len(row))
            for row, end in zip(self.rows.values(), ends, strict=True)
        ]
        return filler.new_tensor(tokens).reshape(len(ends), longest)


class Drafter:
    """Drafts for the rows of a batch; learns from verdict to verdict.

    Args:
        prompt_lookup: copy continuations from the context.
        rule: how long to draft.
        times: of passes, which it notes.
        together: rows keep only what held for all of them, so drafts have the length of the shortest.
        pad_token: stands in for the tokens of rows that draft nothing more.
        ranks: that share the model; all of them go by the first one's entropies and times.
        rates: what is known of earlier drafts, and learns from these.
    """

    def __init__(
        self,
        prompt_lookup: bool,
        rule: DraftPolicy,
        times: PassTimes,
        together: bool,
        pad_token: int,
        ranks: Ranks = ALONE,
        rates: DraftRates | None = None,
    ) -> None:
        self._ranks = ranks
        self._rates = DraftRates() if rates is None else rates
        self._lookup = prompt_lookup
        self._indices: dict[Hashable, SuffixAutomaton] = {}
        self._ends: dict[Hashable, frozenset[int]] = {}
        self.rule, self._times, self._together = rule, times, together
        self._pad_token = pad_token

    def admit(self, rows: Sequence[Hashable], prompts_NS: Tensor, end_tokens: frozenset[int]) -> None:
        """Takes in rows by their prompts; their drafts end after any of the end tokens."""
        self._ends |= dict.fromkeys(rows, end_tokens)
        if self._lookup:
            self._indices |= {row: SuffixAutomaton(ids) for row, ids in zip(rows, prompts_NS.tolist(), strict=True)}

    def leave(self, rows: Iterable[Hashable]) -> None:
        """Forgets rows that have ended."""
        for row in rows:
            del self._ends[row]
            self._indices.pop(row, None)

    def extend(self, rows: Sequence[Hashable], tokens: Sequence[int]) -> None:
        """Takes in a token that each of these rows received."""
        for row, token in zip(rows, tokens, strict=True) if self._lookup else ():
            self._indices[row].extend([token])

    def draft(self, ids_BS: Tensor, rooms: Mapping[Any, int | None], step: DraftStep, river: bool = True) -> Draft:
        """Proposes tokens for each row of the batch.

        Args:
            ids_BS: the ids so far, aligned to their ends.
            rooms: by row, in the batch's order, as many as can be verified and used; None for rows that have ended.
            step: runs the river over the ids that it is given, one token further per call.
            river: whether it drafts at all, or the context alone.
        """
        rows = {i: RowDraft(room or 0) for i, room in rooms.items()}
        running = [i for i, room in rooms.items() if room is not None]
        steps = 0
        while True:
            for i in running if self._lookup else ():
                rows[i].copy = self._continuation(i, rows[i])
            chance = self._rates.river.chance(0.0) if river else None
            count = self.rule.verify_now([rows[i] for i in running], steps, chance)
            if count is not None:
                break
            start = time.perf_counter()
            column = self._go_on(ids_BS, rows, running, step, steps)
            ids_BS = torch.cat([ids_BS, ids_BS.new_tensor(column)[:, None]], dim=-1)
            seconds = [time.perf_counter() - start]
            self._times.note(PassTimes.DRAFT, *(self._ranks.agree(seconds) if self._ranks.several else seconds))
            steps += 1
        for i in running:
            for proposed in rows[i].copy[: max(count - len(rows[i].proposed), 0)]:
                rows[i].add(proposed)
        if self._together:
            shortest = min(len(rows[i].proposed) for i in running)
            for i, row in rows.items():
                pads = [Proposed(self._pad_token, "river", AcceptanceRate([], [1.0]), 0.0)] * shortest
                row.proposed = row.proposed[:shortest] if i in running else pads
        if not steps:
            self._rates.river.fade()
        return Draft({i: row.proposed for i, row in rows.items()}, steps)

    def note(self, kept: Mapping[Any, int], steps: int, width: int, seconds: float) -> None:
        """Learns from a cycle: tokens that each row kept, draft steps, width and time of its verification."""
        self._times.note(width, seconds)
        self.rule.note(kept, steps, width)

    def take(self, times: PassTimes) -> None:
        """Goes on with passes of another number of rows."""
        self._times = times
        self.rule.take(times)

    def learn(self, proposed: Proposed, held: bool) -> None:
        """Takes in the verdict on a drafted token."""
        proposed.rate.learn(proposed.evidence, held)
        if proposed.source == "river":
            self._rates.river.learn(0.0, held)

    def _go_on(
        self, ids_BS: Tensor, rows: Mapping[Hashable, RowDraft], running: Sequence[Any], step: DraftStep, steps: int
    ) -> list[int]:
        """Adds a token to each open draft: a copied one if that is as likely to hold, else the river's."""
        river = self._rates.river.chance(0.0)
        copying = {i for i in running if rows[i].open and rows[i].copies(river)}
        asking = [i for i in running if rows[i].open and i not in copying]
        scores_NV = step.scores(ids_BS, asking, steps)
        for i in copying:
            rows[i].add(rows[i].copy[0])
        if asking:
            tokens = step.choose(scores_NV, asking, steps).tolist()
            entropies: Sequence[float] = [entropy(scores) for scores in scores_NV]
            if self._ranks.several:
                entropies = self._ranks.agree(entropies)
            for i, token, nats in zip(asking, tokens, entropies, strict=True):
                rows[i].add(Proposed(token, "river", self._rates.by_entropy, nats))
        column = dict.fromkeys(rows, self._pad_token)
        for i in (*copying, *asking):
            column[i] = rows[i].proposed[-1].token
            if column[i] in self._ends[i]:
                rows[i].room = len(rows[i].proposed)
        return list(column.values())

    def _continuation(self, row: Hashable, draft: RowDraft) -> list[Proposed]:
        """Returns what follows a draft by the context."""
        if not draft.open:
            return []
        room = draft.room - len(draft.proposed)
        tokens, length = self._indices[row].continuation(room, [p.token for p in draft.proposed])
        return [Proposed(token, "lookup", self._rates.by_match, length + i) for i, token in enumerate(tokens)]
