"""The routes that River serves, and nothing else: another path is 404, another method 405, both in OpenAI's form.

There is no CORS: a browser's preflight is another method.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from river_compile.cli.serving import errors, prompts, requests
from river_compile.cli.serving.access import Access
from river_compile.cli.serving.batches import ENDED, Manager, State
from river_compile.cli.serving.connections import EndsWithClient, check_client, read_body
from river_compile.cli.serving.metrics import Metrics

logger = logging.getLogger(__name__)

_JSON = "application/json"
_TEXTS = {
    "/v1/chat/completions": prompts.Chats,
    "/v1/completions": prompts.Completions,
    "/v1/responses": prompts.Responses,
}
_MODEL = "/v1/models/{model:path}"  # a folder's name has slashes


def build(models: Any, state: State, most_bytes: int, host: str, api_key: str | None) -> Starlette:
    """Return the app.

    Args:
        models: transformers' manager of models, which has loaded the served one.
        state: has the served model's batch.
        most_bytes: the size of a request's body.
        host: that the server listens on.
        api_key: that clients must send, if any.
    """
    served = {"id": models.force_model, "object": "model", "created": int(time.time()), "owned_by": "river"}
    routes = {
        "/v1/models": _models(served),
        _MODEL: _model(served),
        "/health": _health(state.manager),
        "/ready": _ready(state.manager),
        "/metrics": _metrics(state.metrics),
    }
    texts = {
        path: _texts(handler(model_manager=models, generation_state=state), state.manager, most_bytes)
        for path, handler in _TEXTS.items()
    }
    app = Starlette(
        routes=[
            *(Route(path, answer, methods=["POST"]) for path, answer in texts.items()),
            *(Route(path, answer, methods=["GET"]) for path, answer in routes.items()),
        ],
        middleware=[
            Middleware(EndsWithClient, requests=state.metrics.requests, route=_route),
            Middleware(Access, host=host, key=api_key),
        ],
        exception_handlers=dict.fromkeys(errors.HANDLED, errors.answer_error),
    )
    app.router.redirect_slashes = False
    return app


def _route(path: str) -> str:
    """Return the route of a path, for the metrics; the client's own paths are unbounded."""
    if path in (*_TEXTS, "/v1/models", "/health", "/ready", "/metrics"):
        return path
    return "/v1/models/{model}" if path.startswith("/v1/models/") else "other"


Answer = Callable[[Request], Awaitable[Response]]


def _texts(handler: Any, manager: Manager, most_bytes: int) -> Answer:
    async def answer(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
            # (A page of another site may send other types without asking first.)
            raise errors.Refused(415, "unsupported_media_type", f"send the body as Content-Type: {_JSON}")
        body = await read_body(request, most_bytes)
        with manager.preparing():
            asking, generate = await asyncio.to_thread(prompts.prepare, handler, body, request.state.request_id)
        check_client()
        requests.asked.set(asking)
        made = generate()
        response: Response = await made if inspect.isawaitable(made) else made
        return response

    return answer


def _models(served: dict[str, Any]) -> Answer:
    async def answer(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [served]})

    return answer


def _model(served: dict[str, Any]) -> Answer:
    async def answer(request: Request) -> Response:
        name = request.path_params["model"]
        if name != served["id"]:
            raise requests.no_model(name, served["id"])
        return JSONResponse(served)

    return answer


def _health(manager: Manager) -> Answer:
    async def answer(_: Request) -> Response:
        if not manager.alive:
            logger.error(ENDED)
            raise errors.Refused(503, "thread_ended", ENDED)
        return JSONResponse({"status": "ok"})

    return answer


def _ready(manager: Manager) -> Answer:
    async def answer(_: Request) -> Response:
        manager.check_place()
        return JSONResponse({"status": "ready"})

    return answer


def _metrics(metrics: Metrics) -> Callable[[Request], Response]:
    def answer(_: Request) -> Response:  # in a thread, since the batch's counters have a lock
        return metrics.page()

    return answer
