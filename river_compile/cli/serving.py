"""An OpenAI-compatible server: transformers' routes, schemas and streaming, over River's continuous batch.

While it starts, three names of transformers' server are replaced: the class that loads models, the one that keeps a
manager of calls for each model, and the function that builds the app. Not handled: transformers' own
``--continuous-batching``, which does not call `generate`; audio, whose calls run exclusively; websockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from torch import Tensor
from transformers import GenerationConfig
from transformers.cli.serving import model_manager, server, utils
from transformers.generation.streamers import BaseStreamer

from river_compile.api.accelerate import accelerate
from river_compile.cli.requests import Refused, Stops, answer_error, asked, prepare, watch
from river_compile.cli.shared import error_line, loading
from river_compile.decoding.continuous import BatchCounters, ContinuousBatch

logger = logging.getLogger(__name__)

_WARM_UP = 8  # tokens of a prompt, and after it
ENDED = "the generating thread has ended; its log says why. Restart the server"


class Models(model_manager.ModelManager):
    """Loads models and accelerates them; a loaded model has generated, so that no client waits for its tracing."""

    def __init__(self, acceleration: dict[str, Any], max_num_seqs: int, *args: Any, **kwargs: Any) -> None:
        self.acceleration, self.limit = acceleration, max_num_seqs
        super().__init__(*args, **kwargs)

    def _load_processor(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with loading(name):
            return super()._load_processor(name, *args, **kwargs)

    def _load_model(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with loading(name):
            model = super()._load_model(name, *args, **kwargs)
        accelerate(model, **self.acceleration)
        prompt = torch.ones((1, _WARM_UP), dtype=torch.long, device=model.device)
        with ContinuousBatch(model, self.limit) as batch:
            length = {"max_new_tokens": _WARM_UP, "min_new_tokens": _WARM_UP}
            call = functools.partial(model.generate, prompt, do_sample=False, **length)
            for ended in [batch.submit(call) for _ in range(min(self.limit, 2))]:  # one row, and several
                ended.result()
        return model


class Manager(utils.GenerateManager):
    """Hands the calls of a model's clients to a batch; `queue` more than `max_num_seqs` may wait."""

    def __init__(self, model: Any, max_num_seqs: int, queue: int, metrics: Metrics) -> None:
        self.model, self.limit, self.queue, self.metrics = model, max_num_seqs, queue, metrics
        self.batch = ContinuousBatch(model, max_num_seqs)
        self._calls: list[tuple[Future[Any], Any]] = []  # that run or wait, and their streamers

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function in the batch's thread; raise Refused if the thread has ended or the queue is full."""
        if not self.alive:
            raise Refused(503, "thread_ended", ENDED)
        # A streamed answer has ended for its client before the call returns.
        self._calls = [(call, to) for call, to in self._calls if not (call.done() or getattr(to, "ended", False))]
        if len(self._calls) >= self.limit + self.queue:
            busy = f"{self.limit} requests are running and {self.queue} wait, which is the limit; try again later"
            raise Refused(429, "queue_full", busy, {"Retry-After": "1"})
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
                raise Refused(CLIENT_GONE, "client_gone", "the client has gone") from None
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
        prepare(gen_config, model, length)
        streamer = None if (gen_config.num_beams or 1) > 1 else Whole(self.metrics)  # beams cannot be streamed
        if streamer is not None:
            ends_with_request(streamer.cancel)
        ids = await self.async_submit(
            model.generate, **self._arguments(model, processor, inputs, gen_config), streamer=streamer
        )
        text = processor.decode(ids[0, length:], skip_special_tokens=True)
        return Stops(asked.get().stops).cut(text), length, ids[0, length:]

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
        prepare(gen_config, model, inputs["input_ids"].shape[-1])
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = Streamer(tokenizer, loop, queue, response_parser=response_parser, metrics=self.metrics)
        ends_with_request(streamer.cancel)
        call = self.submit(model.generate, **self._arguments(model, processor, inputs, gen_config), streamer=streamer)
        call.add_done_callback(functools.partial(_tell_end, loop, queue))
        return queue, streamer

    @staticmethod
    def _arguments(model: Any, processor: Any, inputs: Any, config: GenerationConfig) -> dict[str, Any]:
        only_text = {"generation_mode": "text"} if hasattr(model, "has_talker") else {}
        processors = asked.get().processors(inputs["input_ids"].shape[-1])
        return {
            **inputs, "generation_config": config, "tokenizer": processor, "logits_processor": processors, **only_text
        }  # fmt: skip

    @property
    def alive(self) -> bool:
        return self.batch.alive

    def stop(self) -> None:
        """End the batch and its calls."""
        self.batch.close()


class Tokens:
    """Counts one call's tokens in the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._began, self._puts = metrics, time.monotonic(), 0

    def put(self, value: Tensor) -> None:
        """Called with each value of a streamer: first the prompt, then tokens."""
        self._puts += 1
        if self._puts == 2:
            self._metrics.first_token.observe(time.monotonic() - self._began)
        if self._puts > 1:
            self._metrics.tokens.inc(value.numel())


class Streamer(utils.DirectStreamer):
    """Streams an answer up to a stop string; the call ends at the token after a hang-up (transformers' part)."""

    def __init__(self, *args: Any, metrics: Metrics, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens, self._stops = Tokens(metrics), Stops(asked.get().stops)
        self.ended = False

    def put(self, value: Tensor) -> None:
        self._tokens.put(value)
        super().put(value)

    def end(self) -> None:
        self.ended = True
        super().end()

    def _enqueue(self, item: Any) -> None:
        if type(item) is str:  # (reasoning is a subclass)
            item = self._stops.feed(item)
        elif rest := self._stops.rest():
            super()._enqueue(rest)
        if item != "":
            super()._enqueue(item)


class Whole(BaseStreamer):
    """Counts tokens of an answer in one piece, and ends its call after a hang-up."""

    def __init__(self, metrics: Metrics) -> None:
        self._tokens, self._cancelled = Tokens(metrics), False

    def put(self, value: Tensor) -> None:
        if self._cancelled:
            raise utils._GenerationCancelled
        self._tokens.put(value)

    def end(self) -> None:
        pass

    def cancel(self) -> None:
        self._cancelled = True


class State(utils.GenerationState):
    """Keeps a manager for each model."""

    def __init__(self, max_num_seqs: int, queue: int, **theirs: Any) -> None:
        super().__init__(**theirs)
        self.limit, self.queue = max_num_seqs, queue
        self.models: Any = None  # the server's manager of models
        self.metrics = Metrics(max_num_seqs, lambda: [manager.batch.counters for manager in self.managers])

    @property
    def managers(self) -> list[Manager]:
        return [*self._generate_managers.values()]

    def get_manager(self, model_id: str, use_cb: bool = False) -> Manager:
        """Return the manager of a loaded model; a model that was reloaded gets a new one."""
        model = self.models.loaded_models[model_id].model
        manager = self._generate_managers.get(model_id)
        if manager is None or manager.model is not model:
            if manager is not None:
                manager.stop()
            manager = Manager(model, self.limit, self.queue, self.metrics)
            self._generate_managers[model_id] = manager
        return manager

    def is_cb_alive(self) -> bool:
        """Whether every batch's thread runs; if not, /health answers 503."""
        dead = [name for name, manager in self._generate_managers.items() if not manager.alive]
        if dead:
            logger.error("%s (%s)", ENDED, ", ".join(dead))
        return not dead

    def shutdown(self) -> None:
        """End every batch."""
        for manager in self.managers:
            manager.stop()
        super().shutdown()


def start(
    folder: str,
    host: str,
    port: int,
    dtype: str,
    device: str,
    max_num_seqs: int,
    queue: int,
    acceleration: dict[str, Any],
) -> Any:
    """Start transformers' server in a thread and return it; raise a ValueError if the model cannot be loaded."""
    from transformers.cli.serve import Serve

    build_server = server.build_server

    def build(models: Any, *handlers: Any, generation_state: State, **more: Any) -> FastAPI:
        generation_state.models = models
        for handler in (*handlers, *more.values()):
            watch(handler)
        app = build_server(models, *handlers, generation_state=generation_state, **more)
        return extend(app, generation_state.metrics)

    with (
        _replaced(model_manager, "ModelManager", functools.partial(Models, acceleration, max_num_seqs)),
        _replaced(utils, "GenerationState", functools.partial(State, max_num_seqs, queue)),
        _replaced(server, "build_server", build),
    ):
        return Serve(force_model=folder, host=host, port=port, dtype=dtype, device=device, non_blocking=True)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    theirs = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, theirs)


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


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CLIENT_GONE = 499  # nginx's status for a client that hung up, for logs and metrics

_ends: ContextVar[list[Callable[[], object]]] = ContextVar("_ends")  # called when the request ends

# Fields of a batch's counters: name of the metric after "river:" (vLLM's names where it has one), and meaning.
_COUNTERS = {
    "calls": ("finished_requests", "Generate calls that have ended, successfully or not."),
    "drafted": ("spec_decode_num_draft_tokens", "Drafted tokens."),
    "held": ("spec_decode_num_accepted_tokens", "Accepted draft tokens."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens."),
    "prompt_tokens_kept": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "busy_seconds": ("busy_seconds", "Time with at least one running request."),
}
_GAUGES = {
    "rows_in_use": ("num_requests_running", "Requests that generate now."),
    "queued": ("num_requests_waiting", "Requests that wait."),
}
_FIRST_TOKEN = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60)


def ends_with_request(end: Callable[[], object]) -> None:
    """Register a call for the end of the current request: its answer, or its client's hang-up."""
    ends = _ends.get(None)
    if ends is not None:
        ends.append(end)


class EndsWithClient:
    """ASGI middleware: ends all calls of a request with it, and counts requests by path and status.

    Starlette cancels a stream whose client hung up, but lets a handler that answers in one piece run to its end.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], requests: Counter) -> None:
        self.app, self.requests = app, requests

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        ends: list[Callable[[], object]] = []
        status, answered = 500, False  # an uncaught error becomes 500 further outside
        gone: asyncio.Task[None] | None = None

        async def hang_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            _end_all(ends)

        async def received() -> Message:
            nonlocal gone
            if gone is not None:  # the body was read, so only the hang-up can follow
                await asyncio.shield(gone)
                return {"type": "http.disconnect"}
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                gone = asyncio.create_task(hang_up())
            return message

        async def sent(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not (gone and gone.done()):
                answered = not message.get("more_body", False)
            await send(message)

        inside = _ends.set(ends)
        try:
            await self.app(scope, received, sent)
        finally:
            _ends.reset(inside)
            if gone is not None:
                status = CLIENT_GONE if gone.done() and not answered else status
                gone.cancel()
            _end_all(ends)
            path = getattr(scope.get("route"), "path", "other")  # the client's own paths are unbounded
            self.requests.labels(path, str(status)).inc()


def _end_all(ends: list[Callable[[], object]]) -> None:
    while ends:
        ends.pop()()


class Metrics:
    """A server's metrics in Prometheus' format; those of the batches are read when they are scraped."""

    def __init__(self, max_num_seqs: int, counters: Callable[[], Iterable[BatchCounters]]) -> None:
        self.limit, self.counters = max_num_seqs, counters
        self.registry = CollectorRegistry()  # the package's global one would mix the servers of a process
        labels = ("path", "status")
        self.requests = Counter(
            "river:http_requests", "HTTP requests by path and status.", labels, registry=self.registry
        )
        meaning = "Generated tokens; their rate is the throughput."
        self.tokens = Counter("river:generation_tokens", meaning, registry=self.registry)
        self.first_token = Histogram(
            "river:time_to_first_token_seconds",
            "Time from a request to its first token, waiting included.",
            buckets=_FIRST_TOKEN,
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the batches (the registry's interface)."""
        found = [*self.counters()]
        yield GaugeMetricFamily("river:max_num_seqs", "Requests that may generate at the same time.", value=self.limit)
        for names, family in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for field, (name, meaning) in names.items():
                yield family(f"river:{name}", meaning, value=sum(getattr(counters, field) for counters in found))

    def page(self) -> Response:
        """Answer GET /metrics."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


def extend(app: FastAPI, metrics: Metrics) -> FastAPI:
    """Add errors, metrics and hang-ups to transformers' app; return it."""
    for kind in (Refused, ValueError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer_error)
    app.add_api_route("/metrics", metrics.page, methods=["GET"])
    app.add_middleware(EndsWithClient, requests=metrics.requests)
    return app
