"""Whether the processes of a coordinator live: each is asked what only a process that works can answer."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from typing import Any

from seedbed.common.hosts import host_port

_SECONDS = 10.0
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def gateway_lives(host: str, port: int, *, secure: bool, seconds: float = _SECONDS) -> bool:
    """Whether a gateway answers at all: that what stands behind it is away is an answer, too."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is told and nothing believed
    url = f"{'https' if secure else 'http'}://{host_port(_EVERYWHERE.get(host, host), port)}/health"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=seconds):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def registry_lives(health_port: int, seconds: float = _SECONDS) -> bool:
    """Whether a registry answers the health service of gRPC."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    try:
        with grpc.insecure_channel(f"127.0.0.1:{health_port}", (("grpc.enable_http_proxy", 0),)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            stub.Check(health_pb2.HealthCheckRequest(), timeout=seconds)
    except grpc.RpcError:
        return False
    return True
