"""Continuous batching: generate calls from any threads join a running batch as rows and leave it at their end.

Not handled (such calls run alone, while the batch waits): several rows, returned caches, models that keep more than
keys and values, strict exact mode, models that several processes share.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from river_compile.agreement import Agreement
from river_compile.decoding.batch_loop import BatchLoop, Row, Submitted
from river_compile.decoding.batch_thread import BatchThread
from river_compile.decoding.call import Call
from river_compile.decoding.inputs import KNOWN
from river_compile.decoding.joining import OpenBatch
from river_compile.decoding.mode import Decode, ExactMode
from river_compile.decoding.sampling import random_state, set_random_state
from river_compile.errors import BatchError, OptionError
from river_compile.kernels.checks import integer
from river_compile.record import find_record, record_of
from river_compile.runtime.stats import ExitStats
from river_compile.upstream.dynamo import OwnCall

log = logging.getLogger("river_compile.continuous")

_MOST = 4096  # rows of a batch: each has its own KV cache
_limit = integer(1, most=_MOST)


@dataclass(frozen=True)
class BatchCounters:
    """Totals of a batch so far.

        with river_compile.ContinuousBatch(model) as batch:
            batch.generate(**inputs, max_new_tokens=16)
            print(batch.counters.tokens)

    Attributes:
        rows: the limit of calls at the same time.
        rows_in_use: calls in progress, including one whose prompt runs and one that runs alone.
        queued: calls that wait for a row.
        calls: calls that have ended, for any reason.
        tokens: new tokens of ended calls.
        prompt_tokens: prompt tokens of joined calls.
        prompt_tokens_kept: those of them that came from the prefix cache.
        drafted: drafted tokens of this model.
        accepted: drafted tokens that were accepted.
        first_token_seconds: seconds from `submit` to the first token, of the latest calls, oldest first.
        busy_seconds: seconds that the batch's thread has worked.
    """

    rows: int
    rows_in_use: int
    queued: int
    calls: int
    tokens: int
    prompt_tokens: int
    prompt_tokens_kept: int
    drafted: int
    accepted: int
    first_token_seconds: tuple[float, ...]
    busy_seconds: float


class ContinuousBatch:
    """Runs calls of one model's generate as rows of one batch.

        with river_compile.ContinuousBatch(model, max_num_seqs=8) as batch:
            output = batch.generate(**inputs, max_new_tokens=100)     # from any number of threads
            future = batch.submit(lambda: model.generate(**inputs))   # without waiting

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
        self._loop = BatchLoop(model, self._limit)
        self._thread = BatchThread(self._loop, record.of(OpenBatch).close)
        self._changed = self._thread.changed
        self._submitted: dict[Future[Any], Submitted] = {}  # until they are done
        self._mine = threading.local()  # the Submitted of a thread
        self._calls = 0
        self._threads = ThreadPoolExecutor(self._limit, "river call")
        weakref.finalize(self, self._thread.drop)
        record.of(OpenBatch).ref = weakref.ref(self)

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
        submitted = Submitted(_generator(self._model.device, seed))
        with self._changed:
            self._thread.check_alive()
            future = self._threads.submit(self._call, submitted, function)
            self._submitted[future] = submitted
        future.add_done_callback(self._forget)
        return future

    def _call(self, submitted: Submitted, function: Callable[[], Any]) -> Any:
        """Run a submitted function in this thread."""
        self._mine.submitted = submitted
        try:
            self._thread.check_alive()
            return function()
        finally:
            self._mine.submitted = None
            with self._changed:
                self._calls += 1

    def _forget(self, future: Future[Any]) -> None:
        with self._changed:
            self._submitted.pop(future, None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's generate as a row of the batch, and wait for it."""
        self._thread.check_alive()
        before = getattr(self._mine, "submitted", None)
        self._mine.submitted = mine = before or Submitted(_generator(self._model.device))
        try:
            return self._model.generate(*args, **kwargs)
        except KeyboardInterrupt:
            self._thread.cancel(mine)
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
            self._thread.cancel(submitted)

    def close(self) -> None:
        """Cancel all calls, which raise an error; return when the batch's thread has ended."""
        self._thread.close()
        self._threads.shutdown(wait=False)  # functions that wait for a thread raise, since the batch is closed

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
        return self._thread.alive

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
                tokens=self._loop.tokens,
                prompt_tokens=self._loop.prompt_tokens,
                prompt_tokens_kept=self._loop.prompt_tokens_kept,
                drafted=exact.drafted,
                accepted=exact.accepted,
                first_token_seconds=tuple(self._loop.first_token_seconds),
                busy_seconds=self._thread.busy_seconds,
            )

    def join(self, call: Call, mode: Decode, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Generate a call's text as a row of the batch; None if it has to run alone."""
        if self._thread.is_this_thread:
            raise BatchError("A processor, criterion or streamer of a ContinuousBatch cannot call the model's generate")
        mine: Submitted | None = getattr(self._mine, "submitted", None)
        if mine is not None and mine.cancelled:
            raise CancelledError("the call was cancelled")
        if self._thread.is_used_here or not _can_join(call, kwargs, mode):
            return None
        owner = mine or Submitted(_generator(self._model.device))
        row = Row(call, mode, kwargs, owner)
        self._thread.add(row)
        try:
            text = row.result.result()
        except KeyboardInterrupt:
            self._thread.cancel(owner)
            raise
        if text is None and mine is None:  # the call runs alone, with the numbers of PyTorch's generator
            set_random_state(self._model.device, owner.generator.get_state())
        return text

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the batch waits, and a call of this thread may use the model."""
        if self._thread.is_used_here:  # a call inside of a call that runs alone
            yield
            return
        mine: Submitted | None = getattr(self._mine, "submitted", None)
        with self._thread.alone(), contextlib.nullcontext() if mine is None else _drawing_from(mine.generator):
            yield


def _generator(device: torch.device, seed: int | None = None) -> torch.Generator:
    """Return a generator; without a seed it continues PyTorch's, which advances."""
    generator = torch.Generator(device)
    if seed is not None:
        return generator.manual_seed(seed)
    generator.set_state(random_state(device))
    torch.empty((), device=device).uniform_()
    return generator


def _can_join(call: Call, kwargs: Mapping[str, Any], mode: Decode) -> bool:
    """Whether a call can be a row next to others."""
    strict = isinstance(mode, ExactMode) and mode.strict
    shared = record_of(call.model.parameters()).of(Agreement).several
    mask, positions = (kwargs.get(name) for name in ("attention_mask", "position_ids"))
    return (
        len(call.ids_BS) == 1
        and KNOWN.issuperset(kwargs)  # rows have the same arguments
        and not (call.config.return_dict_in_generate or strict or shared)
        and isinstance(positions, Tensor)
        and all(value is None or value.shape == call.ids_BS.shape for value in (mask, positions))
        and call.config.prefill_chunk_size is None
    )


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
