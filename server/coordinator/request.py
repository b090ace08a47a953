"""What the user of `seedbed coordinator` asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seedbed.common.errors import ConfigError
from seedbed.common.hosts import GATEWAY_PORT, is_loopback
from seedbed.common.registry import DEFAULT_PORT as REGISTRY_PORT
from seedbed.server.keys.directory import require_directory


@dataclass(frozen=True, slots=True)
class CoordinatorRequest:
    """One `seedbed coordinator` command.

    Args:
        source: preset or file of the federation.
        overrides: ``key.path=value`` settings on top.
        out: run directory; ``runs/NAME`` where none is given.
        resume: continue what is there.
        host: address that gateway and registry listen on.
        advertise: name or address under which participants reach this machine; the host unless given.
        port: of the gateway, the only address that participants need; 0 is a free one.
        registry_port: of the registry; 0 is a free one.
        keys: directory of `seedbed keys`; with it everything beyond this machine is TLS with certificates on both sides.
        insecure: listen beyond loopback without keys.
        advertise_registry: port under which participants reach the registry, where a proxy stands before it; 0 is its own.
        max_upload, quota: megabytes of one adapter, and of all that one participant may hand in; 0 is the registry's default.
        linger: seconds to go on serving the registry when the federation has ended; `math.inf` until interrupted.
        command: what the user typed, for the report.
    """

    source: str
    overrides: tuple[str, ...] = ()
    out: Path | None = None
    resume: bool = False
    host: str = "127.0.0.1"
    advertise: str = ""
    port: int = GATEWAY_PORT
    registry_port: int = REGISTRY_PORT
    keys: Path | None = None
    insecure: bool = False
    advertise_registry: int = 0
    max_upload: int = 0
    quota: int = 0
    linger: float = 0.0
    command: str = ""
    patience: float = 180.0
    """Seconds that a process may take to start."""

    def require_safe(self) -> None:
        """Refuse to listen beyond this machine without keys, unless that is said.

        Raises:
            ConfigError: saying how to do it.
        """
        if self.keys is not None:
            require_directory(self.keys)
        if self.keys is None and not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"without keys nothing listens beyond this machine, and {self.host} is beyond it",
                "Make keys (seedbed keys init DIR) and pass --keys DIR, or say --insecure in a network that you trust.",
            )
