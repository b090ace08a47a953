"""The SuperNode's process: Flower's own `flower-supernode`, in a wrapper that makes sure that it lives or is gone.

Run as ``python -m seedbed.client.join.supernode OPTIONS…``, the options being those of `flower-supernode`. Left alone, a
SuperNode that has lost what it needs can stay, doing nothing: when its connection is refused for good its main thread
returns while a server thread keeps the process; when its heartbeat thread has died it goes on without one; when its
executor has died it takes messages that nobody will answer. Here each of these ends the process, so that whoever watches it
starts it again (`supervise`).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from importlib.metadata import entry_points
from typing import Any

import psutil

_EXECUTOR = "flower-superexec"
_POLL_SECONDS = 5.0
LOST = 75
"""Exit code of a SuperNode that has lost what it needs and is worth starting again."""


def main(arguments: list[str]) -> None:
    """Run `flower-supernode` with these arguments; never returns."""
    threading.Thread(target=_end_with_executor, daemon=True).start()
    threading.excepthook = _end_with_thread
    sys.argv = ["flower-supernode", *arguments]
    try:
        (script,) = entry_points(group="console_scripts", name="flower-supernode")
        script.load()()
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else LOST)
    except KeyboardInterrupt:
        _leave(130)
    except BaseException:
        traceback.print_exc()
    _leave(LOST)


def _leave(code: int) -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit, which waits for threads that never end


def _end_with_executor() -> None:
    """Once Flower's executor has been seen, its end is ours."""
    me, seen = psutil.Process(), False
    while True:
        time.sleep(_POLL_SECONDS)
        alive = any(_is_executor(child) for child in me.children())
        if seen and not alive:
            print("the SuperNode's executor has ended", file=sys.stderr)
            _leave(LOST)
        seen = seen or alive


def _is_executor(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and any(_EXECUTOR in word for word in process.cmdline()[:2])
    except psutil.Error:
        return False


def _end_with_thread(arguments: Any) -> None:
    if arguments.exc_type is SystemExit:
        return
    traceback.print_exception(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
    _leave(LOST)


if __name__ == "__main__":
    main(sys.argv[1:])
