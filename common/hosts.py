"""Hosts and ports as they are written, on both sides of a federation."""

from __future__ import annotations

import ipaddress

GATEWAY_PORT = 7400
"""Where a coordinator's gateway listens unless something else is said: the only address that participants need."""


def is_loopback(host: str) -> bool:
    """Whether an address (or `localhost`) reaches no further than this machine. No name is looked up."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def host_port(host: str, port: int) -> str:
    """``host:port``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
