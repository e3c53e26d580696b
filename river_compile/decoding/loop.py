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

Kept positions go one by one through the user's logits processors, stopping criteria and streamer, in the order of plain
generation; nothing after the first disagreement or stop ever reaches them. Rows of one length go together. Where a
processor or criterion may look at the whole batch, or remember calls, rows stay together: they keep what held for all
of them, and the calls and arguments are those of plain generation.

Without drafts each cycle is one pass that gives every row a token. On a GPU with a static cache that pass is queued
before the host has read what the one before it chose: its ids come from the device. Where a text turns out to have
ended, the pass is taken back from the cache, and nobody sees more of it than the report, which counts it.

    host     choose t | queue step t+1 | read token t, streamer | choose t+1 | queue step t+2 | ...
    device   ........ step t ......... | ................... step t+1 ................... | ...
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from river_compile.decoding.drafter import Draft, Drafter, DraftStep
from river_compile.decoding.sampling import Chooser
from river_compile.decoding.sequences import Sequences
from river_compile.decoding.session import Session
from river_compile.distributed.ranks import ALONE, Ranks
from river_compile.runtime.stats import CycleRecord, RowCycle

Process = Callable[[Tensor, Tensor, Sequence[int]], Tensor]

_STAY = 0.75  # share of a batch that must still run for those that have ended to stay in it


@dataclass(frozen=True)
class Ends:
    """Stopping criteria that look at a row's length and last token alone.

    Attributes:
        max_length: ids at which a row ends.
        tokens: after which it ends.
    """

    max_length: int
    tokens: frozenset[int] = frozenset()

    def stop(self, length: int, token: int) -> bool:
        """Whether a row of this many ids, the last of which is given, has ended."""
        return length >= self.max_length or token in self.tokens


class Outputs:
    """Scores or logits that generate returns: a tensor ``[B, V]`` for each new token, zeros where a row has ended."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.steps: list[Tensor] = []

    def add(self, rows: Sequence[int], step: int, values_NV: Tensor) -> None:
        """Takes in the values of some rows for one step."""
        if step == len(self.steps):
            self.steps.append(values_NV.new_zeros(self._rows, values_NV.shape[-1]))
        self.steps[step][rows] = values_NV


@dataclass
class DecodeLoop:
    """Generates until every row has ended.

    Attributes:
        session: runs the passes.
        drafter: proposes tokens; None for a loop without drafts, whose rows stay together.
        process: the user's logits processors, ``(ids [N, S], scores [N, V], rows) -> scores``; None for none.
        process_draft: those that may also see drafts; None for none.
        stops: the stopping criteria, ``(ids, scores) -> bool [N]``; or what they come to.
        max_length: ids in all, at most.
        pad_token: what rows receive that have ended while others go on; None where all go on until the last one's end.
        together: whether rows keep only what held for all of them; they do where there is no such token.
        scores, logits: receive each kept token's processed scores and raw logits, None where nobody asks.
        ranks: that share the model; all of them go by what the first one's clock and stopping criteria say.
        clock: seconds, from wherever.
    """

    session: Session
    drafter: Drafter | None
    texts: Sequences
    chooser: Chooser
    process: Process | None
    process_draft: Process | None
    stops: Callable[[Tensor, object], Tensor] | Ends
    max_length: int
    pad_token: int | None
    together: bool
    scores: Outputs | None = None
    logits: Outputs | None = None
    ranks: Ranks = ALONE
    clock: Callable[[], float] = time.perf_counter

    def run(self, first_logits: Tensor) -> Tensor:
        """Generates from the prompt's last logits ``[B, 1, V]`` on; returns all ids ``[B, S]``."""
        self._rows = self.texts.running  # those in the batch; they stand in its order
        self._queued: Tensor | None = None  # logits of the next step, which runs already
        self._waiting: set[int] = set()  # rows that have stopped, where all go on until the last one stops
        unseen = self.process is None and self.scores is None and self.logits is None
        self._simple = unseen and isinstance(self.stops, Ends)  # nobody looks at the texts while they grow
        self._settle(first_logits, Draft({row: [] for row in self._rows}))
        while self.texts.running:
            self.session.make_room(self.max_length - self.texts.longest + 1)
            if self.drafter is None:
                self._step()
            else:
                self._cycle(self.drafter)
                self._let_leave(self.drafter)
        if self._queued is not None:
            self.session.rewind(1)
        self.chooser.close(max(map(self.texts.step_of, range(len(self.texts.active)))))
        return self.texts.whole()

    def _step(self) -> None:
        """Gives every row one token more."""
        logits, self._queued = self._queued, None
        if logits is None:
            logits = self.session.step(self.texts.aligned(self._rows))
        self._keep_next(self._rows, logits[:, -1], [])
        self.session.keep([1] * len(self._rows), 1)

    def _cycle(self, drafter: Drafter) -> None:
        start = self.clock()
        session, texts = self.session, self.texts
        ids, running, longest, before = texts.aligned(self._rows), texts.running, texts.longest, list(texts.lengths)
        draft = drafter.draft(ids, self._rooms(), DraftStep(self._draft_scores, self._choose_draft))
        session.rewind(draft.steps)
        drafted_at = self.clock()
        width = session.width_for(draft.longest)
        logits = session.verify(torch.cat([ids, draft.columns(ids[:, -1])], dim=-1), draft.longest)
        verified_at = self.clock()
        rows = self._settle(logits, draft)
        # (Of a row that has ended nothing is needed any more: it goes with the longest.)
        advance = max(texts.lengths[row] for row in texts.running or running) - longest
        kept = [texts.lengths[row] - before[row] if row in running else advance for row in self._rows]
        session.keep(kept, advance)
        end = self.clock()
        took = (drafted_at - start, verified_at - drafted_at, end - verified_at)
        drafting, verifying, keeping = self.ranks.agree(took)
        seconds = drafting, verifying, keeping
        drafter.note({row.row: len(row.kept) for row in rows}, draft.steps, width, verifying + keeping)
        session.stats.count_cycle(CycleRecord(rows, width, seconds, threading.get_ident(), session.stats.model_id))

    def _let_leave(self, drafter: Drafter) -> None:
        """Takes the rows that have ended out of the batch, if they are enough."""
        running, before = self.texts.running, len(self._rows)
        if not running or len(running) > _STAY * before or self.together:
            return
        if not self.session.pays_to_select(len(running), self.max_length - self.texts.longest):
            return
        self.session.select(self._places(running))
        drafter.take(self.session.times)
        self._rows = running

    def _places(self, rows: Iterable[int]) -> list[int]:
        """Returns the positions of rows in the batch."""
        return list(rows) if len(self._rows) == len(self.texts.active) else [self._rows.index(row) for row in rows]

    def _of_rows(self, values_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns the values of some rows of the batch, in its order."""
        return values_BV if len(rows) == len(self._rows) else values_BV[self._places(rows)]

    def _rooms(self) -> dict[int, int | None]:
        """Returns how many tokens each row of the batch can draft, None for rows that have ended."""
        most, texts = self.session.longest_draft, self.texts
        return {
            row: max(min(most, self.max_length - texts.lengths[row] - 1), 0) if texts.active[row] else None
            for row in self._rows
        }

    def _draft_scores(self, ids_BS: Tensor, rows: Sequence[int], drafted: int) -> Tensor:
        """Runs the river over the batch's ids, `drafted` of them not in the texts yet; returns scores ``[N, V]``."""
        scores = self._of_rows(self.session.draft_step(ids_BS), rows).float()
        if self.process_draft is None:
            return scores
        for group, length in self._of_one_length(rows):
            ids = ids_BS[self._places(group), -(length + drafted) :]
            at = [rows.index(row) for row in group]
            scores[at] = self.process_draft(ids, scores[at], group)
        return scores

    def _choose_draft(self, scores_NV: Tensor, rows: Sequence[int], drafted: int) -> Tensor:
        return self.chooser.choose(scores_NV, [(row, self.texts.step_of(row) + drafted) for row in rows], drafts=True)

    def _settle(self, logits_BWV: Tensor, draft: Draft) -> tuple[RowCycle, ...]:
        """Keeps each row's tokens up to its first disagreement or its end."""
        if self.drafter is None:
            self._keep_next(self._rows, logits_BWV[:, -1], [])
            return ()
        going = running = self.texts.running
        sources: dict[int, list[str]] = {row: [] for row in running}
        held_back: set[int] = set()
        for i in range(logits_BWV.shape[1]):
            groups = self._groups(going)
            agreed = {row for rows in groups for row in self._keep_next(rows, logits_BWV[:, i], draft.at(i, rows))}
            for row in going:
                proposed = draft.rows[row][i] if i < len(draft.rows[row]) else None
                if proposed is not None:
                    self.drafter.learn(proposed, row in agreed)
                sources[row].append(proposed.source if proposed is not None and row in agreed else "backbone")
            # (A row that ended inside the draft holds a drafted token where its text holds padding: draft anew.)
            going = [row for row in going if row in agreed and self.texts.active[row]]
            if self.together and len(agreed) < len(self.texts.active):
                held_back = set(going)
                going = []
            if not going:
                break
        drafted = {row: tuple(p.source for p in draft.rows[row]) for row in running}
        return tuple(RowCycle(row, drafted[row], tuple(sources[row]), row in held_back) for row in running)

    def _keep_next(self, rows: list[int], logits_BV: Tensor, drafted: list[int]) -> list[int]:
        """Keeps one more token of a group of rows; returns those whose drafted token it is."""
        texts, raw = self.texts, self._of_rows(logits_BV, rows)
        if not self._simple or self.chooser.do_sample:  # (the best token is the same in the logits' own dtype)
            raw = raw.to(copy=True, dtype=torch.float32, device=texts.device)
        scores = raw if self.process is None else self.process(texts.of(rows), raw, rows)
        step = texts.step_of(rows[0])
        for outputs, values in ((self.scores, scores), (self.logits, raw)):
            if outputs is not None:
                outputs.add(rows, step, values)
        tokens = self.chooser.choose(scores, [(row, step) for row in rows])
        ended = len(texts.running) < len(texts.active)
        if self.pad_token is not None and ended and not all(texts.active[row] for row in rows):
            tokens = torch.where(tokens.new_tensor([texts.active[row] for row in rows]) > 0, tokens, self.pad_token)
        texts.append(rows, tokens)
        if self.drafter is None:
            self._queue_next()
        ids = tokens.tolist()
        if self.drafter is not None:
            self.drafter.extend(rows, ids)
        texts.end(self._stopped(rows, ids))
        texts.show()
        if self.chooser.do_sample:
            self.chooser.forget(min(map(texts.step_of, texts.running), default=0))
        return [row for row, token, draft in zip(rows, ids, drafted, strict=False) if token == draft]

    def _queue_next(self) -> None:
        """Runs the next step before it is known that some text goes on, if that saves time and can be undone."""
        texts, session = self.texts, self.session
        if session.runs_late and texts.longest < self.max_length and not self.ranks.several and session.can_take_back:
            self._queued = session.step(texts.aligned(self._rows))

    def _stopped(self, rows: list[int], tokens: list[int]) -> list[int]:
        """Returns which of these rows end with the token that each received.

        Without a token to pad with, plain generation lets rows that have stopped go on until all have.
        """
        texts = self.texts
        if isinstance(self.stops, Ends):
            stopped = [self.stops.stop(texts.lengths[row], token) for row, token in zip(rows, tokens, strict=True)]
        else:
            seen = tuple(self.scores.steps) if self.together and self.scores is not None else None
            stopped = self.ranks.first(self.stops(texts.of(rows), seen)).tolist()
        ended = [row for row, stop in zip(rows, stopped, strict=True) if stop]
        if self.pad_token is not None or not self.together:
            return ended
        self._waiting.update(ended)
        return rows if len(self._waiting) == len(rows) else []

    def _groups(self, rows: list[int]) -> list[list[int]]:
        """Returns rows that go on together: in calls of the user's, whose ids have one length, or all at once."""
        if self.together:
            return [list(range(len(self.texts.active)))]
        return [rows] if self._simple else [group for group, _ in self._of_one_length(rows)]

    def _of_one_length(self, rows: Iterable[int]) -> list[tuple[list[int], int]]:
        """Returns rows of the same length together, and that length."""
        groups = defaultdict(list)
        for row in rows:
            groups[self.texts.lengths[row]].append(row)
        return [(group, length) for length, group in groups.items()]
