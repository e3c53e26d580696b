"""The texts of a batch's rows, which grow at their own pace, and plain generation's view of them.

A streamer gets a column ``[B]`` once every row that still runs has come that far, so in plain generation's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from river_compile.decoding.late import at, sent


class Sequences:
    """The ids of each row.

    Args:
        prompt_BS: ids of the prompt, with its left padding (S = 0 where it came as ``inputs_embeds``).
        pad_token: what stands after the end of a row while others go on; None where no row can end before the others.
        put: a streamer's method, None for no streamer.

    Attributes:
        lengths: ids of each row.
        active: whether each row is still being generated.
        running: the rows that are.
    """

    def __init__(self, prompt_BS: Tensor, pad_token: int | None, put: Callable[[Tensor], object] | None = None) -> None:
        # Each row's ids begin in the first column; what is behind them counts for nothing.
        self._ids = prompt_BS.clone()
        self._prompt = prompt_BS.shape[1]
        self._pad_token = pad_token
        self._put, self._shown = put, self._prompt
        self.lengths = [self._prompt] * len(prompt_BS)
        self.active = [True] * len(prompt_BS)
        self.running = [*range(len(prompt_BS))]

    @property
    def device(self) -> torch.device:
        """The device of the ids."""
        return self._ids.device

    @property
    def longest(self) -> int:
        """Ids of the longest row that is still being generated."""
        return max(map(self.lengths.__getitem__, self.running))

    def step_of(self, row: int) -> int:
        """Returns how many new tokens a row has."""
        return self.lengths[row] - self._prompt

    def of(self, rows: Sequence[int]) -> Tensor:
        """Returns the ids ``[N, S]`` of rows of the same length."""
        if len(rows) == len(self.lengths):
            return self._ids[:, : self.lengths[0]].contiguous()
        return torch.cat([self._ids[row : row + 1, : self.lengths[row]] for row in rows])

    def aligned(self, rows: Sequence[int]) -> Tensor:
        """Returns ids ``[N, S]`` that end together, S being :attr:`longest`; filler stands before shorter rows.

        Of a row that has ended with more ids only the last ones are there.
        """
        longest, ids = self.longest, self._ids
        if len(ids) == 1:
            return ids[:, :longest]
        ids = at(ids, rows)
        shifts = [longest - self.lengths[row] for row in rows]
        if not any(shifts):
            return ids[:, :longest]
        columns = torch.arange(longest, device=ids.device)[None] - sent(shifts, ids.device)[:, None]
        return ids.gather(1, columns.clamp(0, ids.shape[1] - 1))

    def append(self, rows: Sequence[int], tokens_N: Tensor) -> None:
        """Adds one token to each of these rows."""
        if max(map(self.lengths.__getitem__, rows)) == self._ids.shape[1]:
            room = self._ids.new_zeros(len(self.lengths), max(self._prompt, 64))  # a prompt of embeddings has no ids
            self._ids = torch.cat([self._ids, room], 1)
        lengths = {*map(self.lengths.__getitem__, rows)}
        if len(lengths) == 1 and len(rows) == len(self._ids):
            self._ids[:, lengths.pop()] = tokens_N
        else:
            where = sent([[row, self.lengths[row]] for row in rows], self._ids.device)
            self._ids[where[:, 0], where[:, 1]] = tokens_N
        for row in rows:
            self.lengths[row] += 1

    def end(self, rows: Sequence[int]) -> None:
        """Notes rows that have ended."""
        for row in rows:
            self.active[row] = False
            self.running = [other for other in self.running if other != row]

    def show(self) -> None:
        """Shows the streamer the tokens that all rows have by now."""
        if self._put is None:
            return
        reached = min((self.lengths[row] for row in self.running), default=max(self.lengths))
        if reached <= self._shown:
            return
        first = self._first(reached)
        for column in range(self._shown, reached):
            self._put(first[:, column].cpu())
        self._shown = reached

    def whole(self) -> Tensor:
        """Returns all ids ``[B, S]``, as long as the longest row; shorter ones are padded."""
        return self._first(max(self.lengths))

    def _first(self, count: int) -> Tensor:
        ids = self._ids[:, :count].clone()
        for row, length in enumerate(self.lengths):
            if length < count:
                assert self._pad_token is not None, "rows end together where there is no padding"
                ids[row, length:] = self._pad_token
        return ids
