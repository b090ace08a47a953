"""Real processes behind a door: a gateway, a SuperLink on loopback, and whoever knocks; for tests of the gateway."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from seedbed.common.processes import free_port

BIN = Path(sys.executable).parent
PATIENCE = 120.0


@dataclass
class Process:
    """A running command and all that it has printed."""

    popen: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line.rstrip("\n"))

    def until(self, found: Callable[[str], bool]) -> str:
        """The first printed line for which `found` holds; the test fails if the process ends or nothing comes."""
        seen, end = 0, time.monotonic() + PATIENCE
        while time.monotonic() < end:
            while seen < len(self.lines):
                seen += 1
                if found(self.lines[seen - 1]):
                    return self.lines[seen - 1]
            if self.popen.poll() is not None and seen == len(self.lines):
                break
            time.sleep(0.05)
        raise AssertionError(f"it never said so:\n{self.text}")


@contextmanager
def running(command: list[str], environment: dict[str, str] | None = None) -> Iterator[Process]:
    """Start a command in a group of its own; afterwards nothing of the group is left."""
    popen = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            **(environment or {}),
        },
        start_new_session=True,
    )
    process = Process(popen)
    reader = threading.Thread(target=process.read, daemon=True)
    reader.start()
    try:
        yield process
    finally:
        popen.terminate()
        with suppress(subprocess.TimeoutExpired):
            popen.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()
        reader.join(10)


@contextmanager
def gateway(run: Path, upstream: str, *options: str) -> Iterator[tuple[int, Process]]:
    """A gateway at a free port of loopback."""
    command = [sys.executable, "-m", "seedbed.server.gateway", "--run", str(run), "--listen", "127.0.0.1:0"]
    command += ["--upstream", upstream, "--registry-port", str(free_port()), *options]
    with running(command) as process:
        line = process.until(lambda text: text.startswith('{"event"'))
        yield int(json.loads(line)["port"]), process


@dataclass(frozen=True)
class House:
    """Keys, a SuperLink, and the gateway before it."""

    keys: Path
    superlink: int
    gateway: int
    superlink_says: Process
    gateway_says: Process

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"https://127.0.0.1:{self.gateway}{path}", verify=self.context(), trust_env=False)

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.keys / "ca.crt"))

    def say(self, port: int, text: bytes) -> bytes:
        """Send bytes as they are to one of the two, and read the first 64 KiB of the answer."""
        plain = socket.create_connection(("127.0.0.1", port), timeout=30)
        with plain, self.context().wrap_socket(plain, server_hostname="localhost") as secure:
            secure.sendall(text)
            answer = b""
            while len(answer) < 65536 and (piece := secure.recv(65536)):
                answer += piece
        return answer
