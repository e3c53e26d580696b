"""The loop of generate. With drafts it is self-speculative decoding: draft, verify, accept, rewind.

    ids      ... a b        a cached, b kept but not cached
    draft    ... a b c d e  the river proposes c d e (its cache entries are freed again)
    verify   ... a b c d e  one backbone pass over b c d e writes exact entries and scores every position
    accept   ... a b c x    c agrees, d does not: x is the backbone's own token there; the slots of d e are freed

One row drafts. Several rows get a token each from every pass: a pass of several rows and tokens costs more than drafts
bring. Not handled: what chooses and ends tokens (:mod:`.texts`), how long to draft (`runtime/draft_length.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from river_compile.decoding.lookup import SuffixAutomaton
from river_compile.decoding.session import Session
from river_compile.decoding.texts import Texts
from river_compile.kernels.native.load import entropies
from river_compile.runtime.draft_length import LOOKUP, RIVER, Draft, DraftLength
from river_compile.runtime.stats import CycleRecord


class SpeculativeDecoder:
    """Generates the texts of one call, or of several of one row each, which come and go.

    Args:
        session: runs the passes.
        length: decides how long drafts are; None for no drafts.
        lookup: copy drafts from the context where it repeats itself.

    Attributes:
        texts: whose rows are the batch, in its order.
    """

    def __init__(self, session: Session, length: DraftLength | None = None, lookup: bool = False) -> None:
        self._session, self._length, self._lookup = session, length, lookup
        self.texts: list[Texts] = []
        self._index: SuffixAutomaton | None = None  # of the one row that drafts; empty without lookup

    @property
    def drafts(self) -> bool:
        """Whether a row drafts that is alone in the batch."""
        return self._length is not None

    def run(self, texts: Texts, first_logits: Tensor) -> Tensor:
        """Generates one call's texts from its prompt's last logits ``[B, 1, V]`` on; returns all ids ``[B, S]``."""
        self.admit(texts, first_logits)
        while texts.runs:
            self.advance()
            if len(texts.rows) > 1:
                self._let_last_row_draft(texts)
        if texts.error is not None:
            raise texts.error
        return texts.finish()

    def admit(self, texts: Texts, first_logits: Tensor) -> None:
        """Takes in texts whose prompt has run, by its last logits; their rows are the last ones of the batch."""
        self.texts.append(texts)
        self._append(first_logits[:, -1], [texts])

    def advance(self) -> None:
        """Gives every row one token, or one row several."""
        self._session.make_room(max(texts.tokens_left for texts in self.texts))
        if self._length is not None and sum(len(texts.rows) for texts in self.texts) == 1:
            self._cycle(self._length, self.texts[0])
        else:
            self._append(self._session.step(self._ids())[:, -1], self.texts)

    def _cycle(self, length: DraftLength, text: Texts) -> None:
        """Gives the one row the tokens of its draft that hold, and one more."""
        session, times = self._session, [time.perf_counter()]
        draft = self._draft(length, text)
        drafted = len(draft.tokens)
        session.rewind(draft.steps)
        times.append(time.perf_counter())
        logits = session.verify(text.ids_and(drafted), drafted)
        best = text.sampler.best(logits[0]).tolist() if text.sampler.is_greedy else []
        times.append(time.perf_counter())
        kept = self._accept(text, draft, logits, best)
        # (The last kept token has no slot yet, as without drafts.)
        session.rewind(session.width_for(drafted) - len(kept))
        times.append(time.perf_counter())
        self._learn(length, draft, kept, [end - start for start, end in pairwise(times)])

    def _accept(self, text: Texts, draft: Draft, logits_1WV: Tensor, best: Sequence[int]) -> list[str]:
        """Keeps tokens up to the first that the draft lacks, or to the text's end; returns where each came from.

        `best` are the positions' tokens, where nothing but logits chooses them.
        """
        kept: list[str] = []
        with text.own_code():
            for i in range(logits_1WV.shape[1]):
                if best:
                    text.append(token := best[i])
                else:
                    token = int(text.choose(logits_1WV[:, i]).item())
                text.end([token])
                held = i < len(draft.tokens) and draft.tokens[i].token == token
                kept.append(draft.tokens[i].source if held else "backbone")
                if self._lookup and self._index is not None:
                    self._index.extend([token])
                if not (held and text.runs):
                    break
        return kept

    def _learn(self, length: DraftLength, draft: Draft, kept: Sequence[str], seconds: Sequence[float]) -> None:
        """Learns from a cycle, which drafted, verified and kept for some seconds each."""
        if not kept:  # (the call's own code raised)
            return
        session = self._session
        drafting, verifying, keeping = session.ranks.agree(seconds)
        length.learn(draft, kept, drafting, verifying + keeping)
        record = CycleRecord(
            drafted=tuple(token.source for token in draft.tokens),
            kept=tuple(kept),
            width=session.width_for(len(draft.tokens)),
            seconds=(drafting, verifying, keeping),
            thread=threading.get_ident(),
            model=session.stats.model_id,
        )
        session.stats.count_cycle(record)

    def _draft(self, length: DraftLength, text: Texts) -> Draft:
        """Drafts for the one row: tokens of the river, then copies of what followed the text's ending before."""
        session = self._session
        if self._index is None:
            session.begin_drafts(text.ids)
            self._index = SuffixAutomaton(text.ids[0].tolist() if self._lookup else ())
        index = self._index
        draft = Draft(max(min(session.longest_draft, text.tokens_left - 1), 0))
        ahead: list[int] = []  # its tokens
        text.reserve(draft.room)
        while True:
            if self._lookup:
                copied, ending = index.continuation(draft.room - len(ahead), ahead)
                draft.copy = [length.token(token, LOOKUP, ending + i) for i, token in enumerate(copied)]
            steps, count = length.plan(draft)
            if not steps:
                break
            for token, nats in self._take_steps(text, draft, steps if session.runs_late else 1):
                draft.add(length.token(token, RIVER, nats))
                ahead.append(token)
                if token in text.end_tokens:
                    draft.room = len(draft.tokens)
                    break
        copies = draft.copy[: max(count - len(ahead), 0)]
        if copies:
            text.note_draft(text.length + len(ahead), torch.tensor([copy.token for copy in copies]))
            for copy in copies:
                draft.add(copy)
        return draft

    def _take_steps(self, text: Texts, draft: Draft, steps: int) -> list[tuple[int, float]]:
        """Takes steps of the river, queued as a whole and then read: tokens, and entropies in nats."""
        session, found = self._session, []
        for drafted in range(len(draft.tokens), len(draft.tokens) + steps):
            ids = text.ids_and(drafted)
            token, scores = text.draft(ids, session.draft_step(ids))
            found += [token.double(), session.ranks.first(entropies(scores)).double()]
        draft.steps += steps
        values = torch.cat(found).tolist()
        return [(int(token), nats) for token, nats in zip(values[::2], values[1::2], strict=True)]

    def _append(self, logits_NV: Tensor, texts: Sequence[Texts]) -> None:
        """Gives these texts' rows a token each, by their logits."""
        self._index = None
        chosen, end = [], 0
        for each in texts:
            first, end = end, end + len(each.rows)
            tokens = torch.zeros(end - first, dtype=torch.long, device=each.ids.device)
            with each.own_code():
                tokens = each.choose(logits_NV[first:end])
            chosen.append(tokens)
        values, end = torch.cat(chosen).tolist(), 0
        for each in texts:
            first, end = end, end + len(each.rows)
            if each.error is None:
                with each.own_code():
                    each.end(values[first:end])

    def drop_finished(self) -> None:
        """Takes texts that have ended, of one row each, out of the batch.

        The last rows come in the places of those that left, so that no others move.
        """
        stay = [place for place, each in enumerate(self.texts) if each.runs]
        if len(stay) < len(self.texts):
            order, last = [*range(len(stay))], [place for place in stay if place >= len(stay)]
            order = [place if self.texts[place].runs else last.pop() for place in order]
            self.texts = [self.texts[place] for place in order]
            self._session.select(order)

    def _ids(self) -> Tensor:
        """Returns the batch's ids ``[B, S]``, which end together, S being those of the longest row."""
        if len(self.texts) == 1:
            return self.texts[0].ids
        return pad_sequence([each.ids[0] for each in self.texts], True, padding_side="left")

    def _let_last_row_draft(self, texts: Texts) -> None:
        """Goes on with the last row of a call alone, if it drafts and others cannot tell."""
        running = [place for place, row in enumerate(texts.rows) if texts.active[row]]
        if self._length is None or len(running) != 1 or not texts.rows_are_independent:
            return
        if self._session.should_shrink(texts.tokens_left):
            texts.rows = running
            self._session.select(running)
