"""One row of a batch: its ids, who chooses its tokens, and what ends it.

Not handled: several rows of one call (`batch.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from river_compile.agreement import ALONE
from river_compile.decoding.sampling import Sampler


@dataclass(frozen=True)
class Ends:
    """Stopping criteria that depend on a row's length and last token alone."""

    max_length: int  # ids at which a row ends
    tokens: frozenset[int] = frozenset()  # end-of-sequence ids

    def reached(self, length: int, token: int) -> bool:
        """Whether a row of so many ids ends with its last token."""
        return length >= self.max_length or token in self.tokens


Stops: TypeAlias = Callable[[Tensor, object], Tensor] | Ends  # stopping criteria, or a summary of them
Agreed: TypeAlias = Callable[[Tensor], Tensor]
Put: TypeAlias = Callable[[Tensor], object]  # takes the new tokens of all rows, as a streamer does


@dataclass(eq=False)
class Text:
    """A row that is being generated."""

    prompt: Tensor  # ids [1, S]; S = 0 if it came as inputs_embeds
    sampler: Sampler
    stops: Stops
    max_length: int  # in ids
    put: Put | None = None
    end_tokens: frozenset[int] = frozenset()  # that end a draft
    agreed: Agreed = ALONE.first  # on the criteria, among the processes that run the model
    row: int = 0  # in the sampler's batch
    earlier: int = 0  # tokens in `prompt` that the sampler chose
    runs: bool = field(default=True, init=False)  # whether it has not ended
    error: BaseException | None = field(default=None, init=False)  # that ended it
    length: int = field(init=False)  # ids so far

    def __post_init__(self) -> None:
        self._ids = self.prompt.clone()
        self.length = self.prompt.shape[1]

    @property
    def ids(self) -> Tensor:
        """The ids ``[1, S]``."""
        return self._ids[:, : self.length]

    @property
    def tokens_left(self) -> int:
        return self.max_length - self.length

    @property
    def new_tokens(self) -> int:
        """Tokens after the prompt of the call."""
        return self.length - self.prompt.shape[1] + self.earlier

    def append_next(self, logits_1V: Tensor) -> None:
        """Choose and append a token."""
        self.append(int(self.choose(logits_1V)))

    def choose(self, logits_1V: Tensor) -> Tensor:
        """Return the next token ``[1]``."""
        return self.sampler.choose(logits_1V, self.ids, [self.row], self.new_tokens)

    def append(self, token: int) -> None:
        """Append a token, pass it to the streamer, and end the text if a criterion says so."""
        self.reserve(1)
        self._ids[0, self.length] = token
        self.length += 1
        self.runs = not self._is_last(token)
        if self.put is not None:
            self.put(self._ids[0, self.length - 1 : self.length].cpu())
        if self.sampler.do_sample:
            self.sampler.forget(self.new_tokens)

    def _is_last(self, token: int) -> bool:
        if isinstance(self.stops, Ends):
            return self.stops.reached(self.length, token)
        return bool(self.agreed(self.stops(self.ids, self.sampler.scores_so_far)))

    def finish(self) -> Tensor:
        """Return the ids ``[1, S]`` of an ended text."""
        self.sampler.close(self.new_tokens)
        return self.ids.clone()

    def ids_and(self, drafted: int) -> Tensor:
        """Return the ids with drafted tokens after them, ``[1, S + drafted]``."""
        return self._ids[:, : self.length + drafted]

    def draft(self, drafted: int, logits_1V: Tensor) -> Tensor:
        """Choose the token after `drafted` ones; return it and its entropy in nats, float64 ``[1, 2]``."""
        ids_1S = self.ids_and(drafted)
        chosen = self.sampler.draft(logits_1V, ids_1S, self.row, self.new_tokens + drafted)
        self.note_draft(drafted, chosen[:, 0])
        return chosen

    def note_draft(self, drafted: int, tokens_D: Tensor) -> None:
        """Write tokens after `drafted` ones, into columns made by :meth:`reserve`."""
        first = self.length + drafted
        self._ids[0, first : first + len(tokens_D)] = tokens_D

    def reserve(self, tokens: int) -> None:
        """Allocate columns for tokens after the text."""
        self._ids = with_columns(self._ids, self.length + tokens)

    @contextlib.contextmanager
    def own_code(self) -> Iterator[None]:
        """Inside, an error ends this text alone: the call's own code raised it."""
        try:
            yield
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the text with an error."""
        self.error, self.runs = error, False


def with_columns(ids_BS: Tensor, columns: int) -> Tensor:
    """Return ids with at least this many columns, and room for more."""
    missing = columns - ids_BS.shape[1]
    if missing <= 0:
        return ids_BS
    return torch.cat([ids_BS, ids_BS.new_zeros(len(ids_BS), max(ids_BS.shape[1], 64, missing))], 1)
