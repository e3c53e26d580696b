"""The loop of exact mode (self-speculative decoding): draft, verify, keep what agrees, rewind.

    ids      ... a b        a cached, b kept but not cached
    draft    ... a b c d e  the river proposes c d e (its cache entries are freed again)
    verify   ... a b c d e  one backbone pass over b c d e writes exact entries and scores every position
    keep     ... a b c x    c agrees, d does not: x is the backbone's own token there; the slots of d e are freed

Each row of a batch keeps what held for it. Rows that fell behind stand further right in the shared cache: all rows end
in the same slot, and what one lacks to the longest is padding before it.

    row 0    a b c x        kept two tokens
    row 1    . f g h        kept one, so it moved a slot to the right

Kept positions go one by one through the user's logits processors, stopping criteria and streamer, in the order of plain
generation; nothing after the first disagreement or stop ever reaches them. Rows of one length go together. Where a
processor or criterion may look at the whole batch, or remember calls, rows stay together: they keep what held for all
of them, and the calls and arguments are those of plain generation.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from river_compile.runtime.stats import CycleRecord, RowCycle

from .accept import Chooser
from .draft import Draft, Drafter, DraftStep
from .pays import Pays
from .plain import PlainRunner
from .runner import DraftVerifyRunner
from .texts import Texts

Process = Callable[[Tensor, Tensor], Tensor]


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
class ExactLoop:
    """Generates until every row has ended.

    Attributes:
        process: the user's logits processors, ``(ids, scores) -> scores``; None for none.
        process_draft: those that may also see drafts; None for none.
        stops: the stopping criteria, ``(ids, scores) -> bool [N]``.
        max_length: ids in all, at most.
        pad_token: what rows receive that have ended while others go on.
        together: whether rows keep only what held for all of them.
        scores, logits: receive each kept token's processed scores and raw logits, None where nobody asks.
        pays: says when to do without drafts, None for never.
        clock: seconds, from wherever.
    """

    runner: DraftVerifyRunner | PlainRunner
    drafter: Drafter
    texts: Texts
    chooser: Chooser
    process: Process | None
    process_draft: Process | None
    stops: Callable[[Tensor, object], Tensor]
    max_length: int
    pad_token: int | None
    together: bool
    scores: Outputs | None = None
    logits: Outputs | None = None
    pays: Pays | None = None
    clock: Callable[[], float] = time.perf_counter

    def run(self, first_logits: Tensor) -> Tensor:
        """Generates from the prompt's last logits ``[B, 1, V]`` on; returns all ids ``[B, S]``."""
        self._settle(first_logits, Draft([[] for _ in self.texts.active]))
        while self.texts.running:
            self._cycle()
        self.chooser.close(max(self.texts.steps))
        return self.texts.whole()

    def _cycle(self) -> None:
        if self.pays is not None:
            self.pays.measure_plain(self._plain_pass)
        start = self.clock()
        runner, texts = self.runner, self.texts
        ids, running, longest, before = texts.aligned(), texts.running, texts.longest, list(texts.lengths)
        river = self.pays is None or not self.pays.resting
        draft = self.drafter.draft(ids, self._rooms(), DraftStep(self._draft_scores, self._choose_draft), river)
        runner.rewind(draft.steps)
        drafted_at = self.clock()
        width = runner.width_for(draft.longest)
        logits = runner.verify(torch.cat([ids, draft.columns(ids[:, -1])], dim=-1), draft.longest)
        verified_at = self.clock()
        rows = self._settle(logits, draft)
        # (Of a row that has ended nothing is needed any more: it goes with the longest.)
        advance = max(texts.lengths[row] for row in texts.running or running) - longest
        kept = [texts.lengths[row] - before[row] if row in running else advance for row in range(len(before))]
        runner.keep(kept, advance)
        end = self.clock()
        seconds = (drafted_at - start, verified_at - drafted_at, end - verified_at)
        self.drafter.note(sum(len(row.kept) for row in rows), draft.steps, width, end - drafted_at)
        cycle = CycleRecord(rows, width, seconds, threading.get_ident(), runner.stats.model_id)
        runner.stats.count_cycle(cycle)
        if self.pays is not None:
            self.pays.note(cycle)

    def _plain_pass(self) -> None:
        """Runs what a plain step would run next, and forgets it again."""
        self.runner.verify(self.texts.aligned(), 0).argmax(-1).tolist()
        self.runner.rewind(1)

    def _rooms(self) -> list[int | None]:
        """Returns how many tokens each row can draft, None for rows that have ended."""
        most = self.runner.longest_draft
        return [
            max(min(most, self.max_length - length - 1), 0) if active else None
            for length, active in zip(self.texts.lengths, self.texts.active, strict=True)
        ]

    def _draft_scores(self, ids_BS: Tensor, drafted: int) -> Tensor:
        """Runs the river over aligned ids, `drafted` of them not in the texts yet; returns scores ``[B, V]``."""
        scores = self.runner.draft_step(ids_BS).float()
        if self.process_draft is None:
            return scores
        for rows, length in self._of_one_length(self.texts.running):
            scores[rows] = self.process_draft(ids_BS[rows, -(length + drafted) :], scores[rows])
        return scores

    def _choose_draft(self, scores_NV: Tensor, rows: Sequence[int], drafted: int) -> Tensor:
        return self.chooser.choose(scores_NV, [(row, self.texts.steps[row] + drafted) for row in rows])

    def _settle(self, logits_BWV: Tensor, draft: Draft) -> tuple[RowCycle, ...]:
        """Keeps each row's tokens up to its first disagreement or its end."""
        going = running = self.texts.running
        sources: dict[int, list[str]] = {row: [] for row in running}
        held_back: set[int] = set()
        for i in range(logits_BWV.shape[1]):
            groups = [list(range(len(self.texts.active)))] if self.together else self._groups(going)
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
        """Keeps one more token of rows of one length; returns the rows whose drafted token it is."""
        texts = self.texts
        raw = logits_BV[rows].to(copy=True, dtype=torch.float32)
        scores = raw if self.process is None else self.process(texts.of(rows), raw)
        step = texts.steps[rows[0]]
        for outputs, values in ((self.scores, scores), (self.logits, raw)):
            if outputs is not None:
                outputs.add(rows, step, values)
        tokens = self.chooser.choose(scores, [(row, step) for row in rows])
        if self.pad_token is not None and not all(texts.active[row] for row in rows):
            tokens = torch.where(tokens.new_tensor([texts.active[row] for row in rows]) > 0, tokens, self.pad_token)
        texts.append(rows, tokens)
        ids = tokens.tolist()
        self.drafter.extend(rows, ids)
        seen = tuple(self.scores.steps) if self.together and self.scores is not None else None
        stopped = self.stops(texts.of(rows), seen).tolist()
        texts.end([row for row, stop in zip(rows, stopped, strict=True) if stop])
        texts.show()
        self.chooser.forget(min((texts.steps[row] for row in texts.running), default=0))
        return [row for row, token, draft in zip(rows, ids, drafted, strict=True) if token == draft]

    def _groups(self, rows: Iterable[int]) -> list[list[int]]:
        return [group for group, _ in self._of_one_length(rows)]

    def _of_one_length(self, rows: Iterable[int]) -> list[tuple[list[int], int]]:
        """Returns rows of the same length together, and that length."""
        groups = defaultdict(list)
        for row in rows:
            groups[self.texts.lengths[row]].append(row)
        return [(group, length) for length, group in groups.items()]
