"""Start training as processes of their own, watch them, and turn whatever happens into a result or one readable error.

A crash, an out-of-memory or a loss that is not a number costs one job, not the participant; GPU memory is given back;
and nothing keeps running, however this process ends.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from seedbed.client.nursery import Nursery, NurseryGoneError, NurseryProcess
from seedbed.client.outcome import manifest_of
from seedbed.client.silence import Silence
from seedbed.client.spec import TrainSpec
from seedbed.client.training import choose_engine
from seedbed.client.worker import MEMORY_HINT, WATCH
from seedbed.common import errors
from seedbed.common.errors import SeedbedError, StorageError, TrainingError
from seedbed.common.files import atomic_write
from seedbed.common.manifest import Manifest

__all__ = ["TrainOutcome", "choose_engine", "run"]

_WORKER = "seedbed.client.worker"
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_GRACE = 10.0
"""Seconds that DeepSpeed's multi-node launcher gets to end its remote processes."""


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """A trained result on disk."""

    directory: Path
    manifest: Manifest
    metrics: dict[str, float]
    seconds: float
    """Wall-clock time, with the start of the processes."""


def run(
    spec: TrainSpec,
    *,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    deadline: float | None = None,
    stall: float = 300.0,
    log: Path,
    warm: bool = False,
) -> TrainOutcome:
    """Train in processes of their own and wait for the result.

    Args:
        warm: fork the process from one that has everything imported (see `nursery`), where the job is a single process on
            a CPU; it saves the seconds that the imports take.
        on_event: gets every progress event of `client.worker`.
        deadline: seconds that the job may take.
        stall: seconds without a word after which a training that has made steps counts as hanging; never less than 20
            times as long as its longest silence before.
        log: file that collects what the processes print; the spec is written beside it.

    Raises:
        TrainingError: if the processes crash, hang, run out of memory or time, or the loss diverges.
        StorageError: if the output is already there.
        SeedbedError: whatever else a worker reports, such as DataError, as that type.
    """
    if spec.output.exists():
        raise StorageError(f"{spec.output} is already there", "Choose another output directory.")
    started = time.monotonic()
    spec_file = log.with_name(f"{log.name}.spec.json")
    atomic_write(spec_file, spec.model_dump_json(indent=2).encode())
    forked = warm and _command(spec, spec_file) == _single(spec_file) and not torch.cuda.is_available()
    with log.open("ab") as stream, _running(spec, spec_file, stream, forked=forked) as process:
        until = started + deadline if deadline is not None else None
        events = _events(process, stream, until, Silence(stall))
        done = _last(events, on_event)
        code = process.wait() if done is None else 0
    if done is None:
        raise _crash(code, log)
    return TrainOutcome(spec.output, manifest_of(spec.output), dict(done["metrics"]), time.monotonic() - started)


def _last(events: Iterator[dict[str, Any]], on_event: Callable[[dict[str, Any]], None] | None) -> dict[str, Any] | None:
    """Pass events on until the job is done, and return that event; None where the processes ended without one."""
    for event in events:
        if on_event is not None:
            on_event(event)
        if event["event"] == "error":
            kind = getattr(errors, str(event.get("type")), TrainingError)
            raise kind(str(event.get("message")), str(event.get("hint", "")))
        if event["event"] == "done":
            return event
    return None


Process = subprocess.Popen[bytes] | NurseryProcess


@contextmanager
def _running(spec: TrainSpec, spec_file: Path, log: IO[bytes], *, forked: bool) -> Iterator[Process]:
    """The processes as a group of their own, all of which are gone when the body is left."""
    command, environment = _command(spec, spec_file), _environment(spec)
    process: Process | None = _fork(spec_file, environment, log) if forked else None
    if process is None:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,  # it closes when we die, and then so do they
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)  # after "done" there is only tidying up
    finally:
        _end(process, gently="deepspeed.launcher.runner" in command)


_kept: list[Nursery] = []


def _fork(spec_file: Path, environment: Mapping[str, str], log: IO[bytes]) -> NurseryProcess | None:
    """A worker of this process's nursery; none where there is no nursery to be had, and the worker must say why."""
    while _kept and not _kept[-1].alive:
        _kept.pop()
    if not _kept:
        _kept.append(Nursery())
        atexit.register(_kept[-1].close)
    with suppress(NurseryGoneError):
        return _kept[-1].start(spec_file, environment, log)
    return None


def _end(process: Process, gently: bool) -> None:
    if gently and process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def _events(process: Process, log: IO[bytes], until: float | None, silence: Silence) -> Iterator[dict[str, Any]]:
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    ended = False
    while True:
        if until is not None and time.monotonic() > until:
            raise TrainingError(
                "the training job did not finish before its deadline", "Give it more time or fewer steps."
            )
        silence.check()
        try:
            # A process that is gone leaves at most what is already in the pipe.
            line = lines.get(timeout=0.2)
        except queue.Empty:
            if ended:
                return
            ended = process.poll() is not None
            continue
        if line is None:
            return
        event = _parse(line)
        if event is None:
            log.write(line)
        else:
            silence.heard(event)
            yield event


def _read(pipe: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    with suppress(ValueError, OSError):  # closed under our hands when the job is ended early
        for line in pipe:
            lines.put(line)
    lines.put(None)


def _parse(line: bytes) -> dict[str, Any] | None:
    """An event, or None for what a launcher prints."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _single(spec_file: Path) -> list[str]:
    return [sys.executable, "-u", "-m", _WORKER, str(spec_file.resolve())]


def _command(spec: TrainSpec, spec_file: Path) -> list[str]:
    own = [_WORKER, str(spec_file.resolve())]
    deepspeed = spec.training.deepspeed
    python = [sys.executable, "-u", "-m"]
    if choose_engine(spec.training) == "torch":
        return _single(spec_file)
    options = ["--master_port", str(_free_port()), "--no_local_rank", "--module"]
    if deepspeed.hostfile is not None:
        return [*python, "deepspeed.launcher.runner", "--hostfile", str(deepspeed.hostfile), *options, *own]
    if _ranks(spec) == 1:
        return _single(spec_file)
    world = base64.urlsafe_b64encode(json.dumps({"localhost": _local_devices(_ranks(spec))}).encode()).decode()
    launch = ["deepspeed.launcher.launch", "--world_info", world, "--node_rank", "0", "--master_addr", "127.0.0.1"]
    return [*python, *launch, *options, *own]


def _ranks(spec: TrainSpec) -> int:
    """Ranks on this machine."""
    if choose_engine(spec.training) == "torch":
        return 1
    wanted = spec.training.deepspeed.processes
    return wanted if wanted != "auto" else max(1, torch.cuda.device_count())


def _local_devices(count: int) -> list[int | str]:
    """Devices for the launcher, which sets CUDA_VISIBLE_DEVICES anew: of those that this process may see."""
    visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
    return [visible[index] if index < len(visible) else index for index in range(count)]


def _environment(spec: TrainSpec) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_VARIABLES}
    environment[WATCH] = "1"
    ranks = _ranks(spec)
    # Ranks that share cores and each use all of them wait for each other's threads most of the time.
    threads = spec.threads or (max(1, len(os.sched_getaffinity(0)) // ranks) if ranks > 1 else 0)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if choose_engine(spec.training) == "deepspeed" and ranks == 1:
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        environment.update({key: str(value) for key, value in alone.items()})
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _crash(code: int, log: Path) -> SeedbedError:
    """An error for processes that ended without a word."""
    # A launcher passes a signal on as 256 - signal.
    number = -code if code < 0 else 256 - code if code > 200 else 0
    if number == signal.SIGKILL:
        return TrainingError("the training process was killed, most likely because memory ran out", MEMORY_HINT)
    how = f"by signal {signal.Signals(number).name}" if number in set(signal.Signals) else f"with exit code {code}"
    reason = _essence(log)
    return TrainingError(f"the training process ended {how}{': ' + reason if reason else ''}", f"See {log}.")


def _essence(log: Path) -> str:
    """The last line of a log that says something: an exception's, where there is one."""
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]]
        told = [line for line in lines if line]
        raised = [line for line in told if line.split(":")[0].endswith(("Error", "Exception"))]
        return (raised or told or [""])[-1][:300]
    return ""
