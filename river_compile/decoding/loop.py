"""The decode loop. With drafts it is self-speculative decoding: draft, verify, keep what agrees, rewind.

    ids      ... a b        a cached, b kept but not cached
    draft    ... a b c d e  the river proposes c d e (its cache entries are freed again)
    verify   ... a b c d e  one backbone pass over b c d e writes exact entries and scores every position
    keep     ... a b c x    c agrees, d does not: x is the backbone's own token there; the slots of d e are freed

Each row of a batch keeps what held for it. Rows that fell behind stand further right in the shared cache: all rows end
in the same slot, and what one lacks to the longest is padding before it.

    row 0    a b c x        kept two tokens
    row 1    . f g h        kept one, so it moved a slot to the right

Rows that have ended leave the batch once they are a quarter of it, so that passes and cache become smaller, where that
saves more time than a smaller batch's graphs take to compile.

Without drafts each cycle is one pass that gives every row a token. On a GPU with a static cache that pass is queued
before the host has read what the one before it chose: its ids come from the device. Where a text turns out to have
ended, the pass is taken back from the cache, and nobody sees more of it than the report, which counts it.

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
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from river_compile.decoding.draft_policy import Proposed
from river_compile.decoding.drafter import Drafter, DraftStep
from river_compile.decoding.late import at, coming, mark, put_together, seconds_between
from river_compile.decoding.request import Request
from river_compile.decoding.session import Session
from river_compile.distributed.ranks import ALONE, Ranks
from river_compile.runtime.stats import CycleRecord, RowCycle

Row = tuple[Request, int]

_STAY = 0.75  # share of a batch that must still run for those that have ended to stay in it


@dataclass
class DecodeLoop:
    """Generates until every row has ended.

    Attributes:
        session: runs the passes.
        drafter: proposes tokens; None for a loop without drafts.
        ranks: that share the model; all of them go by what the first one's clock says.
        clock: seconds, from wherever.
        shared: whether rows are of several calls, which come and go: rows that have ended leave at once, and an error
            ends its call alone, by :meth:`Request.fail`.
        rows: those in the batch, in its order, each as its call and its number there.
    """

    session: Session
    drafter: Drafter | None
    ranks: Ranks = ALONE
    clock: Callable[[], float] = time.perf_counter
    shared: bool = False
    rows: list[Row] = field(default_factory=list)
    _queued: Tensor | None = None  # logits of the next step, which runs already

    def run(self, request: Request, first_logits: Tensor) -> Tensor:
        """Generates one call's texts from its prompt's last logits ``[B, 1, V]`` on; returns all ids ``[B, S]``."""
        self.admit(request, first_logits)
        while request.texts.running:
            self.advance()
        if self._queued is not None:
            self.session.rewind(1)
        return request.finish()

    def admit(self, request: Request, first_logits: Tensor) -> None:
        """Takes in a call whose prompt has run, by its last logits; its rows are the last ones of the batch."""
        numbers = request.texts.running
        new = [(request, row) for row in numbers]
        self.rows += new
        if self.drafter is None:
            self._give(first_logits[:, -1], new)
            return
        self.drafter.admit(new, request.texts.of(numbers), request.end_tokens)
        self._settle(new, first_logits, {row: [] for row in new}, [])

    def advance(self) -> None:
        """Gives every row one token or more, and lets rows leave that have ended."""
        self.session.make_room(max(request.room for request, _ in self.rows))
        if self.drafter is None:
            self._step()
        else:
            self._cycle(self.drafter)
        self.let_leave()

    @property
    def running(self) -> list[Row]:
        """The rows that have not ended."""
        return [(request, row) for request, row in self.rows if request.texts.active[row]]

    def _step(self) -> None:
        """Gives every row one token more."""
        longest = self._longest
        logits, self._queued = self._queued, None
        if logits is None:
            logits = self.session.step(self._aligned())
        self._give(logits[:, -1], self.rows)
        self.session.keep([1] * len(self.rows), self._longest - longest if self.running else 1)

    def _give(self, logits_NV: Tensor, rows: Sequence[Row]) -> None:
        """Gives these rows a token each, by their logits."""
        chosen = []
        for request, places in _places(rows).items():
            tokens = self._guarded(request, request.choose, [*places], at(logits_NV, [*places.values()]))
            chosen.append((request, [*places], None if tokens is None else coming(tokens)))
        if not self.shared:
            self._queue_next(chosen[0][0])
        for request, numbers, tokens in chosen:
            if tokens is not None:
                self._guarded(request, request.end, numbers, tokens())

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
        if session.runs_late and request.room > 1 and not self.ranks.several and session.can_take_back:
            self._queued = session.step(self._aligned())

    def _cycle(self, drafter: Drafter) -> None:
        session, ids, running, longest = self.session, self._aligned(), self.running, self._longest
        late, start, began = session.runs_late, self.clock(), mark(ids.device)
        before = {row: _length(row) for row in running}
        draft = drafter.draft(ids, self._rooms(), DraftStep(self._draft_scores, self._choose_draft), late=late)
        session.rewind(draft.steps)
        drafted, drafted_at = draft.ids.shape[1], mark(ids.device)
        width = session.width_for(drafted)
        logits = session.verify(torch.cat([ids, draft.ids], dim=-1), drafted)
        verified_at = mark(ids.device)
        best = [self.ranks.first(logits.argmax(-1))] if late and any(r.takes_best for r, _ in self.rows) else []
        chosen = [int(token) for tokens in drafter.read(draft, *best) for token in tokens] if late else []
        cycles = self._settle(self.rows, logits, draft.rows, chosen)
        # (Of a row that has ended nothing is needed any more: it goes with the longest.)
        advance = max(map(_length, self.running or running)) - longest
        session.keep([_length(row) - before[row] if row in before else advance for row in self.rows], advance)
        end = self.clock()
        took = seconds_between(began, drafted_at), seconds_between(drafted_at, verified_at)
        drafting, verifying, keeping = self.ranks.agree([*took, max(end - start - sum(took), 0.0)])
        seconds = drafting, verifying, keeping
        kept = {row: _length(row) - length for row, length in before.items()}
        drafter.note(kept, draft.steps, width, verifying + keeping, drafting if late else None)
        session.stats.count_cycle(
            CycleRecord(tuple(cycles), width, seconds, threading.get_ident(), session.stats.model_id)
        )

    def _settle(
        self, rows: Sequence[Row], logits_BWV: Tensor, drafts: Mapping[Any, Sequence[Proposed]], chosen: Sequence[int]
    ) -> list[RowCycle]:
        """Has rows keep what held of their drafts.

        Args:
            rows: those of the logits.
            logits_BWV: of their last kept tokens, and of those drafted.
            drafts: by row.
            chosen: the best tokens, B times W; none where the host has not read them.
        """
        cycles: list[RowCycle] = []
        width = logits_BWV.shape[1]
        for request, places in _places(rows).items():
            own = [drafts[request, row] for row in places]
            logits = at(logits_BWV, [*places.values()])
            known = None
            if chosen and request.takes_best:
                known = [chosen[place * width : (place + 1) * width] for place in places.values()]
            cycles += self._guarded(request, request.settle, [*places], logits, own, self.drafter, known) or []
        return cycles

    def let_leave(self) -> None:
        """Takes the rows that have ended out of the batch, if they are enough."""
        running, before = self.running, len(self.rows)
        if len(running) == before or not self._may_leave(running):
            return
        if self.drafter is not None:
            self.drafter.leave(row for row in self.rows if row not in running)
        # The last rows come in the places of those that left, so that no others move.
        stay = [i for i, row in enumerate(self.rows) if row in running]
        order, last = [*range(len(stay))], [i for i in stay if i >= len(stay)]
        for place in order:
            if place not in stay:
                order[place] = last.pop()
        self.rows = [self.rows[i] for i in order]
        self.session.select(order)
        if self.drafter is not None:
            self.drafter.take(self.session.times)

    def _may_leave(self, running: Sequence[Row]) -> bool:
        """Whether rows that have ended leave, and these go on without them."""
        if self.shared:
            return True
        if not running or self.drafter is None or len(running) > _STAY * len(self.rows) or running[0][0].together:
            return False
        return self.session.pays_to_select(len(running), max(request.room for request, _ in running) - 1)

    @property
    def _longest(self) -> int:
        """Ids of the longest row that is still being generated."""
        return max(map(_length, self.running))

    def _aligned(self) -> Tensor:
        """Returns the batch's ids ``[B, S]``, which end together, S being those of the longest row."""
        (first, _), *others = self.rows
        if all(request is first for request, _ in others):
            return first.texts.aligned([row for _, row in self.rows])
        return pad_sequence([request.texts.of([row])[0] for request, row in self.rows], True, padding_side="left")

    def _rooms(self) -> dict[Row, int | None]:
        """Returns how many tokens each row of the batch can draft, None for rows that have ended."""
        most = self.session.longest_draft
        return {
            (request, row): request.longest_draft(row, most) if request.texts.active[row] else None
            for request, row in self.rows
        }

    def _draft_scores(self, ids_BS: Tensor, rows: Sequence[Row], drafted: int) -> Tensor:
        """Runs the river over the batch's ids, `drafted` of them not in the texts yet; returns scores ``[N, V]``."""
        place_of = {row: place for place, row in enumerate(self.rows)}
        scores = at(self.session.draft_step(ids_BS), [place_of[row] for row in rows]).float()
        parts = []
        for request, places in _places(rows).items():
            inside = [*places.values()]
            where = {number: place_of[request, number] for number in places}
            parts.append((inside, request.draft_scores(ids_BS, where, at(scores, inside), drafted)))
        return put_together(parts) if parts else scores

    def _choose_draft(self, scores_NV: Tensor, rows: Sequence[Row], drafted: int) -> Tensor:
        parts = []
        for request, places in _places(rows).items():
            inside = [*places.values()]
            parts.append((inside, request.choose_draft([*places], at(scores_NV, inside), drafted)))
        return put_together(parts)


def _length(row: Row) -> int:
    request, number = row
    return request.texts.lengths[number]


def _places(rows: Sequence[Row]) -> Mapping[Request, dict[int, int]]:
    """Returns for each call the numbers of its rows, with their places among these."""
    places: dict[Request, dict[int, int]] = defaultdict(dict)
    for place, (request, number) in enumerate(rows):
        places[request][number] = place
    return places
