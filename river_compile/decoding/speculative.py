"""The loop of generate. With drafts it is self-speculative decoding: draft, verify, accept, rewind.

    ids      ... a b        a cached, b kept but not cached
    draft    ... a b c d e  the river proposes c d e (its cache entries are freed again)
    verify   ... a b c d e  one backbone pass over b c d e writes exact entries and scores every position
    accept   ... a b c x    c agrees, d does not: x is the backbone's own token there; the slots of d e are freed

One row drafts. Several rows get a token each from every pass: a pass of several rows and tokens costs more than drafts
bring. Not handled: what chooses and ends tokens (:mod:`.texts`), how long to draft (`runtime/draft_length.py`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from river_compile.decoding.sampling import Sampler, SuffixAutomaton
from river_compile.decoding.session import Session
from river_compile.distributed.ranks import ALONE, Ranks
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


@dataclass(frozen=True)
class Ends:
    """Stopping criteria that look at a row's length and last token alone.

    Attributes:
        max_length: ids at which a row ends.
        tokens: after which it ends.
    """

    max_length: int
    tokens: frozenset[int] = frozenset()


@dataclass(eq=False)
class Texts:
    """The rows of one call.

    Attributes:
        prompt: its ids ``[B, S]``, with left padding (S = 0 where it came as ``inputs_embeds``).
        stops: the stopping criteria, ``(ids, scores) -> bool [N]``; or what they come to.
        max_length: ids in all, at most.
        pad_token: what rows receive that have ended while others go on; None where all go on until the last one's end.
        put: a streamer's method, None for no streamer.
        rows_are_independent: whether what was given to the call looks at each row alone, and remembers nothing.
        end_tokens: after which a draft ends.
        ranks: that share the model; all of them go by what the first one's stopping criteria say.
        error: that ended the texts, None where none did.
        rows: those in the batch, all or the last one that runs.
        length: ids of each row so far.
        active: whether each row is still being generated.
    """

    prompt: Tensor
    sampler: Sampler
    stops: Callable[[Tensor, object], Tensor] | Ends
    max_length: int
    pad_token: int | None
    put: Callable[[Tensor], object] | None = None
    rows_are_independent: bool = False
    end_tokens: frozenset[int] = frozenset()
    ranks: Ranks = ALONE
    error: BaseException | None = None
    rows: list[int] = field(init=False)
    length: int = field(init=False)
    active: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self._ids = self.prompt.clone()
        self.length = self.prompt.shape[1]
        self.rows = [*range(len(self.prompt))]
        self.active = [True] * len(self.rows)

    @property
    def ids(self) -> Tensor:
        """The ids ``[N, S]`` of the rows in the batch."""
        return self.ids_and(0)

    def ids_and(self, drafted: int) -> Tensor:
        """Returns the same, with tokens that were drafted behind them ``[N, S + drafted]``."""
        rows = self._ids if len(self.rows) == len(self._ids) else self._ids[self.rows[0] : self.rows[0] + 1]
        return rows[:, : self.length + drafted].contiguous()

    @property
    def new_tokens(self) -> int:
        """Tokens that each row has beside its prompt."""
        return self.length - self.prompt.shape[1]

    @property
    def tokens_left(self) -> int:
        """Ids that may follow."""
        return self.max_length - self.length

    @property
    def runs(self) -> bool:
        """Whether any row is being generated."""
        return any(self.active)

    def finish(self) -> Tensor:
        """Returns all ids ``[B, S]`` of texts that have ended; shorter ones are padded."""
        self.sampler.close(self.new_tokens)
        return self._ids[:, : self.length].clone()

    def fail(self, error: BaseException) -> None:
        """Ends all texts for an error."""
        self.error = error
        self.active = [False] * len(self.active)

    @contextlib.contextmanager
    def own_code(self) -> Iterator[None]:
        """Inside, an error ends these texts and nothing else: it is the call's own code that raised it."""
        try:
            yield
        except BaseException as error:
            self.fail(error)

    def choose(self, logits_NV: Tensor) -> Tensor:
        """Gives each row in the batch a token by its logits; returns them ``[N]``."""
        tokens = self.sampler.choose(logits_NV, self.ids, self.rows, self.new_tokens)
        going = [self.active[row] for row in self.rows]
        if self.pad_token is not None and not all(going):
            tokens = torch.where(tokens.new_tensor(going) > 0, tokens, self.pad_token)
        self.append(tokens)
        return tokens

    def append(self, tokens: Tensor | int) -> None:
        """Gives each row in the batch a token, and padding to the others."""
        if self.length == self._ids.shape[1]:
            self.reserve(1)
        if len(self.rows) == len(self._ids):
            self._ids[:, self.length] = tokens
        else:
            assert self.pad_token is not None, "rows end together where there is no padding"
            self._ids[:, self.length] = self.pad_token
            self._ids[self.rows[0], self.length] = tokens if isinstance(tokens, int) else tokens[0]
        self.length += 1

    def end(self, tokens: Sequence[int]) -> None:
        """Ends rows that end with the token that each in the batch received, and shows the streamer what is new.

        Without a token to pad with, plain generation lets rows that have stopped go on until all have.
        """
        for row, stopped in zip(self.rows, self._stopped(tokens), strict=True):
            self.active[row] = self.active[row] and not stopped
        if self.put is not None:
            self.put(self._ids[:, self.length - 1].cpu())
        if self.sampler.do_sample:
            self.sampler.forget(self.new_tokens)

    def draft(self, ids_1S: Tensor, logits_1V: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses a token ``[1]`` behind ids of the text and its draft, and notes it there.

        Returns:
            The token, and its scores ``[1, V]``.
        """
        length = ids_1S.shape[1]
        token, scores = self.sampler.draft(logits_1V, ids_1S, self.rows[0], length - self.prompt.shape[1])
        self.note_draft(length, token)
        return token, scores

    def note_draft(self, first: int, tokens_D: Tensor) -> None:
        """Notes tokens behind the text, in columns that :meth:`reserve` made, from this one on."""
        self._ids[self.rows[0], first : first + len(tokens_D)] = tokens_D

    def reserve(self, tokens: int) -> None:
        """Makes room for tokens behind the text."""
        if self.length + tokens > self._ids.shape[1]:
            more = self._ids.new_zeros(len(self._ids), max(self.prompt.shape[1], 64, tokens))
            self._ids = torch.cat([self._ids, more], 1)

    def _stopped(self, tokens: Sequence[int]) -> Sequence[bool]:
        """Returns which rows in the batch end with the token that each received."""
        if isinstance(self.stops, Ends):
            return [self.length >= self.stops.max_length or token in self.stops.tokens for token in tokens]
        scores = self.sampler.scores
        seen = None if scores is None else tuple(scores)
        stopped: list[bool] = self.ranks.first(self.stops(self.ids, seen)).tolist()
        return stopped
