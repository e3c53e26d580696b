"""Errors that a client gets, in the form of OpenAI's API.

{"error": {"message": ..., "type": ..., "param": the field that is meant or null, "code": ...}}
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from river_compile.cli.shared import error_line
from river_compile.kernels.checks import short_repr

CLIENT_GONE = 499  # nginx's status for a client that hung up, for logs and metrics
_LONGEST = 200  # characters of a field's name, which clients choose
_CODES = {404: "unknown_url", 405: "method_not_allowed"}


class Refused(Exception):
    """An error for the client; `param` names the field of the request that is meant."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    def answer(self) -> JSONResponse:
        """Return the error as an answer."""
        return JSONResponse(self.body(), self.status, self.headers)

    def body(self) -> dict[str, object]:
        """Return the error's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        param = self.param and self.param[:_LONGEST]
        return {"error": {"message": str(self), "type": kind, "param": param, "code": self.code}}


def invalid(message: str, param: str | None) -> Refused:
    """Return the error for a value that is not allowed."""
    return Refused(400, "invalid_value", message, param)


def gone() -> Refused:
    """Return the error for a client that hung up; only the metrics see it."""
    return Refused(CLIENT_GONE, "client_gone", "the client has gone")


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Turn an error of River, Starlette, transformers or the model into an answer."""
    return _refused(request, error).answer()


def _refused(request: Request, error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, ClientDisconnect):
        return gone()
    if isinstance(error, HTTPException):
        if error.status_code in _CODES:
            asked = f"{request.method} {short_repr(request.url.path)}"
            routes = ", ".join(sorted({route.path for route in request.app.routes}))
            message = f"{asked} is not served; the routes are {routes}"
            return Refused(error.status_code, _CODES[error.status_code], message, headers=error.headers)
        return Refused(error.status_code, "invalid_value", str(error.detail), headers=error.headers)
    if isinstance(error, ValueError):  # transformers' and the model's, about what was asked
        return invalid(error_line(error), None)
    return Refused(500, "internal_error", "the server failed at this request; its log says why")


HANDLED = (Refused, ClientDisconnect, HTTPException, ValueError, Exception)
