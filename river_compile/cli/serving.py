"""Many clients of one model: transformers' server, with the batch of `decoding.continuous` where its threads were.

Routes, schemas, the parsing of answers and streaming are transformers'. Three of its names are replaced while it
starts: the class that loads models, which accelerates them here, the one that keeps a manager of calls for each, and
the function that builds the app. What a call needs to know of its client comes with the call: settings by its
generation config, and a seed by the request's task, where handlers put it. (By themselves they would seed torch's
generator, which is the whole process's.)

Not handled: `--continuous-batching`, transformers' own, whose scheduler does not call `generate`; audio, whose calls
take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI
from torch import Tensor
from transformers import GenerationConfig
from transformers.cli.serving import model_manager, server, utils
from transformers.generation.streamers import BaseStreamer

from river_compile.api.accelerate import accelerate
from river_compile.cli.models import loading
from river_compile.cli.output import error_line
from river_compile.cli.serving_http import CLIENT_GONE, Metrics, Refused, ends_with_request, extend
from river_compile.decoding.continuous import ContinuousBatch

logger = logging.getLogger(__name__)

_seed: ContextVar[int | None] = ContextVar("_seed", default=None)  # of the request that this task answers
ENDED = "the thread that generates has ended; its log says why. Start the server anew"


class Models(model_manager.ModelManager):
    """Loads models and accelerates them with the arguments that it was given."""

    def __init__(self, acceleration: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.acceleration = acceleration
        super().__init__(*args, **kwargs)

    def _load_processor(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with loading(name):
            return super()._load_processor(name, *args, **kwargs)

    def _load_model(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with loading(name):
            model = super()._load_model(name, *args, **kwargs)
        return accelerate(model, **self.acceleration)


class Manager(utils.GenerateManager):
    """Hands the calls of one model's clients to a batch, as many at once as rows and places in the queue.

    Args:
        model: an accelerated model.
        rows: calls that generate at once.
        queue: calls more that may wait.
        metrics: are told of tokens.
    """

    def __init__(self, model: Any, rows: int, queue: int, metrics: Metrics) -> None:
        self.model, self.rows, self.queue, self.metrics = model, rows, queue, metrics
        self.batch = ContinuousBatch(model, rows)
        self._calls: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Has a function called in the batch's thread, where a model's generate joins the batch.

        Raises:
            Refused: the thread has ended, or there is no place in the queue.
        """
        if not self.alive:
            raise Refused(503, "thread_ended", ENDED)
        self._calls = [call for call in self._calls if not call.done()]
        if len(self._calls) >= self.rows + self.queue:
            busy = f"{self.rows} requests are being answered and {self.queue} wait, which is all; try again later"
            raise Refused(429, "queue_full", busy, {"Retry-After": "1"})
        seed = _seed.get()
        # (Never PyTorch's generator: a call that cannot join draws from it meanwhile, in the batch's thread.)
        seed = random.SystemRandom().getrandbits(63) if seed is None else seed
        call = self.batch.submit(functools.partial(fn, *args, **kwargs), seed)
        self._calls.append(call)
        ends_with_request(functools.partial(self.batch.cancel, call))
        return call

    async def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Does the same and waits for the result."""
        call = self.submit(fn, *args, **kwargs)
        try:
            return await asyncio.shield(asyncio.wrap_future(call))
        except (asyncio.CancelledError, utils._GenerationCancelled):
            if call.done():  # it was cancelled, and not the task that waits for it
                raise Refused(CLIENT_GONE, "client_gone", "the client has gone") from None
            raise
        except Exception as error:
            if not self.alive:
                raise Refused(503, "thread_ended", ENDED) from error
            raise

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, Any]:
        """Generates a whole text (transformers' interface)."""
        length = inputs["input_ids"].shape[-1]
        prepare(gen_config, model, length)
        streamer = None if (gen_config.num_beams or 1) > 1 else Whole(self.metrics)  # (beams cannot be streamed)
        if streamer is not None:
            ends_with_request(streamer.cancel)
        ids = await self.async_submit(
            model.generate, **self._arguments(model, processor, inputs, gen_config), streamer=streamer
        )
        return processor.decode(ids[0, length:], skip_special_tokens=True), length, ids[0, length:]

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], utils.DirectStreamer]:
        """Starts a text that is streamed (transformers' interface)."""
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
        return {**inputs, "generation_config": config, "tokenizer": processor, **only_text}

    @property
    def alive(self) -> bool:
        return self.batch.alive

    def stop(self) -> None:
        """Ends the batch, and with it the calls that are left."""
        self.batch.close()


class Tokens:
    """Tells a server's metrics of one call's tokens."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._began, self._puts = metrics, time.monotonic(), 0

    def put(self, value: Tensor) -> None:
        """Called whenever `generate` gives its streamer something: the prompt comes first, then tokens."""
        self._puts += 1
        if self._puts == 2:
            self._metrics.first_token.observe(time.monotonic() - self._began)
        if self._puts > 1:
            self._metrics.tokens.inc(value.numel())


class Streamer(utils.DirectStreamer):
    """Streams a text; a call whose client has gone ends at the next token (transformers' part)."""

    def __init__(self, *args: Any, metrics: Metrics, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens = Tokens(metrics)

    def put(self, value: Tensor) -> None:
        self._tokens.put(value)
        super().put(value)


class Whole(BaseStreamer):
    """Goes with a text that is not streamed, for the same two purposes."""

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
    """Keeps a manager for each model.

    Args:
        rows, queue: of each manager.
        theirs: arguments of transformers'.
    """

    def __init__(self, rows: int, queue: int, **theirs: Any) -> None:
        super().__init__(**theirs)
        self.rows, self.queue = rows, queue
        self.models: Any = None  # the server's manager of models
        self.metrics = Metrics(rows, lambda: [manager.batch.counters for manager in self.managers])

    @property
    def managers(self) -> list[Manager]:
        return [*self._generate_managers.values()]

    def get_manager(self, model_id: str, use_cb: bool = False) -> Manager:
        """Returns the manager of a model that is loaded; a model that was loaded anew gets a new one."""
        model = self.models.loaded_models[model_id].model
        manager = self._generate_managers.get(model_id)
        if manager is None or manager.model is not model:
            if manager is not None:
                manager.stop()
            manager = Manager(model, self.rows, self.queue, self.metrics)
            self._generate_managers[model_id] = manager
        return manager

    def is_cb_alive(self) -> bool:
        """Whether every batch's thread runs; the server's /health says 503 where one does not."""
        dead = [name for name, manager in self._generate_managers.items() if not manager.alive]
        if dead:
            logger.error("%s (%s)", ENDED, ", ".join(dead))
        return not dead

    def shutdown(self) -> None:
        """Ends every batch."""
        for manager in self.managers:
            manager.stop()
        super().shutdown()


def prepare(config: GenerationConfig, model: Any, length: int) -> None:
    """Makes a client's settings a call's that the model can run after a prompt of so many tokens.

    A client that names a temperature or top_p wants to sample, as in OpenAI's API (transformers asks for `do_sample`).
    The longest text is cut to what the model's context has left.

    Raises:
        Refused: the context has no room for a token more, or a setting is out of its range.
    """
    for name, fits, range_ in _RANGES:
        value = getattr(config, name)
        if value is not None and not fits(value):
            raise Refused(400, "invalid_value", f"{name}={value} is not allowed; give {range_}")
    theirs = model.generation_config
    if config.temperature != 0 and (config.temperature, config.top_p) != (theirs.temperature, theirs.top_p):
        config.do_sample = True
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    if length >= context:
        raise Refused(
            400,
            "context_length_exceeded",
            f"This model's maximum context length is {context} tokens. However, your prompt has {length} tokens. "
            f"Please shorten it to {context - 1} or fewer.",
        )
    if config.max_new_tokens is not None:
        config.max_new_tokens = min(config.max_new_tokens, context - length)


_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("max_new_tokens", lambda value: value >= 1, "1 or more"),
    ("temperature", lambda value: value >= 0, "0 (no sampling) or more"),
    ("top_p", lambda value: 0 < value <= 1, "more than 0, up to 1"),
)


def start(
    folder: str, host: str, port: int, dtype: str, device: str, rows: int, queue: int, acceleration: dict[str, Any]
) -> Any:
    """Starts transformers' server in a thread; returns it.

    Raises:
        ValueError: the model cannot be loaded.
    """
    from transformers.cli.serve import Serve

    build_server = server.build_server

    def build(models: Any, *handlers: Any, generation_state: State, **more: Any) -> FastAPI:
        generation_state.models = models
        for handler in handlers:
            if hasattr(handler, "_build_generation_config"):
                handler._build_generation_config = functools.partial(_configured, handler._build_generation_config)
        app = build_server(models, *handlers, generation_state=generation_state, **more)
        return extend(app, generation_state.metrics)

    with (
        _replaced(model_manager, "ModelManager", functools.partial(Models, acceleration)),
        _replaced(utils, "GenerationState", functools.partial(State, rows, queue)),
        _replaced(server, "build_server", build),
    ):
        return Serve(force_model=folder, host=host, port=port, dtype=dtype, device=device, non_blocking=True)


def _configured(build: Callable[..., GenerationConfig], body: dict[str, Any], *given: Any, **more: Any) -> Any:
    """Returns what transformers makes of a request's settings, and keeps its seed for the call."""
    _seed.set(body.get("seed"))
    return build({**body, "seed": None}, *given, **more)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    theirs = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, theirs)


def _tell_end(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], call: Future[Any]) -> None:
    """Ends the stream of a call that its streamer has not ended: it failed, or was cancelled."""
    error = CancelledError() if call.cancelled() else call.exception()
    if error is None:
        return
    cancelled = isinstance(error, (CancelledError, utils._GenerationCancelled))
    # (transformers pastes the message into JSON as it is)
    end = None if cancelled else utils._StreamError(error_line(error).replace("\\", "/").replace('"', "'"))
    with contextlib.suppress(RuntimeError):  # the server has ended
        loop.call_soon_threadsafe(queue.put_nowait, end)
