"""What `river serve` adds to transformers' server in HTTP: requests that end with their client, errors, metrics.

`EndsWithClient` is ASGI middleware around the whole app. Starlette cancels a stream whose client has gone, and lets a
handler that answers in one piece run to its end; here both end at once, and with them every call that they started.
`Metrics` is a page in Prometheus' text format, from a registry of its own.

Not handled: websockets, which the server has none of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from river_compile.cli.output import error_line
from river_compile.decoding.continuous import BatchCounters

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CLIENT_GONE = 499  # nginx's number for a client that hung up; nobody reads the answer, but logs and metrics do

_ends: ContextVar[list[Callable[[], object]]] = ContextVar("what ends with the request that is being answered")

_COUNTERS = {
    "calls": "Calls of generate that have ended, well or not.",
    "drafted": "Tokens that were drafted.",
    "held": "Drafted tokens that held.",
    "prompt_tokens": "Tokens of prompts.",
    "prompt_tokens_kept": "Tokens of prompts that a kept text began with, so that they did not run again.",
    "busy_seconds": "Time in which there was something to generate.",
}
_GAUGES = {"rows_in_use": "Rows that generate now.", "queued": "Calls that wait for a row."}
_FIRST_TOKEN = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60)


class Refused(Exception):
    """A request that gets an error, in OpenAI's form."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


async def answer_error(_: object, error: Exception) -> JSONResponse:
    """Answers a request that was refused, or had a value that transformers or the model refuses."""
    refused = error if isinstance(error, Refused) else Refused(400, "invalid_value", error_line(error))
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    body = {"message": str(refused), "type": kind, "param": None, "code": refused.code}
    return JSONResponse({"error": body}, refused.status, refused.headers)


def ends_with_request(end: Callable[[], object]) -> None:
    """Has something called when the request that is being answered has its answer, or its client has gone."""
    ends = _ends.get(None)
    if ends is not None:
        ends.append(end)


class EndsWithClient:
    """ASGI middleware: ends what a request started once it is over, and counts requests by path and status."""

    def __init__(self, app: Callable[..., Awaitable[None]], requests: Counter) -> None:
        self.app, self.requests = app, requests

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        ends: list[Callable[[], object]] = []
        status, answered = 500, False  # (an error that nothing catches becomes 500 further outside)
        gone: asyncio.Task[None] | None = None

        async def hang_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            _end_all(ends)

        async def received() -> Message:
            nonlocal gone
            if gone is not None:  # the body has been read, so that all there is to come is the client's going
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
            path = getattr(scope.get("route"), "path", "other")  # (not the client's own, of which there is no end)
            self.requests.labels(path, str(status)).inc()


def _end_all(ends: list[Callable[[], object]]) -> None:
    while ends:
        ends.pop()()


class Metrics:
    """A server's metrics: some are told as things happen, the rest is read from the batches when somebody asks.

    Args:
        rows: of a batch.
        counters: returns those of every batch.
    """

    def __init__(self, rows: int, counters: Callable[[], Iterable[BatchCounters]]) -> None:
        self.rows, self.counters = rows, counters
        self.registry = CollectorRegistry()  # (the package's global one would mix the servers of a process)
        labels = ("path", "status")
        self.requests = Counter("river_requests", "Requests, by path and status.", labels, registry=self.registry)
        meaning = "New tokens, as they come; their rate is the tokens/s of all clients."
        self.tokens = Counter("river_tokens", meaning, registry=self.registry)
        self.first_token = Histogram(
            "river_first_token_seconds",
            "From a request to its first token, the wait for a row included.",
            buckets=_FIRST_TOKEN,
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yields what the batches count; called by the registry."""
        found = [*self.counters()]
        yield GaugeMetricFamily("river_rows", "Rows of the batch.", value=self.rows)
        for names, family in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for name, meaning in names.items():
                yield family(f"river_{name}", meaning, value=sum(getattr(counters, name) for counters in found))

    def page(self) -> Response:
        """Returns the answer to GET /metrics."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


def extend(app: FastAPI, metrics: Metrics) -> FastAPI:
    """Adds errors, metrics and the end of requests to transformers' app; returns it."""
    for kind in (Refused, ValueError):
        app.add_exception_handler(kind, answer_error)
    app.add_api_route("/metrics", metrics.page, methods=["GET"])
    app.add_middleware(EndsWithClient, requests=metrics.requests)
    return app
