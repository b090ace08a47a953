"""What a person sees of a verb: progress while it works, and one sentence with a next step when it fails."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from typing import NoReturn

from rich.console import Console

from seedbed.server.observer import Bars, Lines, Observer, Silent


def fail(message: str, hint: str, code: int) -> NoReturn:
    """Say what is wrong and what to do next, and end the process."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"error: {message}", markup=False, style="bold red" if console.is_terminal else None)
    if hint:
        console.print(hint, markup=False)
    sys.exit(code)


def command_line() -> str:
    """The command that is running, as it can be typed again."""
    return shlex.join(["seedbed", *sys.argv[1:]])


@contextlib.contextmanager
def observer(quiet: bool) -> Iterator[Observer]:
    """Progress as bars on a terminal, as lines elsewhere, or not at all."""
    console = Console(stderr=True)
    if quiet:
        yield Silent()
    elif console.is_terminal and not os.environ.get("CI"):
        with Bars(console) as bars:
            yield bars
    else:
        yield Lines(console)
