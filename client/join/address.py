"""Where a coordinator is: HOST or HOST:PORT, also in IPv6 brackets or as a URL."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from seedbed.common.errors import ConfigError
from seedbed.common.hosts import GATEWAY_PORT, host_port, is_loopback


@dataclass(frozen=True, slots=True)
class Address:
    """A host (without brackets) and a port."""

    host: str
    port: int = GATEWAY_PORT

    def __str__(self) -> str:
        return self.beside(self.port)

    @property
    def loopback(self) -> bool:
        """Whether nothing that is sent there leaves this machine."""
        return is_loopback(self.host)

    def beside(self, port: int) -> str:
        """``host:port`` of another port there."""
        return host_port(self.host, port)


def parse_address(text: str) -> Address:
    """Read what a user calls a coordinator.

    Raises:
        ConfigError: if it is no address.
    """
    bare = text.strip().removeprefix("https://").removeprefix("http://").rstrip("/")
    if bare.count(":") > 1 and "[" not in bare:  # an IPv6 address alone
        bare = f"[{bare}]"
    try:
        parts = urlsplit(f"//{bare}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.path or parts.username is not None or any(sign.isspace() for sign in host) or port == 0:
        raise ConfigError(
            f"'{text}' is not an address", f"Give HOST or HOST:PORT; the port is {GATEWAY_PORT} unless given."
        )
    return Address(host, port or GATEWAY_PORT)
