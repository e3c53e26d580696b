"""The passes of a batch that calls of generate join and leave: the rows of several sessions, in one KV cache.

    batch = BatchSession(session, rows=8)             # of a call whose prompt has run: models and passes are alike
    batch.join(session, ids)                          # its entries become the last row
    logits = batch.step(ids)
    batch.select([0, 2])                              # row 1 has ended

Memory is allocated for all rows at once, and passes see the first of its rows: those in use.

Not handled: sliding windows and recurrent states, which :mod:`.continuous` does not let in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from river_compile.decoding.rewind import joined_inputs
from river_compile.decoding.session import Session
from river_compile.model_state import ModelState
from river_compile.runtime.draft_vocab import DraftVocab
from river_compile.upstream.transformers import (
    cache_argument,
    front_rows,
    put_rows,
    set_length,
    sizes_of,
    static_cache,
)


class BatchSession(Session):
    """A session that rows join.

    Args:
        prompt: a session whose prompt has run, with the model, the depth and the kind of cache that all rows have.
        rows: most rows at a time.
    """

    _whole: Cache  # the memory of all rows that there may be

    def __init__(self, prompt: Session, rows: int) -> None:
        super().__init__(prompt.model, prompt.lent, prompt.depth)
        self._model_state = _state_of(prompt)
        self._graph, self._programs = prompt._graph, prompt._programs
        self.stats, self.ranks = prompt.stats, prompt.ranks
        self._allocate(max(sizes_of(prompt.cache)), rows, prompt.cache)

    def fits(self, prompt: Session) -> bool:
        """Whether the model of a session is as it was when the passes became known; nobody changes it under rows."""
        return bool(self._rows) or (self._model_state is not None and self._model_state == _state_of(prompt))

    def join(self, prompt: Session, ids_BS: Tensor) -> None:
        """Takes in the row of a session whose prompt has run, between two cycles: it becomes the last one.

        Args:
            prompt: the session.
            ids_BS: its prompt.
        """
        rows, entries = self._rows, prompt.entries.filled
        kwargs = prompt._lengthened(entries + 1)
        if kwargs.get("attention_mask") is None:  # (of a text without padding, which rows beside it will have)
            kwargs["attention_mask"] = ids_BS.new_ones(1, entries + 1)
        filled = max(entries, self.entries.filled) if rows else entries
        self._has_slots(filled + self.widths[-1])
        if rows:
            if filled > self.entries.filled:
                self.entries.part([0] * rows, filled)
            kwargs = joined_inputs(self._lengthened(self._kept), kwargs)
        put_rows(self._whole, rows, prompt.cache, filled)
        self._show(kwargs, rows + 1, filled)
        self._kept = self._kept_by_kwargs = filled + 1
        if self._tokens is not None:
            self._tokens = self._tokens if rows else DraftVocab(self._tokens.vocabulary)
            self._tokens.add(ids_BS)

    def select(self, rows: Sequence[int]) -> None:
        """Goes on with these rows alone, or with none: between two cycles."""
        if rows:
            super().select(rows)
        else:
            self._rows = 0

    def make_room(self, tokens: int) -> None:
        """Moves all rows to longer memory, between two cycles, where the next `tokens` do not fit."""
        self._has_slots(self.entries.filled + min(tokens, self.widths[-1]))

    def _allocate(self, slots: int, rows: int, like: Cache) -> None:
        """Makes the memory, of the heads that another cache has."""
        whole = static_cache(self.model, slots)
        assert whole is not None, "the rows' own caches have layers of the same kinds"
        for layer, other in zip(whole.layers, like.layers, strict=True):
            keys, values = ((t[:1, :, :0].expand(rows, -1, -1, -1)) for t in (other.keys, other.values))
            layer.lazy_initialization(keys, values)
        self._whole = whole
        self._use(whole)

    def _show(self, kwargs: Mapping[str, Any], rows: int, filled: int) -> None:
        """Goes on with the first rows of the memory, which hold so many tokens."""
        for layer in self._whole.layers:
            set_length(layer, filled)
        view = front_rows(self._whole, rows)
        self._kwargs = {**kwargs, cache_argument(self.model): view}
        self._see(view)
        self._of_rows(rows)

    def _has_slots(self, slots: int) -> None:
        """Moves all rows to longer memory where there are fewer slots."""
        before = self._whole
        size = max(sizes_of(before))
        if slots <= size:
            return
        rows, filled = self._rows, self.entries.filled
        self._allocate(max(2 * size, slots), len(before.layers[0].keys), before)
        if rows:
            put_rows(self._whole, 0, front_rows(before, rows), filled)
            self._show(self._kwargs, rows, filled)


def _state_of(session: Session) -> ModelState | None:
    """Returns what passes depend on beside their inputs, None where that is not known."""
    return None if session._look is None else session._look.whole
