"""The gateway as an ASGI application: a literal table of what is served, and one answer for everything else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seedbed.server.gateway.pages import Pages, readable
from seedbed.server.gateway.relay import Relay

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
"""On every answer, unless it has its own. Nothing here is for other origins, frames or caches."""

Answer = Callable[[Request], Awaitable[Response]]


def build(
    relay: Relay, pages: Pages, lifespan: Callable[[Any], AbstractAsyncContextManager[None]] | None = None
) -> ASGIApp:
    """The application: GET (and HEAD) of the pages, the relay for all else, which refuses what it does not know."""
    served: dict[bytes, Answer] = {
        b"/": pages.page,
        b"/health": pages.health,
        b"/seedbed.json": pages.information,
        b"/status.json": pages.status,
        b"/metrics": pages.metrics,
    }

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a WebSocket is refused before it is one
            await send({"type": "websocket.close", "code": 1008})
            return
        request = Request(scope, receive)
        page = served.get(scope.get("raw_path", b"")) if request.method in ("GET", "HEAD") else None
        response = await (readable(page)(request) if page else relay(request))
        await response(scope, receive, send)

    # A router without routes: it keeps the lifespan, and decides nothing by a decoded path.
    return Router(default=_secured(answer), lifespan=lifespan, redirect_slashes=False)


def _secured(inner: ASGIApp) -> ASGIApp:
    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await inner(scope, receive, sent)

    return outer
