"""A whole federation on this machine, as real processes: a coordinator and two participants, TLS and node keys on.

Everything that belongs to it carries a mark in its environment, so that every process can be found, hit and, in the end,
missed: a world that is closed leaves nothing. Participants are kept running as a service manager would keep them; the
coordinator is not: it ends with a reason, and somebody says `--resume`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from seedbed.common.embedded import write_task
from seedbed.common.events import Event, EventLog
from seedbed.common.processes import free_port
from seedbed.server.keys import Authority

MARK = "SEEDBED_FAULTS"
TASKS = {"alice": "addition", "bob": "antonym"}
"""Who brings what."""
SETTINGS = (
    "tasks.experts=[addition, antonym]",
    "tasks.held_out=[word_problem]",
    "training.steps=4",
    "training.batch_size=64",
    "seed.steps=4",
    "seed.fraction=0.5",
    "evaluation.limit=10",
    "evaluation.drift=false",
    "combine.candidates=[base, seed, experts, average]",
    "stages.quorum=1.0",
    "stages.deadline=1200",
)
_LINGER = 300
_END_SECONDS = 120.0
_RESTART_SECONDS = 5.0
"""At most so often a participant is started again, as by systemd."""


class TooLongError(AssertionError):
    """What had to come did not come."""


@dataclass
class Marks:
    """How far a run has come, read from what its processes write."""

    run: Path
    _offset: int = 0
    events: list[Event] = field(default_factory=list)

    def look(self) -> None:
        with contextlib.suppress(OSError):
            found, self._offset = EventLog(self.run / "events.jsonl").read(self._offset)
            self.events += found

    def stages(self) -> list[str]:
        return [event.name for event in self.events if event.kind == "stage" and event.detail.get("total")]


class World:
    """One federation.

    Args:
        root: an empty directory.
        settings: on top of `SETTINGS`.
        environment: variables of the coordinator and of each participant, by name.
        ways: hosts at which participants look for the coordinator, where something stands in between.
    """

    def __init__(
        self,
        root: Path,
        settings: Iterable[str] = (),
        environment: Mapping[str, Mapping[str, str]] | None = None,
        ways: Mapping[str, str] | None = None,
    ) -> None:
        self.root, self.run = root, root / "coordinator" / "run"
        self.ways = dict(ways or {})
        self.mark = uuid.uuid4().hex
        self.settings = (*SETTINGS, *settings)
        self.port, self.registry_port = free_port(), free_port()
        self.marks = Marks(self.run)
        self.coordinator: subprocess.Popen[bytes] | None = None
        self.clients: dict[str, subprocess.Popen[bytes]] = {}
        self.starts: Counter[str] = Counter()
        self.leaving = False
        self._started: dict[str, float] = {}
        self._environment = {
            **os.environ,
            MARK: self.mark,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "400",
            "HF_HUB_OFFLINE": "1",
        }
        self._own = dict(environment or {})
        root.mkdir(parents=True, exist_ok=True)
        authority = Authority.create(root / "keys", ["127.0.0.2", "127.0.0.3"])
        for name, task in TASKS.items():
            authority.participant(name)
            write_task(task, root / "data" / name, 256, 8, 0)

    # -- starting and ending ------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.start_coordinator(resume=False)
        for name in TASKS:
            self.start_client(name)

    def start_coordinator(self, *, resume: bool) -> None:
        command = ["coordinator", "embedded", "--out", str(self.run), "--keys", str(self.root / "keys"), "--quiet"]
        command += ["--port", str(self.port), "--registry-port", str(self.registry_port), "--linger", str(_LINGER)]
        command += [word for setting in self.settings for word in ("--set", setting)]
        self.coordinator = self._spawn("coordinator", [*command, *(["--resume"] if resume else [])])

    def start_client(self, name: str) -> None:
        data = self.root / "data" / name / f"{TASKS[name]}.train.jsonl"
        where = f"{self.ways.get(name, '127.0.0.1')}:{self.port}"
        command = ["join", where, "--task", str(data), "--once", "--wait", "300", "--gpus", "none"]
        command += ["--keys", str(self.root / "keys/participants" / name), "--work", str(self.work_of(name))]
        self.clients[name] = self._spawn(name, command)

    def work_of(self, name: str) -> Path:
        return self.root / "work" / name

    def _spawn(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        self.starts[name] += 1
        self._started[name] = time.monotonic()
        (self.root / "logs").mkdir(exist_ok=True)
        with self._log(name).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "seedbed.server.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self._environment, **self._own.get(name, {})},
                start_new_session=True,
            )

    def _log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.{self.starts[name]}.log"

    def said(self, name: str = "coordinator") -> str:
        """What a process printed since it was last started."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self._log(name).read_text(errors="replace")).strip()

    def close(self) -> None:
        """End everything, in whatever state it is."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for started in (self.coordinator, *self.clients.values()):
            if started is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(20)
        self.wait(lambda: not self.processes(), 20, "the end of everything")

    # -- looking ------------------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Every living process of this world, wherever it hangs in the tree."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def below(self, root: subprocess.Popen[bytes] | None, *words: str) -> list[psutil.Process]:
        """Processes below one, with a word of these in the beginning of their command lines; keepers are not counted."""
        found = []
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(root.pid).children(recursive=True) if root is not None else []:
                with contextlib.suppress(psutil.Error):
                    line = process.cmdline()
                    kept = any(part.endswith("keeper.py") for part in line[:4])
                    if not kept and any(word in part for part in line[:6] for word in words):
                        found.append(process)
        return found

    def trainings(self, name: str) -> list[psutil.Process]:
        """Training processes of a participant: forked by its nursery, or started anew."""
        found = self.below(self.clients.get(name), "seedbed.client.worker")
        for nursery in self.below(self.clients.get(name), "seedbed.client.nursery"):
            with contextlib.suppress(psutil.Error):
                parent = nursery.parent()
                if parent is not None and "seedbed.client.nursery" in parent.cmdline():
                    found.append(nursery)
        return found

    def trains(self, name: str, prefix: str) -> bool:
        """Whether a job whose name begins so is being trained by a participant: it has begun, and not ended."""
        for note in self.work_of(name).glob("work/*/job.json"):
            with contextlib.suppress(OSError, ValueError):
                told = json.loads(note.read_text())
                if told["state"] == "training" and told["name"].startswith(prefix):
                    events = (note.parent / "progress.jsonl").read_text()
                    if '"start"' in events and '"done"' not in events:
                        return bool(self.trainings(name))
        return False

    def whole(self) -> bool:
        """Whether all services of the coordinator run and participants are there."""
        alive = [*self.clients.values(), self.coordinator]
        if any(process is None or process.poll() is not None for process in alive):
            return False
        return self._serves() and all(
            self.below(self.coordinator, word) for word in ("flower-superlink", "seedbed.server.registry")
        )

    def _serves(self) -> bool:
        """Whether the ServerApp runs."""
        try:
            pid = json.loads((self.run / "superlink" / "serverapp.json").read_text())["pid"]
            return psutil.Process(pid).environ().get(MARK) == self.mark
        except (OSError, ValueError, psutil.Error):
            return False

    def ledger(self) -> list[dict[str, Any]]:
        path = self.run / "ledger.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def accepted(self) -> dict[str, str]:
        """Digests by recipe."""
        return {entry["key"]: entry["digest"] for entry in self.ledger() if entry["event"] == "accepted"}

    def digests(self) -> dict[str, str]:
        results = json.loads((self.run / "results.json").read_text())
        return {name: candidate["digest"] for name, candidate in results["candidates"].items()}

    def finished(self) -> bool:
        self.marks.look()
        return any(event.kind == "finished" for event in self.marks.events)

    # -- waiting ------------------------------------------------------------------------------------------------------

    def tend(self) -> None:
        """What a service manager does: a participant that has ended is started again, unless the federation has ended."""
        now = time.monotonic()
        for name, process in list(self.clients.items()):
            if process.poll() is not None and not self.leaving and now - self._started[name] > _RESTART_SECONDS:
                self.start_client(name)

    def wait(self, condition: Callable[[], object], seconds: float, what: str, poll: float = 0.2) -> None:
        """Wait until something is so, looking every `poll` seconds.

        Raises:
            TooLongError: if it does not become so.
        """
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TooLongError(f"waited {seconds:.0f} s in vain for {what}")
            time.sleep(poll)

    def wait_for_end(self, seconds: float) -> int | None:
        """Until the run has finished (None), or the coordinator has ended (its exit code).

        Raises:
            TooLongError: if neither happens.
        """
        assert self.coordinator is not None
        coordinator = self.coordinator

        def over() -> bool:
            self.tend()
            return coordinator.poll() is not None or self.finished()

        self.wait(over, seconds, "the end of the federation")
        return None if self.finished() else coordinator.poll()

    def leave(self) -> None:
        """A finished federation: participants go by themselves, then the coordinator is told to go, and all is quiet."""
        assert self.coordinator is not None
        self.leaving = True
        self.wait(
            lambda: all(c.poll() is not None for c in self.clients.values()), _END_SECONDS, "participants to leave"
        )
        if self.coordinator.poll() is None:
            self.coordinator.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.coordinator.wait(_END_SECONDS)
        with contextlib.suppress(TooLongError):  # said by what is left
            self.wait(lambda: not self.processes(), 15, "nothing to be left")

    def copy_logs(self, target: Path) -> None:
        """Keep what was said and recorded, to find out what went wrong."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        places = [self.root / "logs", self.run / "logs", *(self.work_of(name) / "logs" for name in TASKS)]
        for number, place in enumerate(places):
            if place.is_dir():
                shutil.copytree(place, target / f"{number}-{place.parent.name}")
        for file in ("events.jsonl", "ledger.jsonl"):
            with contextlib.suppress(OSError):
                shutil.copy(self.run / file, target / file)
