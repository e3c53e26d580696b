"""The end of a request, whether it is answered or its client hangs up, and the body that it sends."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextvars import ContextVar

from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from river_compile.cli.serving.errors import CLIENT_GONE, Refused, gone

REQUEST_ID = "x-request-id"


class _Life:
    """Whether a request has ended, and what to call at its end; threads may ask."""

    def __init__(self) -> None:
        self.ended = False
        self._ends: list[Callable[[], object]] = []

    def add(self, end: Callable[[], object]) -> None:
        if self.ended:
            end()
        else:
            self._ends.append(end)

    def end(self) -> None:
        self.ended = True
        while self._ends:
            self._ends.pop()()


_life: ContextVar[_Life | None] = ContextVar("_life", default=None)  # of the request that this task answers


def ends_with_request(end: Callable[[], object]) -> None:
    """Register a call for the end of the current request: its answer, or its client's hang-up."""
    life = _life.get()
    if life is not None:
        life.add(end)


def check_client() -> None:
    """Raise Refused if the current request's client has hung up."""
    life = _life.get()
    if life is not None and life.ended:
        raise gone()


async def read_body(request: Request, most: int) -> bytes:
    """Return a request's body of up to `most` bytes.

    Raises:
        Refused: it is longer; nothing was read if its length was declared, and up to the limit if not.
    """
    declared = int(request.headers.get("content-length", 0))
    read = bytearray()
    if declared <= most:
        async for piece in request.stream():
            read += piece
            if len(read) > most:
                break
        else:
            return bytes(read)
    long = f"the body has {declared:,} bytes" if declared else "the body is too long"
    message = f"{long}, and the limit for the context of this model is {most:,} bytes; send a shorter one"
    raise Refused(413, "request_too_large", message)


class EndsWithClient:
    """ASGI middleware: ends all calls of a request with it, counts requests by path and status, and gives them an id.

    Starlette cancels a stream whose client hung up, but lets a handler that answers in one piece run to its end.
    """

    def __init__(self, app: ASGIApp, requests: Counter, route: Callable[[str], str]) -> None:
        self.app, self.requests, self.route = app, requests, route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        life = _Life()
        name = Headers(scope=scope).get(REQUEST_ID) or str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = name
        status, answered = 500, False  # an uncaught error becomes 500 further outside
        left: asyncio.Task[None] | None = None

        async def hang_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            life.end()

        async def received() -> Message:
            nonlocal left
            if left is not None:  # the body was read, so only the hang-up can follow
                await asyncio.shield(left)
                return {"type": "http.disconnect"}
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                left = asyncio.create_task(hang_up())
            return message

        async def sent(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = name
            elif message["type"] == "http.response.body" and not (left and left.done()):
                answered = not message.get("more_body", False)
            await send(message)

        inside = _life.set(life)
        try:
            await self.app(scope, received, sent)
        finally:
            _life.reset(inside)
            if left is not None:
                status = CLIENT_GONE if left.done() and not answered else status
                left.cancel()
            life.end()
            self.requests.labels(self.route(scope["path"]), str(status)).inc()
