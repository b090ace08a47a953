"""Whether a training that says nothing hangs or is slow."""

from __future__ import annotations

import time
from typing import Any

from seedbed.common.errors import TrainingError

_STEPS = 20
"""How many times its longest silence a training may be silent."""


class Silence:
    """Tells a training that hangs, such as in a collective operation whose other side is gone, from one that is slow.

    Before its first step nothing is known: to load a large model may take an hour. From then on it has its own measure.

    Args:
        least: seconds of silence that are always allowed.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._seconds = self._longest = 0.0
        self._steps = False
        self._seen = time.monotonic()

    def heard(self, event: dict[str, Any]) -> None:
        """Called with every progress event of `client.worker`."""
        if event["event"] == "start":  # what was before it is imports and loading
            self._seconds = 0.0
        self._longest, self._seconds = max(self._longest, self._seconds), 0.0
        self._steps = self._steps or event["event"] == "step"

    def check(self) -> None:
        """Called at least once a second.

        Raises:
            TrainingError: if it has been silent for too long.
        """
        now = time.monotonic()
        # Where this process has stood still itself, as on a machine that was asleep, so has the training.
        self._seconds += min(now - self._seen, 1.0)
        self._seen = now
        if self._steps and self._seconds > max(self._least, _STEPS * self._longest):
            raise TrainingError(
                f"the training process hangs: no step for {self._seconds:.0f} s, where one took at most "
                f"{self._longest:.0f} s before",
                "Give it the job again: it goes on from its last checkpoint.",
            )
