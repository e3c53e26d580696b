"""The passes of a batch that calls of generate join and leave: the rows of several sessions, in one KV cache.

    batch = BatchSession(session, rows=8)             # of a call whose prompt has run: models and passes are alike
    batch.join(session, ids)                          # its entries become the last row
    logits = batch.step(ids)
    batch.select([0, 2])                              # row 1 has ended

Memory is allocated for all rows at once, and passes see the first of its rows: those in use.
"""

from __future__ import annotations

from torch import Tensor

from river_compile.decoding.inputs import joined_inputs
from river_compile.decoding.session import Session
from river_compile.model_state import ModelState


class BatchSession(Session):
    """A session that rows join.

    Args:
        prompt: a session whose prompt has run, with the model, the depth and the kind of cache that all rows have.
        rows: most rows at a time.
    """

    def __init__(self, prompt: Session, rows: int) -> None:
        kv = prompt.kv.like(prompt.kv.slots, rows)
        kv.select([])
        super().__init__(prompt.model, {}, kv, prompt.depth)
        self._model_state = _state_of(prompt)
        self._graph, self._programs = prompt._graph, prompt._programs
        self.stats, self.ranks = prompt.stats, prompt.ranks

    def fits(self, prompt: Session) -> bool:
        """Whether the model of a session is as it was when the passes became known; nobody changes it under rows."""
        return bool(self.kv.rows) or (self._model_state is not None and self._model_state == _state_of(prompt))

    def join(self, prompt: Session, ids_BS: Tensor) -> None:
        """Takes in the row of a session whose prompt has run, between two cycles: it becomes the last one.

        Args:
            prompt: the session.
            ids_BS: its prompt.
        """
        entries = prompt.kv.filled
        kwargs = prompt._lengthened(entries + 1)
        if kwargs.get("attention_mask") is None:  # (of a text without padding, which rows beside it will have)
            kwargs["attention_mask"] = ids_BS.new_ones(1, entries + 1)
        if self.kv.rows:
            kwargs = joined_inputs(self._lengthened(self.kv.filled + 1), kwargs)
            entries = max(entries, self.kv.filled)
        self._fit(entries + self.widths[-1])
        self.kv.join(prompt.kv)
        self._kwargs, self._in_kwargs = kwargs, self.kv.filled + 1
        self._use_rows()


def _state_of(session: Session) -> ModelState | None:
    """Returns what passes depend on beside their inputs, None where that is not known."""
    return None if session._look is None else session._look.whole
