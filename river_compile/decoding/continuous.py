"""Continuous batching: calls of generate join a running batch as rows and leave it at their end.

Not handled (such calls run alone, while the batch waits): several rows, returned caches, models that keep more than
keys and values, strict exact mode, ranks.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from river_compile.decoding.inputs import BY_SLOT
from river_compile.decoding.mode import Call, Decode, ExactMode
from river_compile.decoding.sampling import random_state, set_random_state
from river_compile.decoding.session import Session
from river_compile.decoding.speculative import SpeculativeDecoder, Texts
from river_compile.errors import OptionError
from river_compile.kernels.checks import integer
from river_compile.model_record import record_of

log = logging.getLogger("river_compile.continuous")

_PIECE = 128  # prompt tokens between two cycles
_RECENT = 1000  # calls in `first_token_seconds`
_limit = integer(1)


@dataclass(frozen=True)
class BatchCounters:
    """Totals of a batch so far."""

    rows: int  # the limit
    rows_in_use: int  # calls in progress, including one whose prompt runs and one that runs alone
    queued: int  # calls that wait for a row
    calls: int  # that have ended, for any reason
    tokens: int  # new ones, of ended calls
    prompt_tokens: int  # of joined calls
    prompt_tokens_kept: int  # those of them from the prefix cache
    drafted: int  # tokens, of this model
    held: int  # drafted tokens that were accepted
    first_token_seconds: tuple[float, ...]  # from `submit` to the first token, of the latest calls, oldest first
    busy_seconds: float  # of the batch's thread


@dataclass(eq=False)
class _Waiting:
    """A submitted call."""

    generate: Callable[[], Any]
    future: Future[Any]
    random_state: Tensor
    since: float = field(default_factory=time.perf_counter)
    cancelled: bool = False


@dataclass(eq=False)
class _Joined:
    """A call that joined: its prompt runs, or its text is being generated."""

    waiting: _Waiting
    call: Call
    mode: Decode
    session: Session  # of the prompt
    kept: Tensor | None = None  # ids whose entries are in the session's cache
    texts: Texts | None = None


class ContinuousBatch:
    """Runs calls of one model's generate as rows of one batch.

        batch = ContinuousBatch(model, max_num_seqs=8)
        text = batch.generate(**inputs, max_new_tokens=100)             # from any number of threads
        future = batch.submit(lambda: model.generate(**inputs))         # without a thread that waits

    With early exits all rows exit together, when the least certain one may.

    Args:
        model: accelerated; nothing else may generate with it meanwhile, and it must not change while calls run.
        max_num_seqs: most calls at the same time, at least 1. Others wait in the order of their submission.

    Raises:
        OptionError: (a ``ValueError``) `max_num_seqs` is below 1, or the model has a batch already.
    """

    # One thread uses the model. It calls generate for each call in turn; inside, `Decode` hands the call over (`join`)
    # instead of running it. Between two cycles of the batch, the thread runs a piece of one prompt on a cache of one
    # row, which then joins as the last row. Each call keeps its own processors, criteria, streamer and random numbers,
    # so its output is that of a call alone, and an error in its code ends that call alone.
    #
    #     prompt c   [ piece ]          [ piece ] joins
    #     batch                [ a b ]            [ a b c ] [ a b c ] b ends [ a c ] ...

    _batch: Session  # of the decoder

    def __init__(self, model: PreTrainedModel, max_num_seqs: int = 8) -> None:
        self._model, self._limit = model, _limit("max_num_seqs", max_num_seqs, OptionError)
        self._record = record_of(model.parameters())
        if self._record.batch is not None:
            raise OptionError("this model has a ContinuousBatch already; close it first")
        self._changed = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._starting: _Waiting | None = None
        self._prompt: _Joined | None = None
        self._joined: list[_Joined] = []
        self._decoder: SpeculativeDecoder | None = None
        self._mode: Decode | None = None  # of the decoder's calls
        self._decoding = contextlib.ExitStack()  # transformers' mode for decoding, while there are rows
        self._closed = False
        self._dead: BaseException | None = None
        self._calls = self._tokens = self._prompt_tokens = self._prompt_tokens_kept = 0
        self._first: deque[float] = deque(maxlen=_RECENT)
        self._busy = 0.0
        self._thread = threading.Thread(target=self._run, name="river continuous batch", daemon=True)
        self._record.batch = self
        self._thread.start()

    def submit(self, generate: Callable[[], Any], seed: int | None = None) -> Future[Any]:
        """Make a call in the batch's thread; return immediately.

        Args:
            generate: calls the model's generate and returns its result.
            seed: of the call's random numbers. None: PyTorch's generator, as for the calling thread's next call; it
                advances. Other threads, or a call that runs alone, may draw from that generator too.

        Returns:
            A future of the call's result or exception.

        Raises:
            RuntimeError: the batch was closed, or its thread has died.
        """
        device = self._model.device
        if seed is None:
            state = random_state(device)
            torch.empty((), device=device).uniform_()
        else:
            state = torch.Generator(device).manual_seed(seed).get_state()
        waiting = _Waiting(generate, Future(), state)
        with self._changed:
            if self._closed or self._dead is not None:
                raise RuntimeError("this ContinuousBatch was closed" if self._closed else "its thread has died")
            self._queue.append(waiting)
            self._changed.notify()
        return waiting.future

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's generate as a row of the batch, and wait for it."""
        future = self.submit(lambda: self._model.generate(*args, **kwargs))
        try:
            return future.result()
        except KeyboardInterrupt:
            self.cancel(future)
            raise

    def cancel(self, future: Future[Any]) -> None:
        """Cancel a call, after the current cycle if it runs in the batch; one that runs alone goes on."""
        with self._changed:
            for waiting in (*self._queue, *self._running):
                if waiting.future is future:
                    waiting.cancelled = True
            future.cancel()
            self._changed.notify()

    def close(self) -> None:
        """End all calls with an error; return when the thread has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> ContinuousBatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether calls are accepted."""
        return not self._closed and self._dead is None

    @property
    def counters(self) -> BatchCounters:
        """The totals now."""
        exact = self._record.exit_stats.exact
        with self._changed:
            return BatchCounters(
                rows=self._limit,
                rows_in_use=len(self._running),
                queued=sum(not waiting.future.done() for waiting in self._queue),  # without cancelled ones
                calls=self._calls,
                tokens=self._tokens,
                prompt_tokens=self._prompt_tokens,
                prompt_tokens_kept=self._prompt_tokens_kept,
                drafted=exact.drafted,
                held=exact.accepted,
                first_token_seconds=tuple(self._first),
                busy_seconds=self._busy,
            )

    def join(self, call: Call, mode: Decode, kwargs: Mapping[str, Any]) -> object | None:
        """Take a call over from the loop of generate; None if it has to run alone."""
        waiting = self._starting
        if waiting is None or threading.current_thread() is not self._thread or not self._can_join(call, mode, kwargs):
            return None
        session = mode.session(call, kwargs)
        if not session.kv.is_full:
            return None
        self._prompt = _Joined(waiting, call, mode, session)
        self._prompt_tokens += call.ids_BS.shape[1]
        self._prompt_tokens_kept += session.kv.filled
        return self._prompt

    def _can_join(self, call: Call, mode: Decode, kwargs: Mapping[str, Any]) -> bool:
        strict = isinstance(mode, ExactMode) and mode.strict
        mask, positions = (kwargs.get(name) for name in ("attention_mask", "position_ids"))
        others = [n for n, value in kwargs.items() if n not in BY_SLOT and isinstance(value, Tensor)]
        return (
            len(call.ids_BS) == 1
            and not (call.config.return_dict_in_generate or strict or others or self._record.ranks.several)
            and isinstance(positions, Tensor)
            and all(value is None or value.shape == call.ids_BS.shape for value in (mask, positions))
            and call.config.prefill_chunk_size is None
            and (mode == self._mode or self._decoder is None or not self._decoder.texts)
        )

    @property
    def _held_calls(self) -> list[_Joined]:
        return [*self._joined, *([] if self._prompt is None else [self._prompt])]

    @property
    def _running(self) -> set[_Waiting]:
        """The calls in progress, including one that is starting."""
        begun = {joined.waiting for joined in self._held_calls}
        return begun if self._starting is None else begun | {self._starting}

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._wait():
                    began = time.perf_counter()
                    self._run_prompt()
                    self._advance()
                    self._busy += time.perf_counter() - began
            self._end_all(RuntimeError("this ContinuousBatch was closed"))
        except BaseException as error:
            log.exception("the thread of a ContinuousBatch has died")
            self._dead = error
            self._end_all(error)
            raise
        finally:
            self._record.batch = None

    def _wait(self) -> bool:
        """Wait for work; return False when the batch is closed."""
        with self._changed:
            while not (self._closed or self._queue or self._held_calls):
                self._changed.wait()
            return not self._closed

    def _run_prompt(self) -> None:
        """Run a piece of a prompt, if there is a row for it."""
        if self._prompt is None and self._queue and len(self._joined) < self._limit:
            with self._changed:
                waiting = self._queue.popleft()
            if waiting.future.set_running_or_notify_cancel():
                self._start(waiting)
        if self._prompt is None:
            return
        prompt, call = self._prompt, self._prompt.call
        try:
            if prompt.waiting.cancelled:
                raise CancelledError("the call was cancelled")
            logits = prompt.session.prefill_piece(call.ids_BS, call.config, _PIECE)
            if logits is None:
                return
            prompt.kept = call.ids_BS
            self._become_row(prompt, logits)
        except Exception as error:
            self._end(prompt, error)
        self._prompt = None
        prompt.session.release(prompt.kept, call.ids_BS.shape[1])

    def _start(self, waiting: _Waiting) -> None:
        """Make a call until it joins; one that does not join runs here."""
        set_random_state(self._model.device, waiting.random_state)
        self._starting = waiting
        try:
            result = waiting.generate()
        except BaseException as error:
            self._count(0)
            waiting.future.set_exception(error)
        else:
            if self._prompt is None:
                self._count(0)
                waiting.future.set_result(result)
        finally:
            self._starting = None

    def _become_row(self, prompt: _Joined, logits: Tensor) -> None:
        """Make a call whose prompt has run the last row of the batch."""
        call, session = prompt.call, prompt.session
        if not self._joined:
            self._decoding.enter_context(self._model._optimize_model_for_decode())
        decoder = self._decoder
        try:
            if decoder is None or self._mode != prompt.mode or not self._batch.may_join(session):
                self._mode, self._batch = prompt.mode, Session.empty_batch(session, self._limit)
                self._batch.join(session, call.ids_BS)
                self._decoder = decoder = prompt.mode.decoder(call, self._batch, logits)
            else:
                self._batch.join(session, call.ids_BS)
            generator = torch.Generator(self._model.device)
            generator.set_state(prompt.waiting.random_state)
            prompt.texts = call.texts(session.ranks, decoder.drafts, generator=generator)
            decoder.admit(prompt.texts, logits)
            decoder.drop_finished()
        except Exception as error:
            self._fail(error)
            raise
        self._joined.append(prompt)
        self._first.append(time.perf_counter() - prompt.waiting.since)

    def _advance(self) -> None:
        """Run a cycle of the batch, and return the results of ended calls."""
        for joined in self._joined:
            if joined.waiting.cancelled and joined.texts is not None:
                joined.texts.fail(CancelledError("the call was cancelled"))
        decoder = self._decoder
        try:
            if decoder is not None:
                decoder.drop_finished()
                if decoder.texts:
                    decoder.advance()
                    decoder.drop_finished()
        except Exception as error:
            self._fail(error)
        ended = [joined for joined in self._joined if joined.texts is None or not joined.texts.runs]
        for joined in ended:
            self._end(joined, None if joined.texts is None else joined.texts.error)
        if ended and not self._joined:
            self._decoding.close()
            self._record.write_programs()

    def _fail(self, error: Exception) -> None:
        """End all rows with an error of a shared pass; the next call begins a new batch."""
        self._decoder = None
        for joined in self._joined:
            if joined.texts is not None:
                joined.texts.fail(error)

    def _end(self, joined: _Joined, error: BaseException | None) -> None:
        """Set a call's result or exception."""
        if joined in self._joined:
            self._joined.remove(joined)
        texts, future = joined.texts, joined.waiting.future
        new = 0 if texts is None else texts.new_tokens
        try:
            if error is None and joined.call.streamer is not None:
                joined.call.streamer.end()
        except Exception as raised:
            error = raised
        self._count(new)
        if error is None and texts is not None:
            future.set_result(texts.finish())
        else:
            future.set_exception(error or RuntimeError("no text"))

    def _count(self, tokens: int) -> None:
        with self._changed:
            self._calls += 1
            self._tokens += tokens

    def _end_all(self, error: BaseException) -> None:
        with self._changed:
            queued = [*self._queue]
            self._queue.clear()
        for waiting in queued:
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(error)
        if self._prompt is not None:
            self._prompt.session.release()
        for joined in self._held_calls:
            joined.waiting.future.set_exception(error)
        self._prompt, self._joined = None, []
        self._decoding.close()
