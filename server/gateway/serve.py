"""Running the gateway: where it listens, with which certificate, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import uvicorn
from starlette.types import ASGIApp

from seedbed.common.errors import ConfigError, EnvironmentFailure
from seedbed.server.gateway.app import build
from seedbed.server.gateway.pages import Pages
from seedbed.server.gateway.relay import BODY_LIMIT, Relay
from seedbed.server.listening import is_loopback
from seedbed.server.registry.information import Information

DEFAULT_PORT = 7400
_RELOAD_SECONDS = 5.0
_GRACE_SECONDS = 3


@dataclass(frozen=True)
class Settings:
    """What a gateway is asked to do."""

    run: Path
    host: str
    port: int
    """0 is any free one."""
    upstream: str
    """``http(s)://host:port`` of the SuperLink, on loopback."""
    registry_port: int
    """Where the registry listens on this machine."""
    advertised_registry: int = 0
    """The port that participants are told; 0 is the same."""
    keys: Path | None = None
    insecure: bool = False
    """Plaintext beyond loopback is meant."""
    body_limit: int = BODY_LIMIT
    connections: int = 1000


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; prints one JSON line with the port once it listens.

    Raises:
        ConfigError: if it would listen beyond loopback, or call beyond it, in plaintext; if the keys cannot be used.
        EnvironmentFailure: if the address cannot be listened at.
    """
    require_safe(settings)
    context = _server_context(settings.keys) if settings.keys else None
    verify = _client_context(settings.keys) if settings.keys else True
    listening = _listen(settings.host, settings.port)
    try:
        asyncio.run(_serve(settings, context, verify, listening))
    finally:
        listening.close()


async def _serve(
    settings: Settings, context: ssl.SSLContext | None, verify: ssl.SSLContext | bool, listening: socket.socket
) -> None:
    limits = httpx.Limits(max_connections=settings.connections, keepalive_expiry=2.0)  # the SuperLink's is 5 seconds
    timeout = httpx.Timeout(60.0, connect=5.0, pool=10.0)
    async with httpx.AsyncClient(verify=verify, limits=limits, timeout=timeout, trust_env=False) as client:
        port = int(listening.getsockname()[1])
        config = uvicorn.Config(
            cast(Any, _application(settings, client, context)),  # two names for one protocol
            http="h11",
            ws="none",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=settings.connections,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        config.load()
        config.ssl = context
        await _Server(config, port).serve(sockets=[listening])


def _application(settings: Settings, client: httpx.AsyncClient, context: ssl.SSLContext | None) -> ASGIApp:
    upstream = settings.upstream.rstrip("/")
    told = settings.advertised_registry or settings.registry_port
    information = Information(settings.run, told, secure=settings.keys is not None)
    registry = (_reachable(settings.host), settings.registry_port)
    relay = Relay(client, upstream, settings.keys is not None, settings.body_limit)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        renewal = asyncio.create_task(_renewed(context, settings.keys)) if context and settings.keys else None
        yield
        if renewal:
            renewal.cancel()

    return build(relay, Pages(settings.run, information, client, upstream, registry), lifespan)


class _Server(uvicorn.Server):
    """Says where it listens once it does, and ends with exit code 0 when it is asked to."""

    def __init__(self, config: uvicorn.Config, port: int) -> None:
        super().__init__(config)
        self._port = port

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(json.dumps({"event": "listening", "port": self._port}), flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        def end(number: int, frame: FrameType | None) -> None:
            self.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        yield


def require_safe(settings: Settings) -> None:
    """
    Raises:
        ConfigError: if something would go beyond loopback in plaintext and nobody said so.
    """
    if settings.keys is None and not settings.insecure and not is_loopback(settings.host):
        raise ConfigError(
            f"the gateway would listen at {settings.host} without TLS",
            "Make keys with `seedbed keys` and name them with --keys, or say --insecure.",
        )
    address = urlsplit(settings.upstream)
    try:
        usable = address.scheme in ("http", "https") and bool(address.hostname) and bool(address.port)
    except ValueError:
        usable = False
    if not usable or address.path.strip("/") or address.query or address.username:
        raise ConfigError(f"'{settings.upstream}' is no address of a SuperLink", "Give it as http://127.0.0.1:PORT.")
    if address.scheme == "http" and not settings.insecure and not is_loopback(address.hostname or ""):
        raise ConfigError(
            f"the SuperLink at {address.hostname} would be called without TLS",
            "Run it on this machine's loopback, or say --insecure.",
        )


def _reachable(host: str) -> str:
    """Where a service that listens like this gateway is reached from here."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(found[0][4][:2], family=found[0][0], backlog=512)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EnvironmentFailure(
            f"the gateway cannot listen at {host}:{port}: {reason}", "Choose another address or port with --listen."
        ) from None


def _server_context(keys: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    _load_chain(context, keys)
    return context


def _client_context(keys: Path) -> ssl.SSLContext:
    """To call the SuperLink, which shows the same certificate."""
    try:
        return ssl.create_default_context(cafile=str(keys / "ca.crt"))
    except OSError:  # ssl.SSLError is one
        raise ConfigError(
            f"{keys / 'ca.crt'} cannot be used", "Name a directory made by `seedbed keys init` with --keys."
        ) from None


def _load_chain(context: ssl.SSLContext, keys: Path) -> None:
    certificate, key = keys / "server" / "server.crt", keys / "server" / "server.key"
    try:
        context.load_cert_chain(certificate, key)
    except OSError:  # ssl.SSLError is one
        raise ConfigError(
            f"{certificate} and its key cannot be used", "Name a directory made by `seedbed keys init` with --keys."
        ) from None


async def _renewed(context: ssl.SSLContext, keys: Path) -> None:
    """Take up a rotated certificate for new connections, without a restart."""
    seen = None
    while True:
        with contextlib.suppress(OSError, ConfigError):
            state = (keys / "server" / "server.crt").stat()
            stamp = (state.st_ino, state.st_mtime_ns)
            if stamp != seen:
                _load_chain(context, keys)
                seen = stamp
        await asyncio.sleep(_RELOAD_SECONDS)
