"""Whether a process that runs also answers: asked now and then, by whoever keeps it running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

CHECK_SECONDS, PATIENCE = 10.0, 120.0
"""How often a process that serves is asked whether it lives, and how long it may leave that unanswered."""
START_SECONDS = 600.0
"""How long it may take until it serves: imports alone take minutes on a busy machine."""


class Watch:
    """Whether somebody hangs: asked now and then in a thread, since one that hangs may not answer that either.

    Args:
        alive: asks; may take its time.
        check: seconds between two questions.
        patience: seconds without an answer after which it hangs.
    """

    def __init__(self, alive: Callable[[], bool], check: float = CHECK_SECONDS, patience: float = PATIENCE) -> None:
        self._alive, self._check, self._patience = alive, check, patience
        self._asking: threading.Thread | None = None
        self.begin()

    def begin(self, allowance: float = 0.0) -> None:
        """It was started just now, and may take `allowance` seconds more until its first answer."""
        self._asked = self._called = time.monotonic()
        self._answered = self._asked + allowance

    def hangs(self) -> bool:
        """To be called about every second, or more often."""
        now = time.monotonic()
        if now - self._called > self._patience / 2:  # it was us who stood still
            self._asked, self._answered = now, max(now, self._answered)
        self._called = now
        idle = self._asking is None or not self._asking.is_alive()
        if idle and now - self._asked >= self._check:
            self._asked = now
            self._asking = threading.Thread(target=self._ask, name="is it alive", daemon=True)
            self._asking.start()
        return now - self._answered > self._patience

    def _ask(self) -> None:
        if self._alive():
            self._answered = time.monotonic()
