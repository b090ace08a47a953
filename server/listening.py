"""Where a service listens: what its command line says, and whether anybody but this machine can reach it."""

from __future__ import annotations

import ipaddress
import socket
from argparse import ArgumentTypeError


def is_loopback(host: str) -> bool:
    """Whether every address of a host name is this machine's alone."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(address).is_loopback for address in found)


def listen_at(text: str) -> tuple[str, int]:
    """The host (without brackets; loopback where none is said) and port of ``HOST:PORT``, for `argparse`.

    Raises:
        ArgumentTypeError: if it is no such pair.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ArgumentTypeError(f"expected HOST:PORT, got '{text}'")
    return host.strip("[]") or "127.0.0.1", int(port)


def positive(text: str) -> int:
    """A whole number above zero, for `argparse`.

    Raises:
        ArgumentTypeError: if it is none.
    """
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ArgumentTypeError(f"expected a whole number above 0, got '{text}'")
    return int(text)
