"""Continuous batching: calls of generate that join a running batch as rows, and leave it when their texts end.

    batch = ContinuousBatch(model, rows=8)
    text = batch.generate(**inputs, max_new_tokens=100)             # from any number of threads
    future = batch.submit(lambda: model.generate(**inputs))         # without a thread that waits

One thread does everything that touches the model. It calls generate for each call in turn; inside, the model's loop
hands the call over (:meth:`ContinuousBatch.join`) instead of running it. Between two cycles of the batch the thread
runs a piece of one waiting prompt, on a cache of one row; when the prompt is done its entries become the batch's last
row. A call keeps its own logits processors, stopping criteria, streamer and random numbers, so its text is what it
would be alone, and an error or a streamer that raises ends that call alone.

    prompt c   [ piece ]          [ piece ] joins
    batch                [ a b ]            [ a b c ] [ a b c ] b ends [ a c ] ...

The model must not change while calls run: a change takes effect when the batch is empty.

Not handled (such calls run by themselves, and the batch waits): batches of several rows, caches that the caller gets
back, models that keep more than keys and values, strict exact mode, ranks that share a model. With early exits rows
leave the backbone together, when the least sure one may: each token runs as many blocks as alone, or more.
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

_PIECE = 128  # tokens of a prompt between two cycles
_RECENT = 1000  # calls whose time to the first token is remembered
_rows = integer(1)


@dataclass(frozen=True)
class BatchCounters:
    """What a batch has done so far.

    Attributes:
        rows: that there may be.
        rows_in_use: calls whose texts are being generated, one whose prompt runs and one that runs by itself included.
        queued: calls that wait for a row.
        calls: that have ended, well or not.
        tokens: new ones, of calls that have ended.
        prompt_tokens, prompt_tokens_kept: of calls that have joined, and those of them that a kept text began with.
        drafted, held: tokens that the river or the context drafted in this model, and those of them that held.
        first_token_seconds: from `submit` to the first token, of the latest calls, oldest first.
        busy_seconds: in which the thread had work.
    """

    rows: int
    rows_in_use: int
    queued: int
    calls: int
    tokens: int
    prompt_tokens: int
    prompt_tokens_kept: int
    drafted: int
    held: int
    first_token_seconds: tuple[float, ...]
    busy_seconds: float


@dataclass(eq=False)
class _Waiting:
    """A call that was submitted."""

    generate: Callable[[], Any]
    future: Future[Any]
    random_state: Tensor
    since: float = field(default_factory=time.perf_counter)
    cancelled: bool = False


@dataclass(eq=False)
class _Joined:
    """A call that was handed over: its prompt runs, or its text is being generated."""

    waiting: _Waiting
    call: Call
    mode: Decode
    session: Session  # of the prompt
    kept: Tensor | None = None  # ids whose entries are in the session's cache
    texts: Texts | None = None


class ContinuousBatch:
    """Calls of one model's generate, up to `rows` of which run as rows of one batch.

    Args:
        model: accelerated; nothing else may generate with it meanwhile.
        rows: most calls at the same time, at least 1. More wait in the order in which they came.

    Raises:
        OptionError: (a ``ValueError``) `rows` is no such number, or the model has a batch already.
    """

    _batch: Session  # of the decoder

    def __init__(self, model: PreTrainedModel, rows: int = 8) -> None:
        self._model, self._limit = model, _rows("rows", rows, OptionError)
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
        self._held = contextlib.ExitStack()  # while there are rows
        self._closed = False
        self._dead: BaseException | None = None
        self._calls = self._tokens = self._prompt_tokens = self._prompt_tokens_kept = 0
        self._first: deque[float] = deque(maxlen=_RECENT)
        self._busy = 0.0
        self._thread = threading.Thread(target=self._run, name="river continuous batch", daemon=True)
        self._record.batch = self
        self._thread.start()

    def submit(self, generate: Callable[[], Any], seed: int | None = None) -> Future[Any]:
        """Has a call made in the batch's thread; returns at once.

        Args:
            generate: calls the model's generate and returns what that returns.
            seed: of its random numbers. None: it draws them as the calling thread's next call of generate would, from
                PyTorch's generator, which then moves on. That is the process's: where several threads draw, and while
                the batch makes a call that does not join, a seed that was set right before may be another's by now.

        Returns:
            The call's result, or what it raised.

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
        """Calls the model's generate as a row of the batch, and waits for it."""
        future = self.submit(lambda: self._model.generate(*args, **kwargs))
        try:
            return future.result()
        except KeyboardInterrupt:
            self.cancel(future)
            raise

    def cancel(self, future: Future[Any]) -> None:
        """Ends a call: at once where it waits, after the cycle that runs where it is or becomes a row; others go on.

        A call that runs by itself goes on, too.
        """
        with self._changed:
            for waiting in (*self._queue, *self._running):
                if waiting.future is future:
                    waiting.cancelled = True
            future.cancel()
            self._changed.notify()

    def close(self) -> None:
        """Ends all calls, those that wait and those that run, with an error; returns when the thread has ended."""
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
        """Whether calls are taken."""
        return not self._closed and self._dead is None

    @property
    def counters(self) -> BatchCounters:
        """What it has done so far."""
        exact = self._record.exit_stats.exact
        with self._changed:
            return BatchCounters(
                rows=self._limit,
                rows_in_use=len(self._running),
                queued=sum(not waiting.future.done() for waiting in self._queue),  # (a cancelled one stays in it)
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
        """Takes a call over from the generate that the batch's thread is in; called by the model's loop.

        Returns:
            What stands for the result; None where the call has to run by itself, or comes from another thread.
        """
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
        """The calls that the thread has begun, one that is on its way in included."""
        begun = {joined.waiting for joined in self._held_calls}
        return begun if self._starting is None else begun | {self._starting}

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._wait():
                    began = time.perf_counter()
                    self._take_in()
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
        """Waits for work; returns False when the batch is closed."""
        with self._changed:
            while not (self._closed or self._queue or self._held_calls):
                self._changed.wait()
            return not self._closed

    def _take_in(self) -> None:
        """Runs a piece of a prompt, if there is a row for it."""
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
        """Makes a call up to where it joins; one that does not runs here."""
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
        """Makes a call whose prompt has run the last row of the batch."""
        call, session = prompt.call, prompt.session
        if not self._joined:
            self._held.enter_context(self._model._optimize_model_for_decode())
        decoder = self._decoder
        try:
            if decoder is None or self._mode != prompt.mode or not self._batch.may_join(session):
                self._mode, self._batch = prompt.mode, Session.of_rows(session, self._limit)
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
        """Runs a cycle of the batch, and hands over the texts that have ended."""
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
            self._held.close()
            self._record.write_programs()

    def _fail(self, error: Exception) -> None:
        """Ends all rows for an error in a pass of theirs; the next call begins a new batch."""
        self._decoder = None
        for joined in self._joined:
            if joined.texts is not None:
                joined.texts.fail(error)

    def _end(self, joined: _Joined, error: BaseException | None) -> None:
        """Hands over a text, or what ended it."""
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
        self._held.close()
