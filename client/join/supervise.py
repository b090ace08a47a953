"""Keeps one SuperNode running: starts it, and starts it again whenever it ends or hangs, for ever, at growing intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from seedbed.common.processes import Backoff, Child, RotatingLog, free_port
from seedbed.common.watch import START_SECONDS, Watch

_GRACE = 8.0
"""Seconds that a SuperNode gets to take its leave of the coordinator."""
_LOG_BYTES, _OLD_LOGS = 5_000_000, 2


class Supervisor:
    """One SuperNode that is kept running; it and all that it has started end with this process, however that ends.

    Args:
        command: gives the command of a SuperNode whose own local server (for the jobs' processes) has that port.
        environment: variables on top of this process's.
        log: file that collects what it prints.
        on_line: gets every line that it prints, in a thread of its own.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        environment: Mapping[str, str],
        log: Path,
        on_line: Callable[[str], None],
    ) -> None:
        self._command, self._environment, self._on_line = command, dict(environment), on_line
        self._log = RotatingLog(log, max_bytes=_LOG_BYTES, keep=_OLD_LOGS)
        self._child: Child | None = None
        self._backoff = Backoff(first=1.0, longest=60.0)
        self._port = 0
        self._not_before = 0.0
        self._watch = Watch(self._answers)

    @property
    def pause(self) -> float:
        """Seconds until the next start; 0 where one runs."""
        return 0.0 if self._child is not None else max(0.0, self._not_before - time.monotonic())

    def tick(self) -> int | None:
        """Look after the SuperNode; to be called about every second.

        Returns:
            the exit code of one that has ended since the last time (128 + N after signal N).
        """
        child, code = self._child, None
        if child is not None and (code := child.poll()) is not None:
            self._child = None
            self._not_before = time.monotonic() + self._backoff.after(time.monotonic() - child.started)
        if self._child is None and time.monotonic() >= self._not_before:
            self._start()
        elif self._child is not None and self._watch.hangs():
            self._child.kill()  # the next tick finds it so
        return code

    def stop(self) -> None:
        """End the SuperNode and everything that it has started; returns when nothing is left."""
        if self._child is not None:
            self._child.stop(_GRACE)
            self._child = None

    def _start(self) -> None:
        self._port = free_port()
        self._child = Child(
            "supernode",
            self._command(self._port),
            log=self._log,
            on_line=self._on_line,
            environment=self._environment,
        )
        self._watch.begin(START_SECONDS)

    def _answers(self) -> bool:
        try:
            httpx.get(f"http://127.0.0.1:{self._port}/health", timeout=2.0, verify=False, trust_env=False)
        except httpx.HTTPError:
            return False
        return True
