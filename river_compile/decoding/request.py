"""One call of generate in a decode loop: its texts, and what chooses their tokens and ends them.

Kept positions go one by one through the user's logits processors, stopping criteria and streamer, in the order of plain
generation; nothing after the first disagreement or stop ever reaches them. Rows of one length go together. Where a
processor or criterion may look at the whole batch, or remember calls, rows stay together: they keep what held for all
of them, and the calls and arguments are those of plain generation.

Not handled: where logits come from (:mod:`.loop`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from river_compile.decoding.draft_policy import Proposed
from river_compile.decoding.drafter import Drafter
from river_compile.decoding.late import at, put_together, sent
from river_compile.decoding.sampling import Chooser
from river_compile.decoding.sequences import Sequences
from river_compile.distributed.ranks import ALONE, Ranks
from river_compile.runtime.stats import RowCycle

Process = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


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


@dataclass(eq=False)
class Request:
    """One call of generate.

    Attributes:
        texts: its rows.
        process: the user's logits processors, ``(ids [N, S], scores [N, V], rows) -> scores``; None for none.
        process_draft: those that may also see drafts; None for none.
        stops: the stopping criteria, ``(ids, scores) -> bool [N]``; or what they come to.
        max_length: ids in all, at most.
        pad_token: what rows receive that have ended while others go on; None where all go on until the last one's end.
        together: whether rows keep only what held for all of them; they do where there is no such token.
        end_tokens: after which a draft ends.
        scores, logits: receive each kept token's processed scores and raw logits, None where nobody asks.
        ranks: that share the model; all of them go by what the first one's stopping criteria say.
        error: that ended the texts, None where none did.
    """

    texts: Sequences
    chooser: Chooser
    process: Process | None
    process_draft: Process | None
    stops: Callable[[Tensor, object], Tensor] | Ends
    max_length: int
    pad_token: int | None
    together: bool
    end_tokens: frozenset[int] = frozenset()
    scores: Outputs | None = None
    logits: Outputs | None = None
    ranks: Ranks = ALONE
    error: BaseException | None = None
    _waiting: set[int] = field(default_factory=set)  # rows that have stopped, where all go on until the last one stops

    @property
    def room(self) -> int:
        """Ids that may follow, and one more."""
        return self.max_length - self.texts.longest + 1

    def longest_draft(self, row: int, most: int) -> int:
        """Returns how many tokens a row can draft, `most` at most; the token after them is the backbone's."""
        return max(min(most, self.max_length - self.texts.lengths[row] - 1), 0)

    def finish(self) -> Tensor:
        """Returns all ids ``[B, S]`` of texts that have ended."""
        self.chooser.close(max(map(self.texts.step_of, range(len(self.texts.active)))))
        return self.texts.whole()

    def fail(self, error: BaseException) -> None:
        """Ends all texts for an error that the call's own code raised."""
        self.error = error
        self.texts.end(self.texts.running)

    @property
    def _simple(self) -> bool:
        """Whether nobody looks at the texts while they grow."""
        unseen = self.process is None and self.scores is None and self.logits is None
        return unseen and isinstance(self.stops, Ends)

    @property
    def takes_best(self) -> bool:
        """Whether each position's token is the best by its logits, whatever stands before it."""
        return self._simple and not self.chooser.do_sample

    def choose(self, rows: Sequence[int], logits_NV: Tensor) -> Tensor:
        """Chooses one more token for each of these rows, of one length, by its logits, and adds it to the text."""
        texts, raw = self.texts, logits_NV
        if not self.takes_best:  # (the best token is the same in the logits' own dtype)
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
        return tokens

    def end(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Ends those of these rows that end with the token that each received, and shows the streamer what is new."""
        self.texts.end(self._stopped(rows, tokens))
        self.texts.show()
        if self.chooser.do_sample:
            self.chooser.forget(min(map(self.texts.step_of, self.texts.running), default=0))

    def settle(
        self,
        rows: Sequence[int],
        logits_NWV: Tensor,
        drafts: Sequence[Sequence[Proposed]],
        drafter: Drafter,
        best: Sequence[Sequence[int]] | None = None,
    ) -> list[RowCycle]:
        """Keeps each row's tokens up to its first disagreement or its end.

        Args:
            rows: those in the batch, which may have ended.
            logits_NWV: of each row, at the last kept token and at those drafted.
            drafts: of each row.
            drafter: learns which of them held.
            best: the best token of each row and position, if that is its choice and the host has read it.
        """
        places = {row: place for place, row in enumerate(rows)}
        going = running = self.texts.running
        sources: dict[int, list[str]] = {row: [] for row in running}
        held_back: set[int] = set()
        order = list(rows)
        for i in range(logits_NWV.shape[1]):
            agreed: set[int] = set()
            for group in self._groups(going):
                if best is None:
                    logits = logits_NWV[:, i]
                    logits = logits if group == order else at(logits, [places[row] for row in group])
                    tokens = self.choose(group, logits).tolist()
                else:
                    tokens = [best[places[row]][i] for row in group]
                    if self.pad_token is not None:
                        pairs = zip(group, tokens, strict=True)
                        tokens = [token if self.texts.active[row] else self.pad_token for row, token in pairs]
                    self.texts.append(group, sent(tokens, self.texts.device))
                drafter.extend([(self, row) for row in group], tokens)
                self.end(group, tokens)
                pairs = zip(group, tokens, strict=True)
                agreed |= {row for row, token in pairs if _drafted(drafts[places[row]], i) == token}
            for row in going:
                draft = drafts[places[row]]
                proposed = draft[i] if i < len(draft) else None
                if proposed is not None:
                    drafter.learn(proposed, row in agreed)
                sources[row].append(proposed.source if proposed is not None and row in agreed else "backbone")
            # (A row that ended inside the draft holds a drafted token where its text holds padding: draft anew.)
            going = [row for row in going if row in agreed and self.texts.active[row]]
            if self.together and len(agreed) < len(self.texts.active):
                held_back = set(going)
                going = []
            if not going:
                break
        return [
            RowCycle(row, tuple(p.source for p in drafts[places[row]]), tuple(sources[row]), row in held_back)
            for row in running
        ]

    def draft_scores(self, ids_BS: Tensor, places: dict[int, int], scores_NV: Tensor, drafted: int) -> Tensor:
        """Returns the scores of drafted tokens as the processors that may see drafts leave them.

        Args:
            ids_BS: of the whole batch, aligned to their ends.
            places: of the rows in the batch, in the order of the scores.
            scores_NV: of the river.
            drafted: ids that are not in the texts yet.
        """
        if self.process_draft is None:
            return scores_NV
        rows, parts = list(places), []
        for group, length in self._of_one_length(rows):
            ids = at(ids_BS, [places[row] for row in group])[:, -(length + drafted) :]
            inside = [rows.index(row) for row in group]
            parts.append((inside, self.process_draft(ids, at(scores_NV, inside), group)))
        return put_together(parts)

    def choose_draft(self, rows: Sequence[int], scores_NV: Tensor, drafted: int) -> Tensor:
        """Chooses drafted tokens by their scores, so many behind each row's text."""
        return self.chooser.choose(scores_NV, [(row, self.texts.step_of(row) + drafted) for row in rows], drafts=True)

    def _stopped(self, rows: Sequence[int], tokens: Sequence[int]) -> Sequence[int]:
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


def _drafted(draft: Sequence[Proposed], position: int) -> int:
    """Returns the token that was drafted at a position, -1 for none."""
    return draft[position].token if position < len(draft) else -1
