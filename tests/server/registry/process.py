"""A registry in a process of its own, as it is deployed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from seedbed.client.registry import RegistryClient
from seedbed.common.registry import RegistryAccess
from seedbed.server.registry.server import RegistryServer, Settings


class Process:
    """A registry that was started; `kill` and `terminate` end it, `start` starts it again on the same port."""

    def __init__(self, run: Path, *arguments: str) -> None:
        self.run = run
        self._arguments = arguments
        self.port = 0
        self.start()

    def start(self) -> None:
        listen = f"127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "seedbed.server.registry", "--run", str(self.run), "--listen", listen]
        self.child = subprocess.Popen(
            [*command, "--health-port", "0", *self._arguments], stdout=subprocess.PIPE, text=True
        )
        assert self.child.stdout is not None
        told = json.loads(self.child.stdout.readline())
        assert told["event"] == "listening"
        self.port, self.health_port = told["port"], told["health_port"]

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()

    def terminate(self) -> int:
        self.child.send_signal(signal.SIGTERM)
        return self.child.wait()

    def memory(self) -> int:
        """Bytes that the process held at most."""
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    def access(self, name: str = "anna") -> RegistryAccess:
        return RegistryAccess(address=f"127.0.0.1:{self.port}", name=name)

    def client(self, name: str = "anna", patience: float = 20.0) -> RegistryClient:
        return RegistryClient(self.access(name), patience=patience)


class Local:
    """The same registry inside this process, which is quicker to start."""

    def __init__(self, run: Path, keys: Path | None = None, threads: int = 64) -> None:
        self.run = run
        self.server = RegistryServer(Settings(run, keys=keys, health_port=0, threads=threads))
        self.port = self.server.port
        self.health_port = self.server.health_port
        self.server.start()

    def access(self, name: str = "anna") -> RegistryAccess:
        return RegistryAccess(address=f"127.0.0.1:{self.port}", name=name)

    def client(self, name: str = "anna", patience: float = 20.0) -> RegistryClient:
        return RegistryClient(self.access(name), patience=patience)
