"""Continuous batching: generate calls from any threads join a running batch as rows and leave it at their end.

Not handled (such calls run alone, while the batch waits): several rows, returned caches, models that keep more than
keys and values, strict exact mode, models that several processes share.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from river_compile.agreement import Agreement
from river_compile.decoding.inputs import KNOWN
from river_compile.decoding.joining import OpenBatch
from river_compile.decoding.mode import Call, Decode, ExactMode
from river_compile.decoding.passes import Passes
from river_compile.decoding.prompt import Prompt
from river_compile.decoding.rows import empty_batch, join, may_join
from river_compile.decoding.sampling import random_state, set_random_state
from river_compile.decoding.speculative import SpeculativeDecoder, Texts
from river_compile.errors import BatchError, OptionError
from river_compile.kernels.checks import integer
from river_compile.record import find_record
from river_compile.runtime.stats import ExitStats
from river_compile.upstream.dynamo import OwnCall

log = logging.getLogger("river_compile.continuous")

_PIECE = 128  # prompt tokens between two cycles
_RECENT = 1000  # calls in `first_token_seconds`
_CLOSED = "This ContinuousBatch was closed. Create another one"
_ENDED = "The thread of this ContinuousBatch has ended. The log says why. Create another one"
_MOST = 4096  # rows of a batch: each has its own KV cache
_limit = integer(1, most=_MOST)


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
    accepted: int  # drafted tokens
    first_token_seconds: tuple[float, ...]  # from `submit` to the first token, of the latest calls, oldest first
    busy_seconds: float  # of the batch's thread


@dataclass(eq=False)
class _Submitted:
    """A submitted callable, which a separate thread runs."""

    generator: torch.Generator  # of its calls' random numbers
    since: float = field(default_factory=time.perf_counter)
    cancelled: bool = False


@dataclass(eq=False)
class _Row:
    """A generate call that waits for a row, or has one."""

    call: Call
    mode: Decode
    kwargs: Mapping[str, Any]
    owner: _Submitted
    result: Future[Tensor | None] = field(default_factory=Future)  # None: the call has to run alone
    passes: Passes | None = None  # of the prompt
    prompt: Prompt | None = None
    kept: Tensor | None = None  # ids whose entries are in the cache of the passes
    texts: Texts | None = None  # while it is generated


class ContinuousBatch:
    """Runs calls of one model's generate as rows of one batch.

        batch = ContinuousBatch(model, max_num_seqs=8)
        text = batch.generate(**inputs, max_new_tokens=100)             # from any number of threads
        future = batch.submit(lambda: model.generate(**inputs))         # without waiting

    Leaving a ``with`` block waits for what was submitted, as executors of `concurrent.futures` do.
    With early exits all rows exit together, when the least certain one may.

    Args:
        model: accelerated; it must not change while calls run.
        max_num_seqs: most calls at the same time, 1 to 4096. Others wait in the order of their submission.

    Raises:
        OptionError: (a ``ValueError``) `max_num_seqs` is out of range, the model is not accelerated, or it has a batch.
    """

    # A submitted callable runs in a separate thread. Its generate call ends in `join`, which waits for the result.
    # One thread runs the rows: between two cycles, it runs a piece of one prompt on a cache of one row, which joins
    # as the last row. Each call keeps its own processors, criteria, streamer and random numbers, so its output is that
    # of a call alone, and an error in its code ends that call alone.
    #
    #     prompt c   [ piece ]          [ piece ] joins
    #     batch                [ a b ]            [ a b c ] [ a b c ] b ends [ a c ] ...

    _batch: Passes  # of the decoder

    def __init__(self, model: PreTrainedModel, max_num_seqs: int = 8) -> None:
        self._limit = _limit("max_num_seqs", max_num_seqs, OptionError)
        record = find_record(model)
        if record is None or record.find(OwnCall) is None:
            raise OptionError(
                f"ContinuousBatch requires an accelerated model, and this {type(model).__name__} is not. Call "
                "river_compile.accelerate(model) first",
                id="RC006",
            )
        if record.of(OpenBatch).batch is not None:
            raise OptionError("This model has a ContinuousBatch already. Close that one first", id="RC003")
        self._model, self._record = model, record
        self._changed = threading.Condition()
        self._waiting: deque[_Row] = deque()
        self._prompt: _Row | None = None  # its prompt runs
        self._rows: list[_Row] = []  # they are generated
        self._submitted: dict[Future[Any], _Submitted] = {}  # until they are done
        self._mine = threading.local()  # the _Submitted of a thread
        self._alone = 0  # calls that run alone, or wait to
        self._busy_with: object | None = None  # what uses the model: the batch's thread, or a call alone
        self._decoder: SpeculativeDecoder | None = None
        self._mode: Decode | None = None  # of the decoder's calls
        self._decoding = contextlib.ExitStack()  # transformers' mode for decoding, while there are rows
        self._closed = False
        self._dead: BaseException | None = None
        self._calls = self._tokens = self._prompt_tokens = self._prompt_tokens_kept = 0
        self._first: deque[float] = deque(maxlen=_RECENT)
        self._busy = 0.0
        self._threads = ThreadPoolExecutor(self._limit, "river call")
        # The thread holds the batch only while there is work, so a batch that is dropped ends by itself.
        self._thread = threading.Thread(
            target=_run, args=(weakref.ref(self), self._changed), name="river continuous batch", daemon=True
        )
        weakref.finalize(self, _notify, self._changed)
        record.of(OpenBatch).ref = weakref.ref(self)
        self._thread.start()

    def submit(self, function: Callable[[], Any], seed: int | None = None) -> Future[Any]:
        """Run a function that calls the model's generate, in a separate thread; return immediately.

        Args:
            function: may call generate any number of times, and return anything.
            seed: of its calls' random numbers. None: PyTorch's generator, as for the calling thread's next call; it
                advances.

        Returns:
            A future of the function's result or exception.

        Raises:
            BatchError: (a ``RuntimeError``) the batch was closed, or its thread has ended.
        """
        submitted = _Submitted(self._generator(seed))
        with self._changed:
            self._check_open()
            future = self._threads.submit(self._call, submitted, function)
            self._submitted[future] = submitted
        future.add_done_callback(self._forget)
        return future

    def _generator(self, seed: int | None) -> torch.Generator:
        device = self._model.device
        generator = torch.Generator(device)
        if seed is not None:
            return generator.manual_seed(seed)
        generator.set_state(random_state(device))
        torch.empty((), device=device).uniform_()
        return generator

    def _call(self, submitted: _Submitted, function: Callable[[], Any]) -> Any:
        """Run a submitted function in this thread."""
        self._mine.submitted = submitted
        try:
            self._check_open()
            return function()
        finally:
            self._mine.submitted = None
            with self._changed:
                self._calls += 1

    def _forget(self, future: Future[Any]) -> None:
        with self._changed:
            self._submitted.pop(future, None)

    def _check_open(self) -> None:
        if self._closed or self._dead is not None:
            raise BatchError(_CLOSED if self._closed else _ENDED)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's generate as a row of the batch, and wait for it."""
        self._check_open()
        before = getattr(self._mine, "submitted", None)
        self._mine.submitted = mine = before or _Submitted(self._generator(None))
        try:
            return self._model.generate(*args, **kwargs)
        except KeyboardInterrupt:
            self._cancel(mine)
            raise
        finally:
            self._mine.submitted = before
            if before is None:
                with self._changed:
                    self._calls += 1

    def cancel(self, future: Future[Any]) -> None:
        """Cancel a submitted function: its generate call ends after the current cycle, unless it runs alone."""
        future.cancel()
        with self._changed:
            submitted = self._submitted.get(future)
        if submitted is not None:
            self._cancel(submitted)

    def _cancel(self, submitted: _Submitted) -> None:
        with self._changed:
            submitted.cancelled = True
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel all calls, which raise an error; return when the batch's thread has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._threads.shutdown(wait=False)  # functions that wait for a thread raise, since the batch is closed
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> ContinuousBatch:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            while running := self._running():  # which may submit others
                wait(running)
        finally:
            self.close()

    def _running(self) -> list[Future[Any]]:
        with self._changed:
            return [future for future in self._submitted if not future.done()]

    @property
    def alive(self) -> bool:
        """Whether calls are accepted."""
        return not self._closed and self._dead is None

    @property
    def counters(self) -> BatchCounters:
        """The totals now."""
        exact = self._record.of(ExitStats).exact
        with self._changed:
            running = sum(future.running() for future in self._submitted)
            return BatchCounters(
                rows=self._limit,
                rows_in_use=running,
                queued=sum(not future.done() for future in self._submitted) - running,
                calls=self._calls,
                tokens=self._tokens,
                prompt_tokens=self._prompt_tokens,
                prompt_tokens_kept=self._prompt_tokens_kept,
                drafted=exact.drafted,
                accepted=exact.accepted,
                first_token_seconds=tuple(self._first),
                busy_seconds=self._busy,
            )

    def join(self, call: Call, mode: Decode, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Generate a call's text as a row of the batch; None if it has to run alone."""
        if threading.current_thread() is self._thread:
            raise BatchError("A processor, criterion or streamer of a ContinuousBatch cannot call the model's generate")
        mine: _Submitted | None = getattr(self._mine, "submitted", None)
        if mine is not None and mine.cancelled:
            raise CancelledError("the call was cancelled")
        if self._busy_with is threading.current_thread() or not self._can_join(call, kwargs, mode):
            return None
        owner = mine or _Submitted(self._generator(None))
        row = _Row(call, mode, kwargs, owner)
        with self._changed:
            self._check_open()
            self._waiting.append(row)
            self._changed.notify_all()
        try:
            text = row.result.result()
        except KeyboardInterrupt:
            self._cancel(owner)
            raise
        if text is None and mine is None:  # the call runs alone, with the numbers of PyTorch's generator
            set_random_state(self._model.device, owner.generator.get_state())
        return text

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the batch waits, and a call of this thread may use the model."""
        if self._busy_with is threading.current_thread():  # a call inside of a call that runs alone
            yield
            return
        mine: _Submitted | None = getattr(self._mine, "submitted", None)
        with self._changed:
            self._alone += 1
            while self._busy_with is not None and not self._closed:
                self._changed.wait()
            self._busy_with = threading.current_thread()
        try:
            with contextlib.nullcontext() if mine is None else _drawing_from(mine.generator):
                yield
        finally:
            with self._changed:
                self._alone -= 1
                self._busy_with = None
                self._changed.notify_all()

    def _can_join(self, call: Call, kwargs: Mapping[str, Any], mode: Decode) -> bool:
        strict = isinstance(mode, ExactMode) and mode.strict
        mask, positions = (kwargs.get(name) for name in ("attention_mask", "position_ids"))
        return (
            len(call.ids_BS) == 1
            and KNOWN.issuperset(kwargs)  # rows have the same arguments
            and not (call.config.return_dict_in_generate or strict or self._record.of(Agreement).several)
            and isinstance(positions, Tensor)
            and all(value is None or value.shape == call.ids_BS.shape for value in (mask, positions))
            and call.config.prefill_chunk_size is None
        )

    @property
    def _has_work(self) -> bool:
        return bool(self._waiting or self._rows or self._prompt is not None)

    def _turn(self) -> bool:
        """Take the model for a cycle; return False if the batch is closed, or if there is nothing to do."""
        with self._changed:
            while self._has_work and not self._closed and (self._alone or self._busy_with is not None):
                self._changed.wait()
            if self._closed or not self._has_work:
                return False
            self._busy_with = self._thread
        return True

    def _cycle(self) -> None:
        """Run a piece of a prompt and a cycle of the rows, in the batch's thread."""
        began = time.perf_counter()
        try:
            with torch.no_grad():
                self._run_prompt()
                self._advance()
        finally:
            with self._changed:
                self._busy_with = None
                self._busy += time.perf_counter() - began
                self._changed.notify_all()

    def _run_prompt(self) -> None:
        """Run a piece of a prompt, if there is a row for it."""
        if self._prompt is None and self._waiting and len(self._rows) < self._limit:
            with self._changed:
                self._prompt = self._waiting.popleft()
        if self._prompt is None:
            return
        row, call = self._prompt, self._prompt.call
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
            row.kept = call.ids_BS
            self._become_row(row, row.passes, logits)
        except BaseException as error:
            self._end(row, error)
        self._prompt = None
        if row.passes is not None:
            row.passes.release(row.kept, call.ids_BS.shape[1])

    def _begin(self, row: _Row) -> bool:
        """Make the passes of a call's prompt; return False if the call has to run alone."""
        if self._decoder is not None and self._decoder.texts and row.mode != self._mode:
            return False
        passes = row.mode.passes(row.call, row.kwargs)
        if not passes.kv.is_full:
            passes.release()
            return False
        row.passes, row.prompt = passes, Prompt(passes, row.call.ids_BS, row.call.config)
        self._prompt_tokens += row.call.ids_BS.shape[1]
        self._prompt_tokens_kept += passes.kv.filled
        return True

    def _become_row(self, row: _Row, passes: Passes, logits: Tensor) -> None:
        """Make a call whose prompt has run the last row of the batch."""
        call = row.call
        if not self._rows:
            self._decoding.enter_context(self._model._optimize_model_for_decode())
        decoder = self._decoder
        try:
            if decoder is None or self._mode != row.mode or not may_join(self._batch, passes):
                self._mode, self._batch = row.mode, empty_batch(passes, self._limit)
                join(self._batch, passes, call.ids_BS)
                self._decoder = decoder = row.mode.decoder(call, self._batch, logits)
            else:
                join(self._batch, passes, call.ids_BS)
            row.texts = call.texts(passes.agreement, decoder.drafts, generator=row.owner.generator)
            decoder.admit(row.texts, logits)
            decoder.drop_finished()
        except Exception as error:
            self._fail(error)
            raise
        self._rows.append(row)
        self._first.append(time.perf_counter() - row.owner.since)

    def _advance(self) -> None:
        """Run a cycle of the rows, and return the results of ended calls."""
        for row in self._rows:
            if row.owner.cancelled and row.texts is not None:
                row.texts.fail(CancelledError("the call was cancelled"))
        decoder = self._decoder
        try:
            if decoder is not None:
                decoder.drop_finished()
                if decoder.texts:
                    decoder.advance()
                    decoder.drop_finished()
        except Exception as error:
            self._fail(error)
        ended = [row for row in self._rows if row.texts is None or not row.texts.runs]
        for row in ended:
            self._end(row, None if row.texts is None else row.texts.error)
        if ended and not self._rows:
            self._decoding.close()
            self._batch.write_programs()

    def _fail(self, error: Exception) -> None:
        """End all rows with an error of a shared pass; the next call begins a new batch."""
        self._decoder = None
        for row in self._rows:
            if row.texts is not None:
                row.texts.fail(error)

    def _end(self, row: _Row, error: BaseException | None) -> None:
        """Set a call's result or exception."""
        if row in self._rows:
            self._rows.remove(row)
        try:
            if error is None and row.call.streamer is not None:
                row.call.streamer.end()
        except BaseException as raised:
            error = raised
        with self._changed:
            self._tokens += 0 if row.texts is None else row.texts.new_tokens
        if error is None and row.texts is not None:
            row.result.set_result(row.texts.finish())
        else:
            row.result.set_exception(error or RuntimeError("no text"))

    def _end_all(self, error: BaseException) -> None:
        """End all calls with an error, as the batch's thread does last."""
        with self._changed:
            rows = [*self._waiting, *self._rows, *([] if self._prompt is None else [self._prompt])]
            self._waiting.clear()
            prompt, self._prompt, self._rows = self._prompt, None, []
        if prompt is not None and prompt.passes is not None:
            prompt.passes.release()
        for row in rows:
            row.result.set_exception(error)
        self._decoding.close()
        self._record.of(OpenBatch).ref = None


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Inside, PyTorch's generator continues another one; afterwards it is as it was."""
    before = random_state(generator.device)
    set_random_state(generator.device, generator.get_state())
    try:
        yield
    finally:
        generator.set_state(random_state(generator.device))
        set_random_state(generator.device, before)


def _notify(changed: threading.Condition) -> None:
    with changed:
        changed.notify_all()


def _run(batch_ref: weakref.ref[ContinuousBatch], changed: threading.Condition) -> None:
    """Run a batch's cycles until it is closed or dropped."""
    while True:
        with changed:
            batch = batch_ref()
            if batch is not None and not (batch._closed or batch._has_work):
                batch = None
                if batch_ref() is not None:
                    changed.wait()
                continue
        if batch is None:
            return
        try:
            if batch._turn():
                batch._cycle()
            elif batch._closed:
                batch._end_all(BatchError(_CLOSED))
                return
        except BaseException as error:
            log.exception("the thread of a ContinuousBatch has died")
            batch._dead = error
            batch._end_all(error)
            raise
        batch = None
