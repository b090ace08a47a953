"""What one participant may take of a registry, so that the others find it answering."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from seedbed.server.registry.refusals import Busy


class Turns:
    """How many calls of one participant are answered at the same time: each holds a thread, however little it sends."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def one(self, who: str) -> Iterator[None]:
        """A call, from its beginning to its end.

        Raises:
            Busy: if it would be one too many.
        """
        with self._lock:
            if self._open[who] >= self._most:
                raise Busy(f"{self._most} calls of {who} are being answered already")
            self._open[who] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[who] -= 1
                if not self._open[who]:
                    del self._open[who]


class Rates:
    """How often each of many may do something: `burst` at once, then `rate` a second."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._left: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def allows(self, who: str) -> bool:
        now = time.monotonic()
        with self._lock:
            left, then = self._left.get(who, (self._burst, now))
            left = min(self._burst, left + (now - then) * self._rate)
            self._left[who] = (left - 1 if left >= 1 else left, now)
            return left >= 1
