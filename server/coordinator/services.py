"""The processes of a coordinator: their command lines, and each of them kept running."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from seedbed.common.errors import EnvironmentFailure
from seedbed.common.flower import flower_environment
from seedbed.common.hosts import host_port
from seedbed.common.processes import Backoff, Child, RotatingLog
from seedbed.common.watch import CHECK_SECONDS, PATIENCE, START_SECONDS, Watch

_FAILED_STARTS = 4
"""So many ends before it was ever ready, and it is given up."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the processes of one coordinator are."""

    run: Path
    host: str
    superlink_port: int
    keys: Path | None
    insecure: bool
    registry_options: tuple[str, ...] = ()
    """Its limits, as it takes them."""
    advertised_registry: int = 0
    """The port under which participants reach the registry, where a proxy stands before it; 0 is its own."""
    health_port: int = 0
    """Where the registry answers, on loopback, whether it lives; 0 is nowhere."""

    @property
    def superlink(self) -> str:
        return f"127.0.0.1:{self.superlink_port}"

    @property
    def ca(self) -> Path | None:
        return self.keys / "ca.crt" if self.keys is not None else None

    @property
    def directory(self) -> Path:
        """Of the SuperLink: its database and Flower's home."""
        return self.run / "superlink"

    def environment(self) -> dict[str, str]:
        """Of every process."""
        return {**flower_environment(self.directory), "PYTHONUNBUFFERED": "1"}

    def superlink_command(self, port: int) -> list[str]:
        """Loopback only; with keys in TLS, since Flower authenticates nodes no other way."""
        command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--database", str(self.directory / "state.db"), "--disable-runtime-dependency-installation"]
        if self.keys is None:
            return [*command, "--insecure"]
        own = self.keys / "server"
        command += ["--ssl-certfile", str(own / "server.crt"), "--ssl-keyfile", str(own / "server.key")]
        return [*command, "--ssl-ca-certfile", str(self.keys / "ca.crt"), "--enable-supernode-auth"]

    def registry_command(self, port: int) -> list[str]:
        health = ["--health-port", str(self.health_port)] if self.health_port else []
        return [*self._module("registry", port), *health, *self.registry_options, *self._keys()]

    def gateway_command(self, port: int, registry_port: int) -> list[str]:
        upstream = f"{'http' if self.keys is None else 'https'}://{self.superlink}"
        command = [*self._module("gateway", port), "--upstream", upstream, "--registry-port", str(registry_port)]
        if self.advertised_registry:
            command += ["--advertise-registry", str(self.advertised_registry)]
        return [*command, *self._keys()]

    def _module(self, name: str, port: int) -> list[str]:
        listen = host_port(self.host, port)
        return [sys.executable, "-m", f"seedbed.server.{name}", "--run", str(self.run), "--listen", listen]

    def _keys(self) -> list[str]:
        return ["--keys", str(self.keys)] if self.keys is not None else ["--insecure"] if self.insecure else []


class Service:
    """One process that is started again whenever it ends.

    Args:
        name: what the log and messages call it.
        command: its command line for a port.
        port: that it shall listen on; 0 is a free one, which it then keeps over restarts.
        ready: whether it serves; where none is given, it is when it has printed ``{"event": "listening", "port": N}``.
        alive: whether it answers; one that serves and has not answered for `patience` seconds is ended. Asked every `check`
            seconds, in a thread of its own.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[int], Sequence[str]],
        port: int,
        log: RotatingLog,
        environment: Mapping[str, str],
        ready: Callable[[], bool] | None = None,
        alive: Callable[[], bool] | None = None,
        check: float = CHECK_SECONDS,
        patience: float = PATIENCE,
    ) -> None:
        self.name = name
        self.port = port
        self.starts = 0
        """How often it has been started."""
        self.child: Child | None = None
        self._command, self._log, self._environment, self._asked = command, log, environment, ready
        self._backoff = Backoff()
        self._not_before = 0.0
        self._listening = self._was_ready = False
        self._last_words: list[str] = []
        self._watch = Watch(alive, check, patience) if alive is not None else None

    @property
    def ready(self) -> bool:
        """Whether it serves now."""
        if self.child is None:
            return False
        if not self._listening and self._asked is not None:
            self._listening = self._asked()
        self._was_ready = self._was_ready or self._listening
        return self._listening

    def tick(self) -> None:
        """Look after it; to be called several times a second.

        Raises:
            EnvironmentFailure: if it ends again and again without ever having been ready.
        """
        if self.child is not None and self._listening and self._watch is not None and self._watch.hangs():
            self._log.write("coordinator", f"{self.name} does not answer: it is ended")
            self.child.kill()
        if self.child is not None and not self._listening and time.monotonic() - self.child.started > START_SECONDS:
            self._log.write("coordinator", f"{self.name} does not begin to serve: it is ended")
            self.child.kill()
        if self.child is not None and self.child.poll() is not None:
            self._bury(self.child)
        if self.child is None and time.monotonic() >= self._not_before:
            self._start()

    def ask_to_end(self) -> None:
        if self.child is not None:
            self.child.ask_to_end()

    def stop(self, grace: float) -> None:
        """End it and everything that it has started; returns when nothing is left."""
        if self.child is not None:
            self.child.stop(grace)
            self.child = None
        self._not_before = float("inf")

    def _start(self) -> None:
        self._listening = False
        if self._watch is not None:
            self._watch.begin()
        self.starts += 1
        self._log.write("coordinator", f"{'starting' if self.starts == 1 else 'starting again'}: {self.name}")
        self.child = Child(
            self.name,
            self._command(self.port),
            log=self._log,
            on_line=self._hear,
            environment=self._environment,
        )

    def _bury(self, child: Child) -> None:
        code = child.kill()
        self._log.write("coordinator", f"{self.name} has ended with code {code}")
        self.child, self._listening = None, False
        pause = self._backoff.after(time.monotonic() - child.started)
        self._not_before = time.monotonic() + pause
        if not self._was_ready and self.starts >= _FAILED_STARTS:
            words = [line.strip().rstrip(".") for line in self._last_words if line.strip()]
            said = ". ".join(words[-2:]) or f"exit code {code}"  # an error and its hint
            raise EnvironmentFailure(f"the {self.name} cannot be started: {said[:300]}", f"See {self._log.path}.")

    def _hear(self, line: str) -> None:
        self._last_words = [*self._last_words[-4:], line]
        if not line.startswith("{"):
            return
        try:
            told = json.loads(line)
        except ValueError:
            return
        if isinstance(told, dict) and told.get("event") == "listening" and isinstance(told.get("port"), int):
            self.port = told["port"]
            if self._asked is None:
                self._listening = True
