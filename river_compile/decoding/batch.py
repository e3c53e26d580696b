"""The loop of generate without drafts, for the rows of one call or of several, and the rows of one call.

Not handled: drafts (`speculative.py`); calls that join and leave (`rows.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from river_compile.agreement import ALONE
from river_compile.decoding.passes import Passes
from river_compile.decoding.sampling import Sampler
from river_compile.decoding.speculative import Drafting, speculate
from river_compile.decoding.text import Agreed, Ends, Put, Stops, Text, with_columns


class Decoded(Protocol):
    """Rows that get a token each from a pass."""

    @property
    def runs(self) -> bool:
        """Whether any row is being generated."""
        ...

    @property
    def ids(self) -> Tensor:
        """The ids ``[N, S]``, left-padded."""
        ...

    @property
    def tokens_left(self) -> int:
        """Most tokens that a row may get."""
        ...

    def append_next(self, logits_NV: Tensor) -> None:
        """Choose and append a token for each row."""
        ...


def plain(passes: Passes, rows: Decoded) -> Iterator[None]:
    """Generate a token for each row in every pass; yields after each."""
    while rows.runs:
        passes.make_room(rows.tokens_left)
        rows.append_next(passes.step(rows.ids)[:, -1])
        yield


def generate(passes: Passes, text: Text | Rows, drafting: Drafting | None) -> Tensor:
    """Generate a call's texts, whose first tokens are there; return all ids ``[B, S]``."""
    if drafting is None:
        for _ in plain(passes, text):
            pass
        return text.finish()
    if isinstance(text, Text):
        for _ in speculate(passes, text, drafting):
            pass
        return text.finish()
    for _ in plain(passes, text):
        # Only a single row drafts: a pass of several rows and tokens costs more than drafts save.
        if text.may_end_alone and passes.should_shrink(text.tokens_left):
            last = text.last()
            passes.select([last.row])
            for _ in speculate(passes, last, drafting):
                pass
            return text.finish(last)
    return text.finish()


@dataclass(eq=False)
class Rows:
    """The rows of one call: their ids, sampler and stopping criteria."""

    prompt: Tensor  # ids [B, S], left-padded; S = 0 if it came as inputs_embeds
    sampler: Sampler
    stops: Stops
    max_length: int  # of a row, in ids
    pad_token: int | None  # for ended rows; None: rows end together
    put: Put | None = None
    are_independent: bool = False  # whether processors and criteria see each row alone, without memory
    end_tokens: frozenset[int] = frozenset()  # that end a draft
    agreed: Agreed = ALONE.first  # on the criteria, among the processes that run the model
    length: int = field(init=False)  # ids of each row so far
    active: list[bool] = field(init=False)  # by row: whether it is being generated

    def __post_init__(self) -> None:
        self._ids = self.prompt.clone()
        self.length = self.prompt.shape[1]
        self.active = [True] * len(self._ids)

    @property
    def ids(self) -> Tensor:
        return self._ids[:, : self.length].contiguous()

    @property
    def tokens_left(self) -> int:
        return self.max_length - self.length

    @property
    def runs(self) -> bool:
        return any(self.active)

    def append_next(self, logits_BV: Tensor) -> None:
        """Choose and append a token for each row, padding for ended ones; end rows, and call the streamer."""
        every, new = range(len(self._ids)), self.length - self.prompt.shape[1]
        tokens_B = self.sampler.choose(logits_BV, self.ids, every, new)
        if self.pad_token is not None and not all(self.active):
            tokens_B = torch.where(tokens_B.new_tensor(self.active) > 0, tokens_B, self.pad_token)
        self._append(tokens_B)
        stopped = self._stopped(tokens_B)
        self.active = [active and not stop for active, stop in zip(self.active, stopped, strict=True)]
        if self.put is not None:
            self.put(self._ids[:, self.length - 1].cpu())
        if self.sampler.do_sample:
            self.sampler.forget(new + 1)

    def _append(self, tokens_B: Tensor) -> None:
        self._ids = with_columns(self._ids, self.length + 1)
        self._ids[:, self.length] = tokens_B
        self.length += 1

    def _stopped(self, tokens_B: Tensor) -> list[bool]:
        """Return which rows end with the token that each received."""
        if isinstance(self.stops, Ends):
            return [self.stops.reached(self.length, token) for token in tokens_B.tolist()]
        stopped: list[bool] = self.agreed(self.stops(self.ids, self.sampler.scores_so_far)).tolist()
        return stopped

    @property
    def may_end_alone(self) -> bool:
        """Whether one row runs, and others do not matter to it."""
        return self.are_independent and sum(self.active) == 1 and self.pad_token is not None

    def last(self) -> Text:
        """Return the one row that runs as a separate text, for :meth:`finish`."""
        row, put_column = self.active.index(True), self.put

        def put(token: Tensor) -> None:
            if put_column is not None:
                put_column(self._padded(row, token))

        return Text(
            prompt=self._ids[row : row + 1, : self.length],
            sampler=self.sampler,
            stops=self.stops,
            max_length=self.max_length,
            put=None if put_column is None else put,
            end_tokens=self.end_tokens,
            agreed=self.agreed,
            row=row,
            earlier=self.length - self.prompt.shape[1],
        )

    def finish(self, last: Text | None = None) -> Tensor:
        """Return all ids ``[B, S]`` of ended rows, padded, the last one's from the text that continued it."""
        if last is not None:
            for token in last.ids[0, self.length :]:
                self._append(self._padded(last.row, token))
        self.sampler.close(self.length - self.prompt.shape[1])
        return self._ids[:, : self.length].clone()

    def _padded(self, row: int, token: Tensor) -> Tensor:
        """Return a row's token among padding, ``[B]``."""
        assert self.pad_token is not None, "rows end together where there is no padding"
        tokens_B = token.new_full((len(self._ids),), self.pad_token)
        tokens_B[row] = token
        return tokens_B
