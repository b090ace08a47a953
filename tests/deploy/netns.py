"""Hosts on one machine: network namespaces with addresses of their own, joined by a switch in yet another one.

The machine's own network is not touched: bridge and cables all live in namespaces, which are gone when the `Network` is closed,
with every process that still runs in them. Needs root and iproute2; `reason_not_to` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_SUBNET = "10.74.0"
"""Nobody else's: the namespaces reach nothing but each other."""
_KILL_SECONDS = 10.0


def reason_not_to() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    try:
        with Network() as network:
            network.host().run(["true"]).check_returncode()
    except (subprocess.CalledProcessError, OSError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return f"network namespaces are not permitted here: {str(said).strip()}"
    return ""


class Host:
    """One machine of a `Network`."""

    def __init__(self, namespace: str, address: str, port: str) -> None:
        self.namespace, self.address = namespace, address
        self._port = port
        """Its end of the cable at the switch, as ``switch/interface``."""

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program here, in a process group of its own.

        ``ip netns exec`` becomes the program, so the process is the program itself and signals reach it."""
        return subprocess.Popen(self._inside(command), start_new_session=True, **options)

    def run(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program here to its end."""
        return subprocess.run(self._inside(command), capture_output=True, text=True, env=env, timeout=timeout)

    def cut_off(self) -> None:
        """Pull the cable: packets vanish and nobody is told, unlike at a closed port."""
        switch, interface = self._port.split("/")
        _ip("-n", switch, "link", "set", interface, "down")

    def plug_in(self) -> None:
        """Put the cable back."""
        switch, interface = self._port.split("/")
        _ip("-n", switch, "link", "set", interface, "up")

    def kill(self) -> None:
        """Pull the plug: every process here is killed, whichever group it is in."""
        end = time.monotonic() + _KILL_SECONDS
        while (found := self.processes()) and time.monotonic() < end:
            for process in found:  # and again, what one of them has started meanwhile
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)

    def processes(self) -> list[int]:
        """Ids of the processes that run here."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(line) for line in found.stdout.split()]

    def _inside(self, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *command]


class Network:
    """Hosts at one switch."""

    def __init__(self) -> None:
        self._name = f"seedbed-{uuid.uuid4().hex[:6]}"
        self._switch = f"{self._name}-switch"
        self.hosts: list[Host] = []

    def __enter__(self) -> Network:
        _ip("netns", "add", self._switch)
        try:
            _ip("-n", self._switch, "link", "add", "name", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def host(self) -> Host:
        """One more host, reachable from all others at its address."""
        number = len(self.hosts) + 1
        namespace, interface = f"{self._name}-{number}", f"port{number}"
        host = Host(namespace, f"{_SUBNET}.{number}", f"{self._switch}/{interface}")
        _ip("netns", "add", namespace)
        self.hosts.append(host)  # from here on `close` knows it
        _ip("-n", self._switch, "link", "add", interface, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", self._switch, "link", "set", interface, "master", "bridge", "up")
        _ip("-n", namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        for name in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", name, "up")
        return host

    def close(self) -> None:
        """End everything that runs in the hosts and take them away; never raises."""
        for host in self.hosts:
            host.kill()
        for namespace in (*(host.namespace for host in self.hosts), self._switch):
            if Path("/run/netns", namespace).exists():
                subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
