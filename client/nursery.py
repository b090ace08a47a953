"""A process that has everything imported and forks training processes, so that a short job need not wait for imports.

Importing torch, transformers and PEFT takes seconds of a core, as long as a small expert trains. One nursery for each
participant pays that once. It never trains, touches no GPU and starts no threads, so that forking it is safe.

    client (Nursery)  --- unix socket: spec, environment and three file descriptors --->  nursery  --- fork --->  worker

A worker is the leader of a session of its own, as one that was started anew. The nursery ends when its socket closes, that
is, when whoever started it is gone, and its workers end as ever when their standard input closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

_READY = b"!"
_POLL_SECONDS = 0.05
_START_SECONDS = 120.0
"""The longest that the imports may take; then workers are started anew."""


class NurseryProcess:
    """A forked worker, seen from the client: the part of `subprocess.Popen` that is needed here."""

    def __init__(self, nursery: Nursery, pid: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self._nursery = nursery
        self.pid = pid
        self.stdin: IO[bytes] | None = stdin
        self.stdout: IO[bytes] | None = stdout

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._nursery.code_of(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: if it does not end in time.
        """
        return self._nursery.wait(self.pid, timeout)

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)


class NurseryGoneError(Exception):
    """The nursery has ended; a worker can still be started anew."""


class Nursery:
    """The client's side of one nursery process."""

    def __init__(self) -> None:
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # One thread: a pool that exists before a fork is lost in the fork, and whoever waits for it waits for ever.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "seedbed.client.nursery", str(other.fileno())],
                pass_fds=(other.fileno(),),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._socket = own
        self._starting, self._changed = threading.Lock(), threading.Condition()
        self._codes: dict[int, int] = {}
        self._started: list[int] = []
        self._gone = False
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def alive(self) -> bool:
        return not self._gone

    def start(self, spec_file: Path, environment: Mapping[str, str], log: IO[bytes]) -> NurseryProcess:
        """Fork a worker for a spec.

        Raises:
            NurseryGoneError: if the nursery has ended, or could not import what it needs.
        """
        stdin, to_stdin = os.pipe()
        from_stdout, stdout = os.pipe()
        request = json.dumps({"spec": str(spec_file.resolve()), "environment": dict(environment)}).encode()
        try:
            with self._starting, self._changed:  # one at a time: the next that starts is this one
                socket.send_fds(self._socket, [request], [stdin, stdout, log.fileno()])
                ready = self._changed.wait_for(lambda: self._started or self._gone, _START_SECONDS)
                if not ready or self._gone:
                    self._gone = True  # one that does not answer is not asked again
                    self._process.kill()
                    raise OSError
                pid = self._started.pop()
        except OSError:
            os.close(to_stdin)
            os.close(from_stdout)
            raise NurseryGoneError from None
        finally:
            os.close(stdin)
            os.close(stdout)
        return NurseryProcess(self, pid, os.fdopen(to_stdin, "wb"), os.fdopen(from_stdout, "rb"))

    def code_of(self, pid: int) -> int | None:
        with self._changed:
            return self._codes.get(pid, -signal.SIGKILL if self._gone else None)

    def wait(self, pid: int, timeout: float | None) -> int:
        with self._changed:
            if not self._changed.wait_for(lambda: pid in self._codes or self._gone, timeout):
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            return self._codes.get(pid, -signal.SIGKILL)

    def close(self) -> None:
        """End the nursery; workers end with their standard input."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        self._socket.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._socket.recv(4096):
                told = json.loads(data)
                with self._changed:
                    if "started" in told:
                        self._codes.pop(told["started"], None)  # the number was another's, once
                        self._started.append(told["started"])
                    else:
                        self._codes[told["ended"]] = told["code"]
                    self._changed.notify_all()
        with self._changed:
            self._gone = True
            self._changed.notify_all()


def main(arguments: list[str]) -> None:
    """The nursery: fork on request, report ends, until the socket closes."""
    channel = socket.socket(fileno=int(arguments[0]))
    _preload()
    running: set[int] = set()
    while True:
        readable, _, _ = select.select([channel], [], [], _POLL_SECONDS if running else None)
        if readable:
            data, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 3)
            if not data:
                return
            running.add(_fork(json.loads(data), descriptors, channel))
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.discard(pid)
                channel.send(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


def _preload() -> None:
    """Import what every training needs; nothing here may start a thread or touch a GPU."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    import seedbed.client.outcome
    import seedbed.client.training
    import seedbed.client.worker

    _ = (peft, torch, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, seedbed.client)


def _fork(request: dict[str, Any], descriptors: list[int], channel: socket.socket) -> int:
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become_worker(request, descriptors, channel, tell)
    os.close(tell)
    os.read(ready, 1)  # only then is it the leader of its group, which can be killed as one
    os.close(ready)
    for descriptor in descriptors:
        os.close(descriptor)
    channel.send(json.dumps({"started": pid}).encode())
    return pid


def _become_worker(request: dict[str, Any], descriptors: list[int], channel: socket.socket, tell: int) -> None:
    code = 1
    try:
        os.setsid()
        os.write(tell, _READY)
        channel.close()
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        os.environ.clear()
        os.environ.update(cast("dict[str, str]", request["environment"]))
        _restore_threads()
        from seedbed.client.worker import main as work

        code = work([request["spec"]])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)  # nothing of the nursery's own is tidied up twice


def _restore_threads() -> None:
    """As many threads as a process that is started anew would have."""
    import torch

    asked = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(asked) if asked.isdigit() and int(asked) else len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main(sys.argv[1:])
