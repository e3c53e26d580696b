"""The loop of generate. With drafts it is self-speculative decoding: draft, verify, accept, rewind.

Not handled: how long to draft (`draft_length.py`); how passes run (`passes.py`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from river_compile.agreement import ALONE
from river_compile.decoding.draft_length import LOOKUP, TWINS, Draft, DraftLength
from river_compile.decoding.passes import Passes
from river_compile.decoding.sampling import Sampler, SuffixAutomaton
from river_compile.runtime.stats import CycleRecord


class SpeculativeDecoder:
    """Generates the texts of one call, or of several one-row calls, which join and leave."""

    def __init__(self, passes: Passes, length: DraftLength | None = None, max_copied: int = 0) -> None:
        self._passes = passes
        self._length = length  # decides how long to draft; None: no drafts
        self._max_copied = max_copied  # tokens that a draft copies from the context
        self.texts: list[Texts] = []  # by the rows of the batch
        self._index: SuffixAutomaton | None = None  # of the one row that drafts; empty without lookup

    @property
    def drafts(self) -> bool:
        """Whether a row drafts while it is alone in the batch."""
        return self._length is not None

    def run(self, texts: Texts, first_logits: Tensor) -> Tensor:
        """Generate one call's texts after its prompt's logits ``[B, 1, V]``; return all ids ``[B, S]``."""
        self.admit(texts, first_logits)
        while texts.runs:
            self.advance()
            if len(texts.rows) > 1:
                self._shrink_to_last_row(texts)
        if texts.error is not None:
            raise texts.error
        return texts.finish()

    def admit(self, texts: Texts, first_logits: Tensor) -> None:
        """Add texts whose prompt has run, by its last logits, as the last rows of the batch."""
        self.texts.append(texts)
        self._append_next(first_logits[:, -1], [texts])

    def advance(self) -> None:
        """Give every row one token, or a single row a cycle's."""
        # Only a single row drafts: a pass of several rows and tokens costs more than drafts save.
        self._passes.make_room(max(texts.tokens_left for texts in self.texts))
        if self._length is not None and sum(len(texts.rows) for texts in self.texts) == 1:
            self._cycle(self._length, self.texts[0])
        else:
            self._append_next(self._passes.step(self._batch_ids())[:, -1], self.texts)

    def _cycle(self, length: DraftLength, text: Texts) -> None:
        """Draft, verify, accept, rewind: give the one row the accepted part of a draft and one more token."""
        #     ids      ... a b        a has cache entries, b not yet
        #     draft    ... a b c d e  the 4-bit twins propose c d e
        #     verify   ... a b c d e  one backbone pass over b c d e scores every position
        #     accept   ... a b c x    c is accepted, d is not: x is the backbone's own token after c
        passes, start = self._passes, time.perf_counter()

        # Draft: the twins' steps fill cache slots, which the verifying pass overwrites.
        draft = self._draft(length, text)
        drafted = len(draft.tokens)
        passes.rewind(draft.steps)
        after_draft = time.perf_counter()

        # Verify: one backbone pass over the last emitted token and the draft, padded to a fixed width.
        logits = passes.verify(text.ids_and(drafted), drafted)
        best = text.sampler.best(logits[0]).tolist() if text.sampler.is_greedy else []
        after_verify = time.perf_counter()

        # Accept: the draft's tokens that are the backbone's own choice, then the backbone's next token.
        emitted = self._accept(text, draft, logits, best)

        # Rewind: rejected tokens and padding. The last emitted token has no entry yet, as in plain decoding.
        passes.rewind(passes.width_for(drafted) - len(emitted))
        after_accept = time.perf_counter()

        seconds = after_draft - start, after_verify - after_draft, after_accept - after_verify
        self._learn(length, draft, emitted, seconds)

    def _accept(self, text: Texts, draft: Draft, logits_1WV: Tensor, best: Sequence[int]) -> list[str]:
        """Emit tokens up to the first that the draft lacks, or the text's end; return their sources."""
        sources: list[str] = []
        with text.own_code():
            for i in range(logits_1WV.shape[1]):
                # Greedy: all positions were read in one transfer.
                if best and not text.sampler.bars(best[i], text.length):
                    text.append(token := best[i])
                else:
                    token = int(text.choose(logits_1WV[:, i]).item())
                text.end([token])
                accepted = i < len(draft.tokens) and draft.tokens[i].token == token
                sources.append(draft.tokens[i].source if accepted else "backbone")
                if self._max_copied and self._index is not None:
                    self._index.extend([token])
                if not (accepted and text.runs):
                    break
        return sources

    def _learn(self, length: DraftLength, draft: Draft, emitted: Sequence[str], seconds: Sequence[float]) -> None:
        """Record a cycle: the sources of its tokens, and the times of drafting, verifying and accepting."""
        if not emitted:  # the call's own code raised
            return
        passes = self._passes
        drafting, verifying, accepting = seconds
        length.learn(draft, emitted, drafting, verifying + accepting)
        record = CycleRecord(
            drafted=tuple(token.source for token in draft.tokens),
            emitted=tuple(emitted),
            width=passes.width_for(len(draft.tokens)),
            seconds=(drafting, verifying, accepting),
            thread=threading.get_ident(),
            model=passes.stats.model_id,
        )
        passes.stats.count_cycle(record)

    def _draft(self, length: DraftLength, text: Texts) -> Draft:
        """Draft for the one row: tokens of the twins, then a copy by prompt lookup."""
        passes = self._passes
        if self._index is None:
            passes.begin_drafts(text.ids)
            self._index = SuffixAutomaton(text.ids[0].tolist() if self._max_copied else ())
        index = self._index
        draft = Draft(max(min(passes.longest_draft, text.tokens_left - 1), 0))
        ids: list[int] = []  # of the draft
        text.reserve(draft.room)
        while True:
            if self._max_copied:
                most = min(draft.room - len(ids), self._max_copied)
                copied, ending = index.continuation(most, ids)
                draft.copy = [length.token(token, LOOKUP, ending + i) for i, token in enumerate(copied)]
            steps, count = length.plan(draft)
            if not steps or not (ids or passes.can_draft()):
                break
            for token, entropy in self._draft_steps(text, draft, steps if passes.runs_late else 1):
                draft.add(length.token(token, TWINS, entropy))
                ids.append(token)
                if token in text.end_tokens:
                    draft.room = len(draft.tokens)
                    break
        copies = draft.copy[: max(count - len(ids), 0)]
        if copies:
            text.note_draft(text.length + len(ids), torch.tensor([copy.token for copy in copies]))
            for copy in copies:
                draft.add(copy)
        return draft

    def _draft_steps(self, text: Texts, draft: Draft, steps: int) -> list[tuple[int, float]]:
        """Queue draft steps, then read them: tokens, and entropies in nats."""
        passes, found = self._passes, []
        for drafted in range(len(draft.tokens), len(draft.tokens) + steps):
            ids = text.ids_and(drafted)
            found.append(text.draft(ids, passes.draft_step(ids)))
        draft.steps += steps
        return [(int(token), entropy) for token, entropy in torch.cat(found).tolist()]

    def _append_next(self, logits_NV: Tensor, texts: Sequence[Texts]) -> None:
        """Give these texts' rows a token each, by their logits."""
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
        """Remove ended one-row texts from the batch; the last rows take their places."""
        stay = [place for place, each in enumerate(self.texts) if each.runs]
        if len(stay) < len(self.texts):
            order, last = [*range(len(stay))], [place for place in stay if place >= len(stay)]
            order = [place if self.texts[place].runs else last.pop() for place in order]
            self.texts = [self.texts[place] for place in order]
            self._passes.select(order)

    def _batch_ids(self) -> Tensor:
        """Return the batch's ids ``[B, S]``, left-padded to the longest row."""
        if len(self.texts) == 1:
            return self.texts[0].ids
        return pad_sequence([each.ids[0] for each in self.texts], True, padding_side="left")

    def _shrink_to_last_row(self, texts: Texts) -> None:
        """Continue with the last row of a call alone if it drafts and other rows do not matter."""
        running = [place for place, row in enumerate(texts.rows) if texts.active[row]]
        if self._length is None or len(running) != 1 or not texts.rows_are_independent:
            return
        if self._passes.should_shrink(texts.tokens_left):
            texts.rows = running
            self._passes.select(running)


@dataclass(frozen=True)
class Ends:
    """Stopping criteria that depend on a row's length and last token alone."""

    max_length: int  # ids at which a row ends
    tokens: frozenset[int] = frozenset()  # end-of-sequence ids


@dataclass(eq=False)
class Texts:
    """The rows of one call: their ids, sampler and stopping criteria."""

    prompt: Tensor  # ids [B, S], left-padded; S = 0 if it came as inputs_embeds
    sampler: Sampler
    stops: Callable[[Tensor, object], Tensor] | Ends  # stopping criteria, or a summary of them
    max_length: int  # of a row, in ids
    pad_token: int | None  # for ended rows; None: rows end together
    put: Callable[[Tensor], object] | None = None  # of the streamer
    rows_are_independent: bool = False  # whether processors and criteria see each row alone, without memory
    end_tokens: frozenset[int] = frozenset()  # that end a draft
    agreed: Callable[[Tensor], Tensor] = ALONE.first  # on the criteria, among the processes that run the model
    error: BaseException | None = None  # that ended the texts
    rows: list[int] = field(init=False)  # in the batch: all, or the last one that runs
    length: int = field(init=False)  # ids of each row so far
    active: list[bool] = field(init=False)  # by row: whether it is being generated

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
        """Return the ids with drafted tokens after them, ``[N, S + drafted]``."""
        rows = self._ids if len(self.rows) == len(self._ids) else self._ids[self.rows[0] : self.rows[0] + 1]
        return rows[:, : self.length + drafted].contiguous()

    @property
    def new_tokens(self) -> int:
        """Tokens of each row after its prompt."""
        return self.length - self.prompt.shape[1]

    @property
    def tokens_left(self) -> int:
        return self.max_length - self.length

    @property
    def runs(self) -> bool:
        """Whether any row is being generated."""
        return any(self.active)

    def finish(self) -> Tensor:
        """Return all ids ``[B, S]`` of ended texts; shorter ones are padded."""
        self.sampler.close(self.new_tokens)
        return self._ids[:, : self.length].clone()

    def fail(self, error: BaseException) -> None:
        """End all texts with an error."""
        self.error = error
        self.active = [False] * len(self.active)

    @contextlib.contextmanager
    def own_code(self) -> Iterator[None]:
        """Inside, an error ends these texts alone: the call's own code raised it."""
        try:
            yield
        except BaseException as error:
            self.fail(error)

    def choose(self, logits_NV: Tensor) -> Tensor:
        """Choose and append a token ``[N]`` for each row in the batch."""
        tokens = self.sampler.choose(logits_NV, self.ids, self.rows, self.new_tokens)
        going = [self.active[row] for row in self.rows]
        if self.pad_token is not None and not all(going):
            tokens = torch.where(tokens.new_tensor(going) > 0, tokens, self.pad_token)
        self.append(tokens)
        return tokens

    def append(self, tokens: Tensor | int) -> None:
        """Append a token to each row in the batch, and padding to the others."""
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
        """End rows by the token that each received; pass the new tokens to the streamer."""
        for row, stopped in zip(self.rows, self._stopped(tokens), strict=True):
            self.active[row] = self.active[row] and not stopped
        if self.put is not None:
            self.put(self._ids[:, self.length - 1].cpu())
        if self.sampler.do_sample:
            self.sampler.forget(self.new_tokens)

    def draft(self, ids_1S: Tensor, logits_1V: Tensor) -> Tensor:
        """Choose a token after ids of the text and its draft; return it and its entropy, float64 ``[1, 2]``."""
        length = ids_1S.shape[1]
        chosen = self.sampler.draft(logits_1V, ids_1S, self.rows[0], length - self.prompt.shape[1])
        self.note_draft(length, chosen[:, 0])
        return chosen

    def note_draft(self, first: int, tokens_D: Tensor) -> None:
        """Write drafted tokens after the text, in columns made by :meth:`reserve`."""
        self._ids[self.rows[0], first : first + len(tokens_D)] = tokens_D

    def reserve(self, tokens: int) -> None:
        """Allocate columns for tokens after the text."""
        if self.length + tokens > self._ids.shape[1]:
            more = self._ids.new_zeros(len(self._ids), max(self.prompt.shape[1], 64, tokens))
            self._ids = torch.cat([self._ids, more], 1)

    def _stopped(self, tokens: Sequence[int]) -> Sequence[bool]:
        """Return which rows in the batch end with the token that each received."""
        if isinstance(self.stops, Ends):
            return [self.length >= self.stops.max_length or token in self.stops.tokens for token in tokens]
        scores = self.sampler.scores
        seen = None if scores is None else tuple(scores)
        stopped: list[bool] = self.agreed(self.stops(self.ids, seen)).tolist()
        return stopped
