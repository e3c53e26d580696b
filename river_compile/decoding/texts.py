"""The texts of one call of generate: their ids, what chooses their next tokens and what ends them.

Tokens go one by one through the user's logits processors, stopping criteria and streamer, in the order and with the
arguments of plain generation. Not handled: where logits come from (:mod:`.speculative`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from river_compile.decoding.sampling import Sampler
from river_compile.runtime.tensor_parallel import ALONE, Ranks


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
