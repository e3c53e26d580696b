"""The model's side of a continuous batch: prompts in pieces, and cycles of the rows, in one thread.

Not handled: threads, locks and waiting calls (`continuous.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from river_compile.decoding.call import Call
from river_compile.decoding.mode import Decode
from river_compile.decoding.passes import Passes
from river_compile.decoding.prompt import Prompt
from river_compile.decoding.rows import JoinedRows, empty_batch, join, may_join
from river_compile.decoding.text import Text

_PIECE = 128  # prompt tokens between two cycles
_RECENT = 1000  # calls in `first_token_seconds`


@dataclass(eq=False)
class Submitted:
    """What a row belongs to: a submitted function, or one call of generate."""

    generator: torch.Generator  # of its calls' random numbers
    since: float = field(default_factory=time.perf_counter)
    cancelled: bool = False


@dataclass(eq=False)
class Row:
    """A generate call that waits for a row, or has one."""

    call: Call
    mode: Decode
    kwargs: Mapping[str, Any]
    owner: Submitted
    result: Future[Tensor | None] = field(default_factory=Future)  # None: the call has to run alone
    passes: Passes | None = None  # of the prompt
    prompt: Prompt | None = None
    text: Text | None = None  # while it is generated


class BatchLoop:
    """Runs prompts and rows on one model; calls that cannot be rows get None."""

    def __init__(self, model: PreTrainedModel, limit: int) -> None:
        self._model, self._limit = model, limit
        self._prompt: Row | None = None  # its prompt runs
        self._rows: list[Row] = []  # they are generated
        self._joined: JoinedRows | None = None
        self._mode: Decode | None = None  # of the rows' calls
        self._decoding = contextlib.ExitStack()  # transformers' mode for decoding, while there are rows
        self.tokens = self.prompt_tokens = self.prompt_tokens_kept = 0  # of ended calls; of joined ones
        self.first_token_seconds: deque[float] = deque(maxlen=_RECENT)

    @property
    def has_work(self) -> bool:
        return bool(self._rows or self._prompt is not None)

    def cycle(self, waiting: deque[Row]) -> None:
        """Run a piece of a prompt, the first waiting one if there is a row for it, and a cycle of the rows."""
        if self._prompt is None and waiting and len(self._rows) < self._limit:
            self._prompt = waiting.popleft()
        if self._prompt is not None:
            self._run_prompt(self._prompt)
        if self._rows:
            self._advance()

    def _run_prompt(self, row: Row) -> None:
        """Run a piece of a prompt; after the last one, make the call a row."""
        kept = None  # ids whose entries are in the cache of the passes
        try:
            if row.owner.cancelled:
                raise CancelledError("the call was cancelled")
            if row.prompt is None and not self._begin(row):
                self._prompt = None
                row.result.set_result(None)
                return
            assert row.passes is not None, "it has begun"
            assert row.prompt is not None, "it has begun"
            logits = row.prompt.piece(_PIECE)
            if logits is None:
                return
            kept = row.call.ids_BS
            self._join(row, row.passes, logits)
        except BaseException as error:
            self._end(row, error)
        self._prompt = None
        if row.passes is not None:
            row.passes.release(kept, row.call.ids_BS.shape[1])

    def _begin(self, row: Row) -> bool:
        """Make the passes of a call's prompt; return False if the call has to run alone."""
        if self._rows and row.mode != self._mode:
            return False
        passes = row.mode.passes(row.call, row.kwargs)
        if not passes.kv.is_full:
            passes.release()
            return False
        row.passes, row.prompt = passes, Prompt(passes, row.call.ids_BS, row.call.config)
        self.prompt_tokens += row.call.ids_BS.shape[1]
        self.prompt_tokens_kept += passes.kv.filled
        return True

    def _join(self, row: Row, passes: Passes, logits: Tensor) -> None:
        """Make a call whose prompt has run the last row of the batch."""
        call = row.call
        if not self._rows:
            self._decoding.enter_context(self._model._optimize_model_for_decode())
        joined = self._joined
        try:
            if joined is None or self._mode != row.mode or not may_join(joined.passes, passes):
                batch, self._mode = empty_batch(passes, self._limit), row.mode
                join(batch, passes, call.ids_BS)
                self._joined = joined = JoinedRows(batch, row.mode.drafting(call, batch, logits))
            else:
                join(joined.passes, passes, call.ids_BS)
            text = call.rows(passes.agreement, joined.drafts, row.owner.generator)
            assert isinstance(text, Text), "a call of several rows runs alone"
            row.text = text
            joined.join(text, logits[:, -1])
        except Exception as error:
            self._fail(error)
            raise
        self._rows.append(row)
        self.first_token_seconds.append(time.perf_counter() - row.owner.since)

    def _advance(self) -> None:
        """Run a cycle of the rows, and return the results of ended calls."""
        for row in self._rows:
            if row.owner.cancelled and row.text is not None:
                row.text.fail(CancelledError("the call was cancelled"))
        try:
            if self._joined is not None:
                self._joined.advance()
        except BaseException as error:  # of a shared pass, or of the code of the only row
            self._fail(error)
        ended = [row for row in self._rows if row.text is None or not row.text.runs]
        for row in ended:
            self._end(row, None if row.text is None else row.text.error)
        if ended and not self._rows:
            self._decoding.close()
            if self._joined is not None:
                self._joined.passes.write_programs()

    def _fail(self, error: BaseException) -> None:
        """End all rows with an error; the next call begins a new batch."""
        self._joined = None
        for row in self._rows:
            if row.text is not None:
                row.text.fail(error)

    def _end(self, row: Row, error: BaseException | None) -> None:
        """Set a call's result or exception."""
        if row in self._rows:
            self._rows.remove(row)
        try:
            if error is None and row.call.streamer is not None:
                row.call.streamer.end()
        except BaseException as raised:
            error = raised
        self.tokens += 0 if row.text is None else row.text.new_tokens
        if error is None and row.text is not None:
            row.result.set_result(row.text.finish())
        else:
            row.result.set_exception(error or RuntimeError("no text"))

    def end_all(self, error: BaseException) -> None:
        """End all calls with an error."""
        prompt, rows = self._prompt, self._rows
        self._prompt, self._rows = None, []
        if prompt is not None:
            if prompt.passes is not None:
                prompt.passes.release()
            prompt.result.set_exception(error)
        for row in rows:
            row.result.set_exception(error)
        self._decoding.close()
