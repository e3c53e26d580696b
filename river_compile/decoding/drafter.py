"""Drafts tokens for the backbone to verify: copied from the context if it repeats itself, else by the river.

A copied continuation costs nothing (:mod:`.lookup`); the river drafts token after token. Which of both a row takes, and
how long it drafts, is decided by how likely the tokens are to hold (:mod:`.draft_policy`). That is learned while
generating: from the entropy of the river's distribution, or from the length of the repeated ending.

Every row has a draft of its own length; a step of the river is a pass of the whole batch. On a device that runs late
the steps are queued one behind the other, each with the ids that the one before it chose there. What they chose is
unknown until the pass that verifies it is queued too (:meth:`Drafter.read`), so how long to draft is decided by how
often the river's tokens hold on average, end tokens among them do not end a draft, and a row for which the river has
drafted does not go on with a copy.

Not handled: drafts with alternatives (trees).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from river_compile.decoding.draft_policy import DraftPolicy, Proposed, RowDraft
from river_compile.decoding.late import put_together, read, sent
from river_compile.decoding.lookup import SuffixAutomaton
from river_compile.distributed.ranks import ALONE, Ranks
from river_compile.kernels.native.load import entropies
from river_compile.runtime.draft_stats import AcceptanceRate, DraftRates, PassTimes

_UNREAD = -1  # stands for a token that is known on the device alone


class Drawn(NamedTuple):
    """What a step of the river chose.

    Attributes:
        step: its number in the cycle.
        rows: for which it did.
        values_2N: their tokens, and the entropies of what these were drawn from.
    """

    step: int
    rows: Sequence[Hashable]
    values_2N: Tensor


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
    """What is proposed for each row of a batch.

    Attributes:
        rows: the tokens of each row, in the batch's order.
        ids: the same ``[B, D]``, D being those of the longest row; filler stands after shorter ones.
        steps: that the river took.
        unread: what is not in `rows` yet (:meth:`Drafter.read`).
    """

    rows: dict[Hashable, list[Proposed]]
    ids: Tensor
    steps: int
    unread: list[Drawn]


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

    def draft(
        self,
        ids_BS: Tensor,
        rooms: Mapping[Any, int | None],
        step: DraftStep,
        late: bool = False,
    ) -> Draft:
        """Proposes tokens for each row of the batch.

        Args:
            ids_BS: the ids so far, aligned to their ends.
            rooms: by row, in the batch's order, as many as can be verified and used; None for rows that have ended.
            step: runs the river over the ids that it is given, one token further per call.
            late: whether the river's tokens are left on the device, for :meth:`read` to wait for.
        """
        rows = {i: RowDraft(room or 0) for i, room in rooms.items()}
        running = [i for i, room in rooms.items() if room is not None]
        text, steps = ids_BS.shape[1], 0
        unread: list[Drawn] = []
        while True:
            for i in running if self._lookup and not (late and steps) else ():
                rows[i].copy = self._continuation(i, rows[i])
            count = self.rule.verify_now([rows[i] for i in running], steps, self._rates.river.chance(0.0))
            if count is not None:
                break
            start = time.perf_counter()
            column_B = self._go_on(ids_BS, rows, running, step, steps, unread if late else None)
            ids_BS = torch.cat([ids_BS, column_B[:, None]], dim=-1)
            if not late:
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
        drafts = {i: row.proposed for i, row in rows.items()}
        ids_BD = self._with_copies(ids_BS[:, text:], [*drafts.values()])
        return Draft(drafts, ids_BD, steps, unread)

    def read(self, draft: Draft, *others: Tensor) -> list[list[float]]:
        """Waits for what a draft's steps chose, and puts it into its rows; returns the elements of other tensors, which
        are read with it."""
        found = read(*(drawn.values_2N for drawn in draft.unread), *others)
        for drawn, values in zip(draft.unread, found, strict=False):
            for i, proposed in zip(drawn.rows, self._proposed(values), strict=True):
                if drawn.step < len(draft.rows[i]):
                    draft.rows[i][drawn.step] = proposed
        return found[len(draft.unread) :]

    def note(
        self, kept: Mapping[Any, int], steps: int, width: int, seconds: float, drafting: float | None = None
    ) -> None:
        """Learns from a cycle.

        Args:
            kept: tokens of each row.
            steps: that the river took.
            width, seconds: of the verification.
            drafting: seconds of the steps, where they returned before they had run.
        """
        drafts = [(PassTimes.DRAFT, drafting / steps)] * steps if drafting is not None and steps else []
        self._times.note_all([*drafts, (width, seconds)])
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
        self,
        ids_BS: Tensor,
        rows: Mapping[Hashable, RowDraft],
        running: Sequence[Any],
        step: DraftStep,
        steps: int,
        unread: list[Drawn] | None,
    ) -> Tensor:
        """Adds a token to each open draft: a copied one if that is as likely to hold, else the river's.

        Returns:
            The tokens ``[B]``, filler for other rows. Where `unread` is a list, the river's are left to it.
        """
        river = self._rates.river.chance(0.0)
        copying = [i for i in running if rows[i].open and rows[i].copies(river)]
        asking = [i for i in running if rows[i].open and i not in copying]
        scores_NV = step.scores(ids_BS, asking, steps)
        for i in copying:
            first, *rows[i].copy = rows[i].copy
            rows[i].add(first)
        tokens_N = scores_NV.new_zeros(0)
        if asking:
            tokens_N = step.choose(scores_NV, asking, steps)
            values_2N = torch.stack([tokens_N.double(), self._ranks.first(entropies(scores_NV)).double()])
            if unread is None:
                chosen = self._proposed(*read(values_2N))
            else:
                unread.append(Drawn(steps, asking, values_2N))
                chosen = [Proposed(_UNREAD, "river", self._rates.river, 0.0)] * len(asking)
            for i, proposed in zip(asking, chosen, strict=True):
                rows[i].copy = []
                rows[i].add(proposed)
        for i in copying if unread is not None else (*copying, *asking):
            if rows[i].proposed[-1].token in self._ends[i]:
                rows[i].room = len(rows[i].proposed)
        if len(asking) == len(rows):
            return tokens_N
        known = {i: rows[i].proposed[-1].token if i in copying else self._pad_token for i in rows if i not in asking}
        places = {i: place for place, i in enumerate(rows)}
        parts = [([places[i] for i in known], sent([*known.values()], ids_BS.device))]
        return put_together([*parts, ([places[i] for i in asking], tokens_N)] if asking else parts)

    def _proposed(self, values: Sequence[float]) -> list[Proposed]:
        """Returns the river's tokens, given N ids and N entropies."""
        count = len(values) // 2
        pairs = zip(values[:count], values[count:], strict=True)
        return [Proposed(int(token), "river", self._rates.by_entropy, nats) for token, nats in pairs]

    def _with_copies(self, ids_BD: Tensor, drafts: Sequence[Sequence[Proposed]]) -> Tensor:
        """Returns the ids of drafts, given those of the steps: copies may go on behind them."""
        steps, longest = ids_BD.shape[1], max(map(len, drafts))
        if longest <= steps:
            return ids_BD[:, :longest]
        more = [[p.token for p in draft[steps:]] for draft in drafts]
        filled = [tokens + [self._pad_token] * (longest - steps - len(tokens)) for tokens in more]
        return torch.cat([ids_BD, sent(filled, ids_BD.device)], dim=-1)

    def _continuation(self, row: Hashable, draft: RowDraft) -> list[Proposed]:
        """Returns what follows a draft by the context."""
        if not draft.open:
            return []
        room = draft.room - len(draft.proposed)
        tokens, length = self._indices[row].continuation(room, [p.token for p in draft.proposed])
        return [Proposed(token, "lookup", self._rates.by_match, length + i) for i, token in enumerate(tokens)]
