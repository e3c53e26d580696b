"""The calls of a model's clients, as rows of one continuous batch: a queue with an end, and hang-ups that free a row.

Not handled: transformers' own ``--continuous-batching``, which does not call `generate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

from transformers import GenerationConfig
from transformers.cli.serving import utils

from river_compile.cli.serving.connections import ends_with_request
from river_compile.cli.serving.errors import Refused, gone
from river_compile.cli.serving.logged import LoggedStreamer
from river_compile.cli.serving.metrics import Metrics
from river_compile.cli.serving.requests import asked
from river_compile.cli.serving.streams import Stops, Streamer, Whole
from river_compile.cli.serving.tools import CallParser
from river_compile.cli.shared import error_line
from river_compile.decoding.continuous import ContinuousBatch

ENDED = "the generating thread has ended; its log says why. Restart the server"


class Manager(utils.GenerateManager):
    """Hands the calls of a model's clients to a batch; `queue` more than `max_num_seqs` may wait."""

    def __init__(self, model: Any, max_num_seqs: int, queue: int, metrics: Metrics) -> None:
        self.model, self.limit, self.queue, self.metrics = model, max_num_seqs, queue, metrics
        self.batch = ContinuousBatch(model, max_num_seqs)
        self._calls: list[tuple[Future[Any], Any]] = []  # that run or wait, and their streamers
        self._preparing = 0  # requests that will be calls

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Inside, the text of a request that will be submitted becomes tokens; it has a place already.

        Raises:
            Refused: the thread has ended, or the queue is full.
        """
        self.check_place()
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    def check_place(self) -> None:
        """Raise Refused if a request now would be: the thread has ended, or the queue is full."""
        if not self.alive:
            raise Refused(503, "thread_ended", ENDED)
        # A streamed answer has ended for its client before the call returns.
        self._calls = [(call, to) for call, to in self._calls if not (call.done() or getattr(to, "ended", False))]
        if len(self._calls) + self._preparing >= self.limit + self.queue:
            busy = f"{self.limit} requests are running and {self.queue} wait, which is the limit; try again later"
            raise Refused(429, "queue_full", busy, headers={"Retry-After": "1"})

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function in the batch's thread; raise Refused if the thread has ended or the queue is full."""
        self.check_place()
        seed = asked.get().seed
        seed = random.SystemRandom().getrandbits(63) if seed is None else seed
        call = self.batch.submit(functools.partial(fn, *args, **kwargs), seed)
        self._calls.append((call, kwargs.get("streamer")))
        ends_with_request(functools.partial(self.batch.cancel, call))
        return call

    async def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function in the batch's thread and await its result."""
        call = self.submit(fn, *args, **kwargs)
        try:
            return await asyncio.shield(asyncio.wrap_future(call))
        except (asyncio.CancelledError, utils._GenerationCancelled):
            if call.done():  # the call was cancelled, not this task
                raise gone() from None
            raise
        except Exception as error:
            if not self.alive:
                raise Refused(503, "thread_ended", ENDED) from error
            raise

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, Any]:
        """Generate an answer in one piece (transformers' interface)."""
        length = inputs["input_ids"].shape[-1]
        streamer = None if (gen_config.num_beams or 1) > 1 else Whole(self.metrics)  # beams cannot be streamed
        if streamer is not None:
            ends_with_request(streamer.cancel)
        ids = await self.async_submit(
            model.generate, **self._arguments(model, processor, inputs, gen_config), streamer=streamer
        )
        new, stops, limit = ids[0, length:], Stops(asked.get().stops), gen_config.max_new_tokens
        text = stops.cut(processor.decode(new, skip_special_tokens=True))
        stopped = stops.stopped or int(new[-1]) in _ends(gen_config)
        asked.get().ending.cut = limit is not None and len(new) >= limit and not stopped
        return text, length, new

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], utils.DirectStreamer]:
        """Start an answer that is streamed (transformers' interface)."""
        loop, queue, asking = asyncio.get_running_loop(), asyncio.Queue[Any](), asked.get()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        parser = CallParser() if asking.calls else response_parser
        logprobs = asking.logprobs and asking.logprobs()
        arguments = self._arguments(model, processor, inputs, gen_config)
        kept: dict[str, Any] = {
            "response_parser": parser,
            "metrics": self.metrics,
            "limit": gen_config.max_new_tokens,
            "ends": _ends(gen_config),
        }
        if logprobs is None:
            streamer = Streamer(tokenizer, loop, queue, **kept)
        else:
            arguments["logits_processor"].insert(0, logprobs)
            streamer = LoggedStreamer(tokenizer, loop, queue, logprobs=logprobs, **kept)
        ends_with_request(streamer.cancel)
        call = self.submit(model.generate, **arguments, streamer=streamer)
        call.add_done_callback(functools.partial(_tell_end, loop, queue))
        return queue, streamer

    @staticmethod
    def _arguments(model: Any, processor: Any, inputs: Any, config: GenerationConfig) -> dict[str, Any]:
        only_text = {"generation_mode": "text"} if hasattr(model, "has_talker") else {}
        processors = asked.get().processors(inputs["input_ids"].shape[-1])
        if asked.get().grammar is not None and config.eos_token_id is None:  # what ends a text of a grammar
            config.eos_token_id = getattr(processor, "tokenizer", processor).eos_token_id
        return {
            **inputs, "generation_config": config, "tokenizer": processor, "logits_processor": processors, **only_text
        }  # fmt: skip

    @property
    def alive(self) -> bool:
        return self.batch.alive

    def stop(self) -> None:
        """End the batch and its calls."""
        self.batch.close()


class State(utils.GenerationState):
    """Keeps the manager of the served model."""

    def __init__(self, model: Any, max_num_seqs: int, queue: int) -> None:
        super().__init__()
        self.metrics = Metrics(max_num_seqs, lambda: self.manager.batch.counters)
        self.manager = Manager(model, max_num_seqs, queue, self.metrics)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Manager:
        """Return the manager (transformers' interface)."""
        return self.manager

    def shutdown(self) -> None:
        """End the batch."""
        self.manager.stop()


def _ends(config: GenerationConfig) -> frozenset[int]:
    """Return the ids that end a text."""
    ends = config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def _tell_end(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], call: Future[Any]) -> None:
    """End the stream of a call that failed or was cancelled."""
    error = CancelledError() if call.cancelled() else call.exception()
    if error is None:
        return
    cancelled = isinstance(error, (CancelledError, utils._GenerationCancelled))
    # transformers pastes the message into JSON unescaped
    end = None if cancelled else utils._StreamError(error_line(error).replace("\\", "/").replace('"', "'"))
    with contextlib.suppress(RuntimeError):  # the server has ended
        loop.call_soon_threadsafe(queue.put_nowait, end)
