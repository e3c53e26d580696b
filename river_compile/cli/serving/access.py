"""Who may ask: no web page of another site, and with ``--api-key`` only clients that have the key.

A browser lets any page send requests to a server on its user's machine. It names the page's site in `Origin`. A page
that has its site's name resolve to this machine is of the same origin, but sends that name as `Host`.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from river_compile.cli.serving.errors import Refused
from river_compile.kernels.checks import short_repr

OPEN = ("/health", "/ready", "/metrics")  # without a key, for probes and monitoring


class Access:
    """ASGI middleware: refuses requests of other sites' pages, and those without the key if there is one.

    Args:
        app: what answers the others.
        host: that the server listens on.
        key: that clients send as ``Authorization: Bearer KEY``; None: they need none.
    """

    def __init__(self, app: ASGIApp, host: str, key: str | None) -> None:
        self.app, self.host, self.key = app, host.lower(), key
        # A page of a rebound name has no key. Elsewhere than on loopback a server has names that it does not know.
        self.local = key is None and _is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.check(scope["path"], Headers(scope=scope))
            except Refused as refused:
                await refused.answer()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def check(self, path: str, headers: Headers) -> None:
        """Raise Refused for a request that is not answered."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.local and host and not self._is_own(host):
            allowed = "ask for localhost, or start the server with --api-key"
            raise Refused(403, "forbidden_host", f"Host {short_repr(host)} is not a name of this machine; {allowed}")
        if origin is not None and _split(origin).netloc.lower() != host.lower():
            why = f"Origin {short_repr(origin)} is another site than {short_repr(host)}"
            raise Refused(403, "forbidden_origin", f"{why}; pages of other sites are not answered")
        if self.key is not None and path not in OPEN and not self._has_key(headers):
            wanted = "send the server's --api-key as `Authorization: Bearer KEY`"
            raise Refused(401, "invalid_api_key", f"The API key is missing or wrong; {wanted}", None, _CHALLENGE)

    def _is_own(self, host: str) -> bool:
        name = (_split(f"//{host}").hostname or "").removesuffix(".")
        if name in (self.host, "localhost") or name.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        assert self.key is not None
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key.encode())


_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # brackets of no IPv6 address
        return SplitResult("", "", "", "", "")


def _is_loopback(host: str) -> bool:
    addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, None)]
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
