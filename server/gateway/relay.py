"""Passing a SuperNode's calls on to the SuperLink, which listens on loopback and is never seen from outside.

Whoever reaches Flower's control routes can have code run on every participant, and its runtime routes belong to the
coordinator's own processes. So nothing of what a caller sends decides where a call goes: its target must be, byte for byte
and before any decoding, one of the few routes below, and the SuperLink is asked for that constant. Encoded slashes, dots,
doubled slashes, other cases and absolute forms are simply other names, and get the answer of every unknown name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from functools import cached_property

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

ACTIVE = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""What a SuperNode with a registered key calls (flwr 1.41, ``supernode/fleet_http_client.py``)."""
SELF_REGISTERING = ("register-node", "unregister-node")
"""What a SuperNode without a key calls as well: only where there are no keys."""
BODY_LIMIT = 16 << 20
"""Bytes of one call: Flower sends objects in pieces of 5 MiB, and our own messages are a few kilobytes."""
NOT_HERE = "This address serves a federation's participants; nothing else of Flower is reachable here.\n"
_AWAY = "The coordinator's SuperLink does not answer; try again.\n"
_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
"""RFC 9110, section 7.6.1: they speak of one connection and are not passed on."""
_OURS = {
    "host",
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-real-ip",
    "expect",
    "cookie",
}
"""What a caller may not tell the SuperLink."""
_log = logging.getLogger("seedbed.gateway")


class _TooLargeError(Exception):
    """A body that goes on beyond the limit that its header kept to, or that had none."""


@dataclass(frozen=True)
class Relay:
    """Calls the SuperLink in the name of SuperNodes.

    Args:
        client: reaches the SuperLink, and verifies it where it speaks TLS.
        upstream: ``scheme://host:port`` of the SuperLink.
        keys: whether nodes have registered keys; without, they register themselves.
        limit: bytes of a call's body.
        patience: seconds that a call may take in all.
    """

    client: httpx.AsyncClient
    upstream: str
    keys: bool
    limit: int = BODY_LIMIT
    patience: float = 120.0

    @cached_property
    def routes(self) -> dict[bytes, str]:
        """Targets as they stand in a request line -> where they lead."""
        names = ACTIVE if self.keys else ACTIVE + SELF_REGISTERING
        return {f"/v1/fleet/{name}".encode(): f"{self.upstream}/v1/fleet/{name}" for name in names}

    async def __call__(self, request: Request) -> Response:
        """Answer one call; see the module."""
        target = self.routes.get(request.scope.get("raw_path", b""))
        if target is None or request.method != "POST" or request.scope.get("query_string"):
            _log.warning(
                "refused %s %r from %s", request.method[:20], request.scope.get("raw_path", b"")[:200], _peer(request)
            )
            return refusal()
        if _declared(request) > self.limit:
            return _too_large(self.limit)
        try:
            async with asyncio.timeout(self.patience):
                answer = await self._ask(request, target)
        except _TooLargeError:
            return _too_large(self.limit)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except (httpx.TimeoutException, TimeoutError):
            return _retry_later(504)
        except httpx.TransportError as error:
            _log.warning("the SuperLink does not answer: %s", type(error).__name__)
            return _retry_later(503)
        return _Answer(answer, self.patience)

    async def _ask(self, request: Request, target: str) -> httpx.Response:
        headers = _passed_on(request.headers.items(), _OURS)
        headers.append(("x-forwarded-for", _peer(request)))
        call = self.client.build_request("POST", target, content=self._body(request), headers=headers)
        return await self.client.send(call, stream=True)

    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        seen = 0
        async for piece in request.stream():
            seen += len(piece)
            if seen > self.limit:
                raise _TooLargeError
            yield piece


class _Answer(StreamingResponse):
    """The SuperLink's answer as its bytes come, for so long as the caller may take; then the connection is given back."""

    def __init__(self, answer: httpx.Response, patience: float) -> None:
        super().__init__(answer.aiter_raw(), answer.status_code)
        kept = _passed_on(answer.headers.multi_items(), {"date", "server"})
        self.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept]
        self._answer, self._patience = answer, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()


def refusal() -> Response:
    """What everything that is not served gets: whether it exists behind the gateway is nobody's business."""
    return PlainTextResponse(NOT_HERE, 404)


def _passed_on(headers: Iterable[tuple[str, str]], without: set[str]) -> list[tuple[str, str]]:
    """Headers that belong to the message and not to one connection, without some others."""
    found = [(name.lower(), value) for name, value in headers]
    named = {part.strip().lower() for name, value in found if name == "connection" for part in value.split(",")}
    return [(name, value) for name, value in found if name not in _HOP_BY_HOP | named | without]


def _declared(request: Request) -> int:
    text = request.headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 1 << 62


def _peer(request: Request) -> str:
    return request.client.host if request.client else "unknown"


def _too_large(limit: int) -> Response:
    return PlainTextResponse(f"A call has at most {limit:,} bytes here.\n", 413, {"connection": "close"})


def _retry_later(status: int) -> Response:
    """SuperNodes try again for ever after 503 and 504, and give up after most other answers."""
    return PlainTextResponse(_AWAY, status, {"retry-after": "2"})
