"""The decode loop. With drafts it is self-speculative decoding: draft, verify, keep what agrees, rewind.

    ids      ... a b        a cached, b kept but not cached
    draft    ... a b c d e  the river proposes c d e (its cache entries are freed again)
    verify   ... a b c d e  one backbone pass over b c d e writes exact entries and scores every position
    keep     ... a b c x    c agrees, d does not: x is the backbone's own token there; the slots of d e are freed

One row drafts. Several rows get a token each from every pass: a pass of several rows and tokens costs more than drafts
bring. Where all rows but one have ended, that one goes on alone, and drafts.

On a GPU with a static cache the next pass without drafts is queued before the host has read what the one before it
chose: its ids come from the device. Where a text turns out to have ended, the pass is taken back from the cache, and
nobody sees more of it than the report, which counts it.

    host     choose t | queue step t+1 | read token t, streamer | choose t+1 | queue step t+2 | ...
    device   ........ step t ......... | ................... step t+1 ................... | ...

With drafts a cycle on a GPU is queued as a whole, and then waited for once:

    host     queue draft c, d, e | queue verify | read c d e, their entropies, the backbone's choices | keep
    device   ... c ... d ... e ... verify ......................................................... |

What processors or random numbers choose is read after that, position by position.

The rows may be those of one call of generate, or of several that come and go (:mod:`.continuous`). What becomes of a
row's logits is its call's affair (:mod:`.request`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from river_compile.decoding.drafter import Drafter, DraftStep
from river_compile.decoding.late import coming, mark, seconds_between
from river_compile.decoding.request import Request
from river_compile.decoding.session import Session
from river_compile.distributed.ranks import ALONE, Ranks
from river_compile.runtime.stats import CycleRecord


@dataclass
class DecodeLoop:
    """Generates until every row has ended.

    Attributes:
        session: runs the passes.
        drafter: proposes tokens; None for a loop without drafts.
        ranks: that share the model; all of them go by what the first one's clock says.
        clock: seconds, from wherever.
        shared: whether rows are of several calls, each of one row, which come and go: an error ends its call alone, by
            :meth:`Request.fail`.
        requests: those whose rows are the batch, in its order.
    """

    session: Session
    drafter: Drafter | None
    ranks: Ranks = ALONE
    clock: Callable[[], float] = time.perf_counter
    shared: bool = False
    requests: list[Request] = field(default_factory=list)
    _queued: Tensor | None = None  # logits of the next step, which runs already

    def run(self, request: Request, first_logits: Tensor) -> Tensor:
        """Generates one call's texts from its prompt's last logits ``[B, 1, V]`` on; returns all ids ``[B, S]``."""
        self.admit(request, first_logits)
        while request.runs:
            self.advance()
        self._take_back()
        return request.finish()

    def admit(self, request: Request, first_logits: Tensor) -> None:
        """Takes in a call whose prompt has run, by its last logits; its rows are the last ones of the batch."""
        self.requests.append(request)
        self._give(first_logits[:, -1], [request])
        self.drop_finished()

    def advance(self) -> None:
        """Gives every row one token or more, and lets rows leave that have ended."""
        self.session.make_room(max(request.tokens_left for request in self.requests))
        if self._drafts:
            self._cycle()
        else:
            self._step()
        self.drop_finished()

    @property
    def _drafts(self) -> bool:
        return self.drafter is not None and sum(len(request.rows) for request in self.requests) == 1

    def _step(self) -> None:
        """Gives every row one token more."""
        logits, self._queued = self._queued, None
        if logits is None:
            logits = self.session.step(self._ids())
        self._give(logits[:, -1], self.requests)

    def _give(self, logits_NV: Tensor, requests: Sequence[Request]) -> None:
        """Gives these calls' rows a token each, by their logits."""
        chosen, first = [], 0
        for request in requests:
            count = len(request.rows)
            tokens = self._guarded(request, request.choose, logits_NV[first : first + count])
            chosen.append((request, None if tokens is None else coming(tokens)))
            first += count
        if not self.shared:
            self._queue_next(requests[0])
        for request, tokens in chosen:
            if tokens is not None:
                self._guarded(request, request.end, tokens())

    def _guarded(self, request: Request, do: Callable[..., Any], *args: Any) -> Any:
        """Does a part of a call's work; an error in it ends that call alone where others share the batch."""
        if not self.shared:
            return do(*args)
        try:
            return do(*args)
        except Exception as error:
            request.fail(error)
            return None

    def _queue_next(self, request: Request) -> None:
        """Runs the next step before it is known that some text goes on, if that saves time and can be undone."""
        session = self.session
        may_queue = session.runs_late and session.can_take_back and not (self._drafts or self.ranks.several)
        if may_queue and request.tokens_left:
            self._queued = session.step(self._ids())

    def _take_back(self) -> None:
        """Frees the entries of a step that was queued, and is not needed."""
        if self._queued is not None:
            self.session.rewind(1)
            self._queued = None

    def _cycle(self) -> None:
        """Gives the one row the tokens of its draft that hold, and one more."""
        session, drafter, (request,), ids = self.session, self.drafter, self.requests, self._ids()
        assert drafter is not None, "a loop without drafts takes steps"
        if drafter.follow(request, ids, request.end_tokens):
            session.begin_drafts(ids)
        late, start, began = session.runs_late, self.clock(), mark(ids.device)
        room = max(min(session.longest_draft, request.tokens_left - 1), 0)
        draft = drafter.draft(ids, room, DraftStep(self._draft_scores, request.choose_draft), late=late)
        session.rewind(draft.steps)
        drafted, drafted_at = draft.ids.shape[1], mark(ids.device)
        width = session.width_for(drafted)
        logits = session.verify(torch.cat([ids, draft.ids], dim=-1), drafted)
        verified_at = mark(ids.device)
        best: list[int] = []
        if late:
            chosen = [self.ranks.first(logits.argmax(-1))] if request.is_greedy else []
            best = [int(token) for tokens in drafter.read(draft, *chosen) for token in tokens]
        sources = self._guarded(request, request.settle, logits, draft.tokens, drafter, best) or ()
        session.rewind(width - len(sources))  # (the last kept token has no slot yet, as in plain generation)
        end = self.clock()
        took = seconds_between(began, drafted_at), seconds_between(drafted_at, verified_at)
        drafting, verifying, keeping = self.ranks.agree([*took, max(end - start - sum(took), 0.0)])
        if not sources:  # (the call's own code raised)
            return
        drafter.note(len(sources), draft.steps, width, verifying + keeping, drafting if late else None)
        session.stats.count_cycle(
            CycleRecord(
                drafted=tuple(token.source for token in draft.tokens),
                kept=sources,
                width=width,
                seconds=(drafting, verifying, keeping),
                thread=threading.get_ident(),
                model=session.stats.model_id,
            )
        )

    def drop_finished(self) -> None:
        """Takes rows that have ended out of the batch: calls of a shared one, and all where one row is left to draft.

        The last rows come in the places of those that left, so that no others move.
        """
        running = [(request, row) for request in self.requests for row in request.rows if request.active[row]]
        places = [request.active[row] for request in self.requests for row in request.rows]
        if all(places) or not (self.shared or self._should_shrink(running)):
            return
        stay = [place for place, active in enumerate(places) if active]
        order, last = [*range(len(stay))], [place for place in stay if place >= len(stay)]
        for place in order:
            if place not in stay:
                order[place] = last.pop()
        self._take_back()
        if self.shared:
            self.requests = [self.requests[place] for place in order]
        else:
            self.requests[0].rows = [running[0][1]]
        self.session.select(order)

    def _should_shrink(self, running: Sequence[tuple[Request, int]]) -> bool:
        """Whether the last row of a call goes on alone."""
        if self.drafter is None or len(running) != 1:
            return False
        request, _ = running[0]
        return request.rows_are_independent and self.session.should_shrink(request.tokens_left)

    def _ids(self) -> Tensor:
        """Returns the batch's ids ``[B, S]``, which end together, S being those of the longest row."""
        if len(self.requests) == 1:
            return self.requests[0].ids
        return pad_sequence([request.ids[0] for request in self.requests], True, padding_side="left")

    def _draft_scores(self, ids_1S: Tensor) -> Tensor:
        """Runs the river over ids, of which those behind the text are drafted; returns scores ``[1, V]``."""
        return self.requests[0].draft_scores(ids_1S, self.session.draft_step(ids_1S).float())
