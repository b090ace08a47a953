"""What the gateway serves for reading: health, what the federation is, its status, its page and its metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from seedbed.common.errors import SeedbedError
from seedbed.server.monitor import prometheus, web
from seedbed.server.monitor.document import to_json
from seedbed.server.monitor.reader import RunReader
from seedbed.server.registry.information import Information

_HEALTH_SECONDS = 1.0
"""For so long an answer about health holds, however many ask."""
_WAIT = 3.0


class Pages:
    """Answers of one gateway.

    Args:
        run: the run directory, which may not be there yet.
        information: of the federation.
        client: reaches the SuperLink.
        upstream: ``scheme://host:port`` of the SuperLink.
        registry: host and port of the registry.
    """

    def __init__(
        self, run: Path, information: Information, client: httpx.AsyncClient, upstream: str, registry: tuple[str, int]
    ) -> None:
        self._reader = RunReader(run, awaited=True)
        self._information = information
        self._client = client
        self._upstream = upstream
        self._registry = registry
        self._lock = asyncio.Lock()
        self._health: tuple[float, dict[str, Any]] = (float("-inf"), {})

    async def health(self, request: Request) -> Response:
        """200 when the SuperLink and the registry can be reached, else 503; a monitor reads which."""
        async with self._lock:
            if time.monotonic() - self._health[0] > _HEALTH_SECONDS:
                superlink, registry = await asyncio.gather(self._superlink(), _connects(*self._registry))
                self._health = (time.monotonic(), {"gateway": True, "superlink": superlink, "registry": registry})
        found = self._health[1]
        return JSONResponse(found, 200 if all(found.values()) else 503)

    async def information(self, request: Request) -> Response:
        """What a participant must know before it does anything."""
        info = await run_in_threadpool(self._information.info)
        if info is None:
            return JSONResponse({"error": "the federation is not set up yet"}, 503, {"retry-after": "2"})
        return JSONResponse(info.model_dump(mode="json"))

    async def status(self, request: Request) -> Response:
        """What has happened, see `monitor.document`."""
        return JSONResponse(await run_in_threadpool(lambda: to_json(self._reader.look())))

    async def metrics(self, request: Request) -> Response:
        """The same numbers for Prometheus."""
        text = await run_in_threadpool(lambda: prometheus.exposition(self._reader.look()))
        return PlainTextResponse(text, media_type=prometheus.CONTENT_TYPE)

    async def page(self, request: Request) -> Response:
        """The page that shows the status."""
        return HTMLResponse(web.page(), headers={"content-security-policy": web.CSP})

    async def _superlink(self) -> bool:
        try:
            answer = await self._client.get(f"{self._upstream}/health", timeout=_WAIT)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200


async def _connects(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(_WAIT):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def readable(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """A refusal as one sentence of JSON with status 503: what is missing now may be there soon."""

    async def answered(request: Request) -> Response:
        try:
            return await answer(request)
        except SeedbedError as error:
            return JSONResponse({"error": error.message}, 503, {"retry-after": "2"})

    return answered
