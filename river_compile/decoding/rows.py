"""The rows of several calls in the passes of one batch: they join and leave between two cycles.

Not handled: rows with other inputs than ids, masks and positions; threads and waiting calls (`continuous.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from river_compile.decoding.batch import plain
from river_compile.decoding.inputs import joined_inputs
from river_compile.decoding.passes import Passes
from river_compile.decoding.speculative import Drafting, speculate
from river_compile.decoding.text import Text


class JoinedRows:
    """The texts of several calls, a row each: all get a token in a pass, and a single one drafts."""

    def __init__(self, passes: Passes, drafting: Drafting | None) -> None:
        self.passes, self._drafting = passes, drafting
        self.texts: list[Text] = []  # by row
        self._cycles: Iterator[None] | None = None  # of these rows

    @property
    def drafts(self) -> bool:
        """Whether a row drafts while it is alone."""
        return self._drafting is not None

    def join(self, text: Text, logits_1V: Tensor) -> None:
        """Add a text whose row has joined the passes, by the last logits of its prompt."""
        self._cycles = None
        self.texts.append(text)
        with text.own_code():
            text.append_next(logits_1V)
        self._drop_ended()

    def advance(self) -> None:
        """Give every row a token, or a single row a cycle's."""
        self._drop_ended()
        if not self.texts:
            return
        if self._cycles is None:
            if len(self.texts) == 1 and self._drafting is not None:
                self._cycles = speculate(self.passes, self.texts[0], self._drafting)
            else:
                self._cycles = plain(self.passes, self)
        next(self._cycles)
        self._drop_ended()

    def _drop_ended(self) -> None:
        """Remove ended texts; the last rows take their places."""
        stay = [row for row, text in enumerate(self.texts) if text.runs]
        if len(stay) < len(self.texts):
            last = [row for row in stay if row >= len(stay)]
            order = [row if self.texts[row].runs else last.pop() for row in range(len(stay))]
            self.texts = [self.texts[row] for row in order]
            self.passes.select(order)
            self._cycles = None

    @property
    def runs(self) -> bool:
        return any(text.runs for text in self.texts)

    @property
    def tokens_left(self) -> int:
        return max(text.tokens_left for text in self.texts)

    @property
    def ids(self) -> Tensor:
        """The ids ``[N, S]``, left-padded to the longest row."""
        if len(self.texts) == 1:
            return self.texts[0].ids
        return pad_sequence([text.ids[0] for text in self.texts], True, padding_side="left")

    def append_next(self, logits_NV: Tensor) -> None:
        """Give each row a token; an error in a call's own code ends that call's text alone."""
        chosen: list[tuple[Text, Tensor]] = []
        for row, text in enumerate(self.texts):
            with text.own_code():
                chosen.append((text, text.choose(logits_NV[row : row + 1])))
        tokens = torch.cat([token for _, token in chosen]).tolist() if chosen else []  # in one transfer
        for (text, _), token in zip(chosen, tokens, strict=True):
            with text.own_code():
                text.append(token)


def empty_batch(prompt: Passes, rows: int) -> Passes:
    """Return passes without rows, for `rows` that join; model and depth as of `prompt`."""
    # Memory is allocated for all rows; passes see the first ones, which are in use.
    kv = prompt.kv.like(prompt.kv.slots, rows)
    kv.select([])
    batch = Passes(prompt.model, {}, kv, prompt.depth, prompt.state, keeps_hidden=prompt.keeps_hidden)
    batch.programs.graph = prompt.graph
    return batch


def may_join(batch: Passes, prompt: Passes) -> bool:
    """Whether rows are in use, or the model is as it was when the batch began."""
    return bool(batch.kv.rows) or (batch.state is not None and batch.state == prompt.state)


def join(batch: Passes, prompt: Passes, ids_1S: Tensor) -> None:
    """Add the row of a prompt that has run as the last one."""
    entries = prompt.kv.filled
    kwargs = prompt.kwargs_for(entries + 1)
    if kwargs.get("attention_mask") is None:  # a text without padding, next to padded rows
        kwargs["attention_mask"] = ids_1S.new_ones(1, entries + 1)
    if not batch.kv.rows:
        prompt.hand_hidden_to(batch)
    else:
        kwargs = joined_inputs(batch.kwargs_for(batch.kv.filled + 1), kwargs)
        entries = max(entries, batch.kv.filled)
    batch.reserve_slots(entries + batch.widths[-1])
    batch.kv.join(prompt.kv)
    batch.kwargs, batch.kwargs_tokens = kwargs, batch.kv.filled + 1
    batch.reset()
