"""A gateway reduced to what `seedbed join` needs of one, run as a process of its own by the tests of joining.

python join_gateway.py PORT UPSTREAM INFO_FILE      /v1/fleet/* goes to the SuperLink, /seedbed.json is the file
"""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PORT, UPSTREAM, INFO = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
client = httpx.AsyncClient(base_url=UPSTREAM, timeout=30, trust_env=False)


async def info(_: Request) -> Response:
    return Response(INFO.read_bytes(), media_type="application/json")


async def fleet(request: Request) -> Response:
    kept = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
    try:
        answer = await client.request(
            request.method, request.url.path, content=await request.body(), headers=kept, params=request.query_params
        )
    except httpx.TransportError:
        return Response(status_code=503)
    passed = {
        name: value for name, value in answer.headers.items() if name not in ("content-length", "content-encoding")
    }
    return Response(answer.content, answer.status_code, passed)


uvicorn.run(
    Starlette(routes=[Route("/seedbed.json", info), Route("/v1/fleet/{path:path}", fleet, methods=["GET", "POST"])]),
    port=PORT,
    log_level="warning",
)
