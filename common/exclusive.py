"""One at a time: a lock that holds between processes and is given back however its holder ends, even by kill -9."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from seedbed.common.errors import EnvironmentFailure
from seedbed.common.files import storing

_POLL_SECONDS = 0.2


def take_lock(path: Path) -> int | None:
    """Take the lock of a file, which is made, if nobody holds it.

    Returns:
        a file descriptor, which holds the lock until it is closed; none where another process holds it.

    Raises:
        StorageError: if the file cannot be made.
    """
    with storing("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not inherited by programs that are started: one that outlives us for a moment must not keep it.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def exclusive(path: Path, what: str, patience: float | None = None) -> Iterator[None]:
    """Hold the lock of a file while the body runs.

    Args:
        what: for messages: what another process is doing while it holds the lock.
        patience: seconds to wait for that other process; none waits as long as it takes.

    Raises:
        EnvironmentFailure: if another process still holds it then.
        StorageError: if the file cannot be made.
    """
    end = None if patience is None else time.monotonic() + patience
    while (handle := take_lock(path)) is None:
        if end is not None and time.monotonic() >= end:
            raise EnvironmentFailure(f"another process {what} (it holds {path})", "Wait for it, or end it.")
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        os.close(handle)
