"""Keeps one SuperNode running: starts it, and starts it again whenever it ends, for ever, at growing intervals.

The SuperNode and what it starts are one process group, which is gone when the keeper is: by `stop`, by a signal, or because
the SuperNode's standard input closes when the keeper dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from seedbed.common.files import storing

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_STEADY_SECONDS = 60.0
"""A SuperNode that lived so long has started well: the next one is started without delay."""
_GRACE = 8.0
"""Seconds that a SuperNode gets to take its leave of the coordinator."""
_CHECK_SECONDS, _PATIENCE = 10.0, 120.0
"""How often a SuperNode is asked whether it lives, and how long it may leave that unanswered."""
_LOG_BYTES = 5_000_000


class Keeper:
    """One SuperNode that is kept running.

    Args:
        command: of the SuperNode, whose last option is `--port` with the port that `health` asks.
        environment: of the SuperNode and everything that it starts.
        log: file that collects what they print; an older one is kept as ``<log>.1``.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, health: str) -> None:
        self.starts = 0
        """How often it has been started."""
        self.last_code: int | None = None
        """How the last one ended: an exit code, or minus a signal."""
        self._command, self._environment, self._log, self._health = list(command), dict(environment), log, health
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._not_before = self._answered = self._checked = 0.0
        self._pause = _FIRST_PAUSE

    @property
    def pid(self) -> int | None:
        """Of the SuperNode that runs, which is also its process group."""
        return self._process.pid if self._process is not None else None

    @property
    def waits(self) -> float:
        """Seconds until the next start; 0 where one runs."""
        return 0.0 if self._process is not None else max(0.0, self._not_before - time.monotonic())

    def tick(self) -> None:
        """Look after the SuperNode; to be called about every second.

        Raises:
            StorageError: if its log cannot be written.
        """
        if self._process is not None and self._process.poll() is not None:
            self._bury(self._process.returncode)
        if self._process is None:
            if time.monotonic() >= self._not_before:
                self._start()
        else:
            self._check(self._process)
        _rotate(self._log)

    def stop(self) -> None:
        """End the SuperNode and everything that it has started; returns when nothing is left."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        self._bury(None)

    def _start(self) -> None:
        with storing("write", self._log):
            self._log.parent.mkdir(parents=True, exist_ok=True)
            stream = self._log.open("ab")
        with stream:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,  # it closes when we die, and then so do they
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.starts += 1
        self._started = self._answered = self._checked = time.monotonic()

    def _bury(self, code: int | None) -> None:
        """What is left of a SuperNode that has ended, or shall, is ended with it."""
        assert self._process is not None
        end_group(self._process)
        lived = time.monotonic() - self._started
        self._pause = _FIRST_PAUSE if lived > _STEADY_SECONDS else min(_LONGEST_PAUSE, self._pause * 2)
        self._not_before = time.monotonic() + (0.0 if lived > _STEADY_SECONDS else self._pause)
        self._process, self.last_code = None, code

    def _check(self, process: subprocess.Popen[bytes]) -> None:
        """A SuperNode that hangs is ended; the next tick finds it so."""
        now = time.monotonic()
        if now - self._checked < _CHECK_SECONDS:
            return
        self._checked = now
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(self._health, timeout=2.0, trust_env=False)
            self._answered = now
        if now - self._answered > _PATIENCE:
            process.kill()


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a leader's group and its children that have left the group, and wait until they are gone."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _rotate(log: Path) -> None:
    """Keep the log small. Its writers append, so they go on at the beginning of the emptied file."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > _LOG_BYTES:
            log.with_name(f"{log.name}.1").write_bytes(log.read_bytes())
            os.truncate(log, 0)


def scripts_first(path: str) -> str:
    """A PATH on which Flower's own programs of this interpreter's environment are found before any others."""
    here = str(Path(sys.executable).parent)
    return os.pathsep.join([here, *(part for part in path.split(os.pathsep) if part and part != here)])
