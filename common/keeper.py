"""Runs one command such that neither it nor anything that it starts outlives whoever asked.

    python keeper.py SCRATCH COMMAND…       SCRATCH: a directory that is removed at the end, or an empty word

A wrapper of few imports, run by its path (see `processes`, which starts it). Its standard input is a pipe from whoever
asked: when that closes, by a clean end or by kill -9, every process below is killed. It is a *subreaper*: what a child of a
child leaves behind, even in a session of its own, becomes this process's child, so that it can be found and ended. When the
command ends by itself, what it has left is ended, too, and its exit code passed on.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
"""Of prctl(2)."""


def _prctl(option: int, value: int) -> None:
    """Linux alone has it; elsewhere the process group has to do."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(option, value, 0, 0, 0)


def _children() -> list[int]:
    """Processes whose parent is this one."""
    me, found = os.getpid(), []
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    # Behind the name, which may hold anything, stand state and parent.
                    if int(file.read().rpartition(b")")[2].split()[1]) == me:
                        found.append(int(entry))
            except OSError:
                continue
    return found


def _end_all() -> None:
    """Kill generation after generation until nothing is below this process."""
    while True:
        for pid in _children():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _start(command: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # should this wrapper be killed itself
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]} cannot be started: {error.strerror}\n".encode())
    os._exit(127)


def _reap(command: int) -> int | None:
    """Bury what has ended; the command's exit code when it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == command:
            ended = os.waitstatus_to_exitcode(status)
            code = ended if ended >= 0 else 128 - ended


def main(arguments: list[str]) -> int:
    """Run a command to its end or to that of whoever asked, then remove its scratch directory.

    Args:
        arguments: the directory (empty: none), the program and its arguments.

    Returns:
        its exit code; 128 + N where signal N ended it.
    """
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    scratch, *command = arguments
    code = _watch(_start(command), woken)
    _end_all()
    if scratch:
        import shutil  # slow to import, and mostly not needed

        shutil.rmtree(scratch, ignore_errors=True)
    return code


def _watch(command: int, woken: int) -> int:
    """Wait until the command ends, or whoever asked is gone; returns the exit code."""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            for caught in os.read(woken, 4096):
                if caught in (signal.SIGTERM, signal.SIGINT):
                    try:
                        os.kill(command, signal.SIGTERM)
                    except ProcessLookupError:
                        continue
            code = _reap(command)
            if code is not None:
                return code
        if 0 in ready and not os.read(0, 4096):
            return 128 + signal.SIGKILL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
