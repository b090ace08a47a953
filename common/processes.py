"""Processes that are started, watched, logged and ended as a whole: they and whatever they start die with this one.

    child = Child("registry", [sys.executable, "-m", "seedbed.server.registry", …], log=log)
    child.poll()        None while it runs, else its exit code
    child.stop()        gently, then hard; returns when nothing of it is left

Every child runs below a `keeper`, which kills it and all its descendants when this process is gone, even by kill -9.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import psutil

from seedbed.common import keeper
from seedbed.common.files import storing

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LONGEST_LINE = 10_000
_KILL_SECONDS = 10.0
"""How long the death of a killed process is waited for."""


class RotatingLog:
    """A log that several processes of this one's share: a JSON object with `time`, `process` and `text` on each line.

    When the file would exceed its size it is renamed to ``NAME.1``, that to ``NAME.2`` and so on; the oldest goes.

    Args:
        path: of the current file; its directory is made.
        max_bytes: size of one file.
        keep: number of older files that are kept.

    Raises:
        StorageError: if the directory cannot be made.
    """

    def __init__(self, path: Path, *, max_bytes: int = 10_000_000, keep: int = 4) -> None:
        self.path = path
        self._max_bytes, self._keep = max_bytes, keep
        self._lock = threading.Lock()
        with storing("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, process: str, text: str) -> None:
        """Add a line. A disk that is full costs the line, not the process."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        said = {"time": now, "process": process, "text": _COLOURS.sub("", text).rstrip()[:_LONGEST_LINE]}
        line = (json.dumps(said, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
        with self._lock, contextlib.suppress(OSError):
            if self.path.exists() and self.path.stat().st_size + len(line) > self._max_bytes:
                self._rotate()
            with self.path.open("ab") as file:
                file.write(line)

    def _rotate(self) -> None:
        for number in range(self._keep, 0, -1):
            younger = self.path if number == 1 else self._older(number - 1)
            if younger.exists():
                os.replace(younger, self._older(number))
        if not self._keep:
            self.path.unlink(missing_ok=True)

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


class Child:
    """A running command with everything that it starts.

    Args:
        name: what the log calls it.
        command: program and arguments. Secrets do not belong there: everybody can read them.
        log: gets every line that it prints.
        on_line: gets every line that it prints, too, in a thread of its own.
        environment: variables on top of this process's.
        directory: where it runs.
        scratch: a directory of its own, which is removed when nothing of it is left, also after kill -9 of this process.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: RotatingLog | None = None,
        on_line: Callable[[str], None] | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.name = name
        self.started = time.monotonic()
        self._buried = False
        self._scratch = scratch
        # -I -S: the keeper needs nothing but the standard library, and starts in no time.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(keeper.__file__), str(scratch or ""), *command],
            stdin=subprocess.PIPE,  # it closes when we die, and then so do they
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd=directory,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(
            target=_pass_on, args=(self._process.stdout, name, log, on_line), name=f"log of {name}", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the keeper, which is the leader of the process group."""
        return self._process.pid

    def descendants(self) -> list[psutil.Process]:
        """The command and everything below it, as long as they run."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def poll(self) -> int | None:
        """Its exit code (128 + N after signal N), or None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._bury()
        return code

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end; None where it runs on after `timeout` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self.poll()

    def stop(self, grace: float = 5.0) -> int:
        """Ask it to end, and end it after `grace` seconds; returns its exit code when nothing of it is left."""
        self.ask_to_end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        return self.kill()

    def ask_to_end(self) -> None:
        """SIGTERM, and no waiting: so that several can be ended at the same time."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> int:
        """End it and all below it now."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()  # the keeper kills the rest, and leaves
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_SECONDS)
        self._bury()
        self._reader.join(_KILL_SECONDS)  # so that its last words are in the log
        return self._process.wait()

    def _bury(self) -> None:
        """Where the keeper itself was killed, its group is all that can be found of the rest. Once: its number is free now."""
        if self._buried:
            return
        self._buried = True
        remains = self.descendants()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in remains:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _pass_on(pipe: IO[bytes], name: str, log: RotatingLog | None, on_line: Callable[[str], None] | None) -> None:
    with contextlib.suppress(ValueError, OSError), pipe:
        for line in iter(lambda: pipe.readline(_LONGEST_LINE * 10), b""):
            text = line.decode("utf-8", errors="replace").rstrip("\n")
            if log is not None:
                log.write(name, text)
            if on_line is not None:
                on_line(text)


@dataclass
class Backoff:
    """How long to wait before something that ended is started again: doubling, and forgotten after a steady life."""

    first: float = 0.5
    longest: float = 30.0
    steady: float = 60.0
    """Seconds after which a life counts as steady."""
    failures: int = 0
    """Short lives in a row."""

    def after(self, lived: float) -> float:
        """Seconds to wait after a life of `lived` seconds."""
        self.failures = 1 if lived >= self.steady else self.failures + 1
        return float(min(self.longest, self.first * 2 ** min(self.failures - 1, 30)))


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different TCP ports that nobody listens on just now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on just now."""
    return free_ports(1, host)[0]
