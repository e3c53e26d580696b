"""Drafts tokens for the backbone to verify: copied from the context if it repeats itself, else by the river.

A copied continuation costs nothing (:mod:`.lookup`); the river drafts token after token. Which of both a draft takes,
and how long it is, is decided by how likely the tokens are to hold (:mod:`.draft_policy`). That is learned while
generating: from the entropy of the river's distribution, or from the length of the repeated ending.

On a device that runs late the steps are queued one behind the other, each with the id that the one before it chose
there. What they chose is unknown until the pass that verifies it is queued too (:meth:`Drafter.read`), so how long to
draft is decided by how often the river's tokens hold on average, end tokens among them do not end a draft, and a draft
that the river has begun does not go on with a copy.

Not handled: batches, which decode without drafts; drafts with alternatives (trees).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from river_compile.decoding.draft_policy import DraftPolicy, Proposed, RowDraft
from river_compile.decoding.late import read, sent
from river_compile.decoding.lookup import SuffixAutomaton
from river_compile.distributed.ranks import ALONE, Ranks
from river_compile.kernels.native.load import entropies
from river_compile.runtime.draft_stats import DraftRates, PassTimes

_UNREAD = -1  # stands for a token that is known on the device alone


@dataclass(frozen=True)
class DraftStep:
    """How the river drafts one token further.

    Attributes:
        scores: ids ``[1, S]`` so far -> scores for the next token ``[1, V]``.
        choose: (scores ``[1, V]``, tokens drafted so far) -> the token ``[1]``.
    """

    scores: Callable[[Tensor], Tensor]
    choose: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Draft:
    """What is proposed.

    Attributes:
        tokens: of the draft.
        ids: the same ``[1, D]``.
        steps: that the river took.
        unread: what is not in `tokens` yet (:meth:`Drafter.read`): by step, its token and the entropy of what that was
            drawn from, None where it was copied.
    """

    tokens: list[Proposed]
    ids: Tensor
    steps: int
    unread: list[Tensor | None]


class Drafter:
    """Drafts for one text at a time; learns from verdict to verdict.

    Args:
        prompt_lookup: copy continuations from the context.
        rule: how long to draft.
        times: of passes, which it notes.
        ranks: that share the model; all of them go by the first one's entropies and times.
        rates: what is known of earlier drafts, and learns from these.
    """

    def __init__(
        self,
        prompt_lookup: bool,
        rule: DraftPolicy,
        times: PassTimes,
        ranks: Ranks = ALONE,
        rates: DraftRates | None = None,
    ) -> None:
        self._ranks = ranks
        self._rates = DraftRates() if rates is None else rates
        self._lookup = prompt_lookup
        self.rule, self._times = rule, times
        self._text: object = None
        self._length = 0  # of what was seen of the text

    def follow(self, text: object, ids_1S: Tensor, end_tokens: frozenset[int]) -> bool:
        """Begins to draft for a text, after any of whose end tokens a draft ends; returns whether its ids are news."""
        if text is self._text and ids_1S.shape[1] == self._length:
            return False
        self._text, self._length, self._end_tokens = text, ids_1S.shape[1], end_tokens
        self._index = SuffixAutomaton(ids_1S[0].tolist() if self._lookup else ())
        return True

    def extend(self, token: int) -> None:
        """Takes in a token that the text received."""
        self._length += 1
        if self._lookup:
            self._index.extend([token])

    def draft(self, ids_1S: Tensor, room: int, step: DraftStep, late: bool = False) -> Draft:
        """Proposes tokens that follow the text.

        Args:
            ids_1S: the ids so far.
            room: as many as can be verified and used.
            step: runs the river over the ids that it is given, one token further per call.
            late: whether the river's tokens are left on the device, for :meth:`read` to wait for.
        """
        draft, text, steps = RowDraft(room), ids_1S.shape[1], 0
        unread: list[Tensor | None] = []
        while True:
            if self._lookup and not (late and steps):
                draft.copy = self._continuation(draft)
            count = self.rule.verify_now(draft, self._rates.river.chance(0.0))
            if count is not None:
                break
            start = time.perf_counter()
            token_1 = self._go_on(ids_1S, draft, step, unread, late)
            ids_1S = torch.cat([ids_1S, token_1[:, None]], dim=-1)
            if not late:
                seconds = [time.perf_counter() - start]
                self._times.note(PassTimes.DRAFT, *(self._ranks.agree(seconds) if self._ranks.several else seconds))
            steps += 1
        for proposed in draft.copy[: max(count - steps, 0)]:
            draft.add(proposed)
        if not steps:
            self._rates.river.fade()
        copied = [proposed.token for proposed in draft.proposed[steps:]]
        ids_1D = ids_1S[:, text:]
        if copied:
            ids_1D = torch.cat([ids_1D, sent([copied], ids_1S.device)], dim=-1)
        return Draft(draft.proposed, ids_1D, steps, unread if late else [])

    def read(self, draft: Draft, *others: Tensor) -> list[list[float]]:
        """Waits for what a draft's steps chose, and puts it into the draft; returns the elements of other tensors,
        which are read with it."""
        steps = [i for i, values_2 in enumerate(draft.unread) if values_2 is not None]
        found = read(*(values_2 for values_2 in draft.unread if values_2 is not None), *others)
        for i, values in zip(steps, found, strict=False):
            draft.tokens[i] = self._by_river(*values)
        return found[len(steps) :]

    def note(self, kept: int, steps: int, width: int, seconds: float, drafting: float | None = None) -> None:
        """Learns from a cycle.

        Args:
            kept: tokens.
            steps: that the river took.
            width, seconds: of the verification.
            drafting: seconds of the steps, where they returned before they had run.
        """
        drafts = [(PassTimes.DRAFT, drafting / steps)] * steps if drafting is not None and steps else []
        self._times.note_all([*drafts, (width, seconds)])
        self.rule.note(kept, steps, width)

    def learn(self, proposed: Proposed, held: bool) -> None:
        """Takes in the verdict on a drafted token."""
        proposed.rate.learn(proposed.evidence, held)
        if proposed.source == "river":
            self._rates.river.learn(0.0, held)

    def _go_on(
        self, ids_1S: Tensor, draft: RowDraft, step: DraftStep, unread: list[Tensor | None], late: bool
    ) -> Tensor:
        """Adds a token to the draft, and returns it: a copied one if that is as likely to hold, else the river's."""
        scores_1V, drafted = step.scores(ids_1S), len(draft.proposed)
        values_2 = None
        if draft.copies(self._rates.river.chance(0.0)):
            proposed, *draft.copy = draft.copy
            token_1 = sent([proposed.token], ids_1S.device)
        else:
            draft.copy = []
            token_1 = step.choose(scores_1V, drafted)
            values_2 = torch.cat([token_1.double(), self._ranks.first(entropies(scores_1V)).double()])
            proposed = (
                Proposed(_UNREAD, "river", self._rates.river, 0.0) if late else self._by_river(*values_2.tolist())
            )
        unread.append(values_2)
        draft.add(proposed)
        if proposed.token in self._end_tokens:
            draft.room = len(draft.proposed)
        return token_1

    def _by_river(self, token: float, nats: float) -> Proposed:
        return Proposed(int(token), "river", self._rates.by_entropy, nats)

    def _continuation(self, draft: RowDraft) -> list[Proposed]:
        """Returns what follows a draft by the context."""
        if not draft.open:
            return []
        room = draft.room - len(draft.proposed)
        tokens, length = self._index.continuation(room, [p.token for p in draft.proposed])
        return [Proposed(token, "lookup", self._rates.by_match, length + i) for i, token in enumerate(tokens)]
