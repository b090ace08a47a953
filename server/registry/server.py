"""The gRPC server around the service: address, certificates, limits, health and reflection."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from seedbed.common.errors import ConfigError, EnvironmentFailure
from seedbed.common.registry import CHUNK, MESSAGE_LIMIT
from seedbed.proto.v1 import registry_pb2, registry_pb2_grpc
from seedbed.server.listening import is_loopback
from seedbed.server.registry.identity import Identities
from seedbed.server.registry.information import Information
from seedbed.server.registry.quotas import Limits, Quotas
from seedbed.server.registry.service import Service
from seedbed.server.registry.store import ServedStore

WINDOW = 1 << 21
"""Bytes that one call may have on their way to the registry. Left to gRPC's estimate, sixteen uploads at once held 300 MB;
with this, one over a line of 50 ms is held to 40 MB/s."""
SERVICE = registry_pb2.DESCRIPTOR.services_by_name["Registry"].full_name
_LOG = logging.getLogger("seedbed.registry")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a registry is served.

    Args:
        run: the run directory.
        host: where to listen; port 0 is any free one.
        keys: directory of certificates; None is plaintext.
        insecure: plaintext beyond loopback is meant.
        threads: calls that are answered at the same time; half of them may watch, and a quarter may be one participant's.
            Further ones are told to come again.
        health_port: also answer health checks there, on loopback and in plaintext, for whoever has no certificate; 0 is
            any free port, None is nowhere.
    """

    run: Path
    host: str = "127.0.0.1"
    port: int = 0
    keys: Path | None = None
    insecure: bool = False
    limits: Limits = field(default_factory=Limits)
    threads: int = 64
    health_port: int | None = None


class RegistryServer:
    """A registry that serves until it is stopped.

    Raises:
        ConfigError: if it would listen beyond loopback without certificates.
        EnvironmentFailure: if the port is taken, or a certificate cannot be read.
        StorageError: if the run directory cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        _require_secure(settings)
        self._health = health.HealthServicer()
        self._server = _server(settings.threads)
        self.port = _listen(self._server, settings)
        store = ServedStore(settings.run / "store")
        information = Information(settings.run, self.port, secure=settings.keys is not None)
        self._service = Service(
            settings.run,
            store,
            information,
            Identities(settings.keys),
            Quotas(settings.run / "uploads/usage.jsonl", settings.limits),
            threads=settings.threads,
        )
        registry_pb2_grpc.add_RegistryServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._checks, self.health_port = self._health_server(settings.health_port)

    def start(self) -> None:
        self._server.start()
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if self._checks is not None:
            self._checks.start()

    def stop(self, grace: float = 5.0) -> None:
        """Take no more calls, give those under way `grace` seconds, then end them: uploads are continued later."""
        self._health.enter_graceful_shutdown()
        self._service.closing.set()
        self._server.stop(grace).wait()
        if self._checks is not None:
            self._checks.stop(None).wait()

    def _health_server(self, port: int | None) -> tuple[grpc.Server | None, int | None]:
        if port is None:
            return None, None
        server = grpc.server(ThreadPoolExecutor(4, "health"), options=(("grpc.so_reuseport", 0),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return server, _bound(server.add_insecure_port, "127.0.0.1", port)


def _server(threads: int) -> grpc.Server:
    return grpc.server(
        ThreadPoolExecutor(threads, "call"),
        maximum_concurrent_rpcs=threads,
        options=(
            ("grpc.so_reuseport", 0),  # a port that is taken must be told, not shared
            ("grpc.max_receive_message_length", MESSAGE_LIMIT),
            ("grpc.max_send_message_length", MESSAGE_LIMIT),
            ("grpc.max_concurrent_streams", threads),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", WINDOW),
            ("grpc.http2.max_frame_size", CHUNK),
            # A peer that has gone without a word is noticed, and its thread is free again.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ),
    )


def _listen(server: grpc.Server, settings: Settings) -> int:
    if settings.keys is None:
        return _bound(server.add_insecure_port, settings.host, settings.port)
    credentials = _credentials(settings.keys)
    return _bound(lambda address: server.add_secure_port(address, credentials), settings.host, settings.port)


def _bound(add: Callable[[str], int], host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found = add(address)
    except RuntimeError:
        found = 0
    if not found:
        raise EnvironmentFailure(
            f"the registry cannot listen at {address}",
            "Another process has this port, or this machine no such address.",
        )
    return found


def _credentials(keys: Path) -> grpc.ServerCredentials:
    """Certificates on both sides. The server's own is read again when it has changed, so that it can be rotated."""
    certificates = _Certificates(keys)
    return grpc.dynamic_ssl_server_credentials(
        certificates.configuration(), certificates.current, require_client_authentication=True
    )


class _Certificates:
    def __init__(self, keys: Path) -> None:
        self._paths = (keys / "server/server.key", keys / "server/server.crt", keys / "ca.crt")
        self._lock = threading.Lock()
        self._read = self._contents()

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        key, certificate, authority = self._read
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)

    def current(self) -> grpc.ServerCertificateConfiguration:
        """What to answer the next connection with. Files that are being replaced leave it as it was."""
        with self._lock:
            try:
                self._read = self._contents()
            except EnvironmentFailure as error:
                _LOG.warning("%s", error.message)
            return self.configuration()

    def _contents(self) -> tuple[bytes, ...]:
        try:
            return tuple(path.read_bytes() for path in self._paths)
        except OSError as error:
            raise EnvironmentFailure(
                f"the registry cannot read {error.filename}: {error.strerror}", "Make keys with `seedbed keys`."
            ) from None


def _require_secure(settings: Settings) -> None:
    if settings.keys is None and not settings.insecure and not is_loopback(settings.host):
        raise ConfigError(
            f"the registry would listen at {settings.host} without TLS",
            "Make keys with `seedbed keys` and name them with --keys, or say --insecure.",
        )
