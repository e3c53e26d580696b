"""One call of generate in a decode loop: its texts, and what chooses their tokens and ends them.

Kept positions go one by one through the user's logits processors, stopping criteria and streamer, in the order and with
the arguments of plain generation; nothing after the first disagreement or stop ever reaches them.

Not handled: where logits come from (:mod:`.loop`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from river_compile.decoding.draft_policy import Proposed
from river_compile.decoding.drafter import Drafter
from river_compile.decoding.late import sent
from river_compile.decoding.sampling import Chooser
from river_compile.distributed.ranks import ALONE, Ranks

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


@dataclass(eq=False)
class Request:
    """One call of generate.

    Attributes:
        prompt: its ids ``[B, S]``, with left padding (S = 0 where it came as ``inputs_embeds``).
        process: the user's logits processors, ``(ids [N, S], scores [N, V], rows) -> scores``; None for none.
        process_draft: those that may also see drafts; None for none.
        stops: the stopping criteria, ``(ids, scores) -> bool [N]``; or what they come to.
        max_length: ids in all, at most.
        pad_token: what rows receive that have ended while others go on; None where all go on until the last one's end.
        put: a streamer's method, None for no streamer.
        rows_are_independent: whether what was given to the call looks at each row alone, and remembers nothing.
        end_tokens: after which a draft ends.
        scores, logits: receive each kept token's processed scores and raw logits, None where nobody asks.
        ranks: that share the model; all of them go by what the first one's stopping criteria say.
        error: that ended the texts, None where none did.
        rows: those in the loop's batch, all or the last one that runs.
        length: ids of each row so far.
        active: whether each row is still being generated.
    """

    prompt: Tensor
    chooser: Chooser
    process: Process | None
    process_draft: Process | None
    stops: Callable[[Tensor, object], Tensor] | Ends
    max_length: int
    pad_token: int | None
    put: Callable[[Tensor], object] | None = None
    rows_are_independent: bool = False
    end_tokens: frozenset[int] = frozenset()
    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
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
        rows = self._ids if len(self.rows) == len(self._ids) else self._ids[self.rows[0] : self.rows[0] + 1]
        return rows[:, : self.length].contiguous()

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
        self.chooser.close(self.new_tokens)
        return self._ids[:, : self.length].clone()

    def fail(self, error: BaseException) -> None:
        """Ends all texts for an error that the call's own code raised."""
        self.error = error
        self.active = [False] * len(self.active)

    @property
    def is_greedy(self) -> bool:
        """Whether each position's token is the best by its logits, whatever stands before it."""
        unseen = self.process is None and self.scores is None and self.logits is None
        return unseen and isinstance(self.stops, Ends) and not self.chooser.do_sample

    def choose(self, logits_NV: Tensor) -> Tensor:
        """Chooses one more token for each row in the batch by its logits, and adds it to the text."""
        raw = logits_NV
        if not self.is_greedy:  # (the best token is the same in the logits' own dtype)
            raw = raw.to(copy=True, dtype=torch.float32, device=self._ids.device)
        scores = raw if self.process is None else self.process(self.ids, raw, self.rows)
        for outputs, values in ((self.scores, scores), (self.logits, raw)):
            if outputs is not None:
                outputs.append(values)
        tokens = self.chooser.choose(scores, self.rows, self.new_tokens)
        going = [self.active[row] for row in self.rows]
        if self.pad_token is not None and not all(going):
            tokens = torch.where(tokens.new_tensor(going) > 0, tokens, self.pad_token)
        self._append(tokens)
        return tokens

    def end(self, tokens: Sequence[int]) -> None:
        """Ends rows that end with the token that each in the batch received, and shows the streamer what is new.

        Without a token to pad with, plain generation lets rows that have stopped go on until all have.
        """
        for row, stopped in zip(self.rows, self._stopped(tokens), strict=True):
            self.active[row] = self.active[row] and not stopped
        if self.put is not None:
            self.put(self._ids[:, self.length - 1].cpu())
        if self.chooser.do_sample:
            self.chooser.forget(self.new_tokens)

    def settle(
        self, logits_1WV: Tensor, draft: Sequence[Proposed], drafter: Drafter, best: Sequence[int] = ()
    ) -> tuple[str, ...]:
        """Keeps the one row's tokens up to its first disagreement or its end; returns where each came from.

        Args:
            logits_1WV: at the last kept token and at those drafted.
            draft: of the row.
            drafter: learns which of them held.
            best: the best token of each position, if that is its choice and the host has read it.
        """
        sources = []
        for i in range(logits_1WV.shape[1]):
            if best:
                token = best[i]
                self._append(sent([token], self._ids.device))
            else:
                (token,) = self.choose(logits_1WV[:, i]).tolist()
            drafter.extend(token)
            self.end([token])
            held = i < len(draft) and draft[i].token == token
            if i < len(draft):
                drafter.learn(draft[i], held)
            sources.append(draft[i].source if held else "backbone")
            if not (held and self.runs):
                break
        return tuple(sources)

    def draft_scores(self, ids_1S: Tensor, scores_1V: Tensor) -> Tensor:
        """Returns the scores of a drafted token as the processors that may see drafts leave them."""
        return scores_1V if self.process_draft is None else self.process_draft(ids_1S, scores_1V, self.rows)

    def choose_draft(self, scores_1V: Tensor, drafted: int) -> Tensor:
        """Chooses a drafted token by its scores, so many behind the text."""
        return self.chooser.choose(scores_1V, self.rows, self.new_tokens + drafted, draft=True)

    def _append(self, tokens_N: Tensor) -> None:
        """Adds a token to each row in the batch, and padding to the others."""
        if self.length == self._ids.shape[1]:
            more = self._ids.new_zeros(len(self._ids), max(self.prompt.shape[1], 64))
            self._ids = torch.cat([self._ids, more], 1)
        if len(self.rows) == len(self._ids):
            self._ids[:, self.length] = tokens_N
        else:
            assert self.pad_token is not None, "rows end together where there is no padding"
            self._ids[:, self.length] = self.pad_token
            self._ids[self.rows[0], self.length] = tokens_N[0]
        self.length += 1

    def _stopped(self, tokens: Sequence[int]) -> Sequence[bool]:
        """Returns which rows in the batch end with the token that each received."""
        if isinstance(self.stops, Ends):
            return [self.length >= self.stops.max_length or token in self.stops.tokens for token in tokens]
        seen = None if self.scores is None else tuple(self.scores)
        stopped: list[bool] = self.ranks.first(self.stops(self.ids, seen)).tolist()
        return stopped
