"""A real federation over loopback for tests: the coordinator as a process of its own, participants as SuperNodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from seedbed.common.config import BaseModelConfig
from seedbed.common.embedded import write_task
from seedbed.common.events import Event, EventLog
from seedbed.common.flower import flower_environment
from seedbed.common.jobs import DataSource, Node
from seedbed.common.processes import Child, RotatingLog, free_port
from seedbed.common.registry import RegistryAccess

TASKS = ("addition", "antonym")
SMALL = (
    f"tasks.experts=[{', '.join(TASKS)}]",
    "tasks.held_out=[]",
    "training.steps=3",
    "seed.steps=2",
    "evaluation.limit=10",
    "evaluation.drift=false",
    "evaluation.expert_tasks=own",
    "combine.candidates=[experts, average]",
    "stages.deadline=300",
    "stages.silence=20",
)
MARK = "SEEDBED_TEST_FEDERATION"
"""Environment variable that every process of a federation inherits."""
_RUN = """
import json, sys
from pathlib import Path
from rich.console import Console
from seedbed.common.errors import SeedbedError
from seedbed.server.coordinator.request import CoordinatorRequest
from seedbed.server.coordinator.verb import Interrupted, run_coordinator
from seedbed.server.observer import Lines
values = json.loads(sys.argv[1])
values |= {key: Path(values[key]) for key in ("out", "keys") if values.get(key)}
values["overrides"] = tuple(values["overrides"])
try:
    results = run_coordinator(CoordinatorRequest(**values), Console(width=300), Lines(Console(stderr=True, width=300)))
except SeedbedError as error:
    print(f"error: {error.message}", error.hint, sep="\\n", file=sys.stderr)
    sys.exit(error.exit_code)
except Interrupted as end:
    sys.exit(end.exit_code)
print(results.answer)
"""


_PROXY = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
"""One that is not there: a coordinator asks its own processes without."""


class Coordinator:
    """`run_coordinator` in a process of its own."""

    def __init__(self, out: Path, *, settings: Sequence[str] = (), **request: Any) -> None:
        values = {
            "source": "embedded",
            "overrides": [*SMALL, *settings],
            "out": str(out),
            "resume": True,
            "port": free_port(),
            "registry_port": free_port(),
            **{key: str(value) if isinstance(value, Path) else value for key, value in request.items()},
        }
        self.out, self.port, self.registry_port = out, int(values["port"]), int(values["registry_port"])
        out.parent.mkdir(parents=True, exist_ok=True)
        with (out.parent / "coordinator.out").open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _RUN, json.dumps(values)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, **_PROXY, MARK: str(out), "OMP_NUM_THREADS": "1"},
            )

    @property
    def said(self) -> str:
        return (self.out.parent / "coordinator.out").read_text(encoding="utf-8")

    def wait(self, seconds: float = 500.0) -> int:
        """Its exit code."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()


def processes_of(out: Path, *words: str) -> list[psutil.Process]:
    """Every living process of a coordinator whose command line holds all the words."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.environ().get(MARK) != str(out):
                continue
            if all(any(word in part for part in process.cmdline()) for word in words):
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(condition: Callable[[], bool], seconds: float = 400.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


def events(out: Path, kind: str) -> list[Event]:
    found, _ = EventLog(out / "events.jsonl").read()
    return [event for event in found if event.kind == kind]


def accepted(out: Path, prefix: str = "") -> list[dict[str, Any]]:
    path = out / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [one for one in entries if one["event"] == "accepted" and one["name"].startswith(prefix)]


def digests(out: Path) -> dict[str, str]:
    results = json.loads((out / "results.json").read_text())
    return {name: candidate["digest"] for name, candidate in results["candidates"].items()}


def supernode(home: Path, task: str, gateway: int, registry: int, *, keys: Path | None = None, name: str = "") -> Child:
    """One participant."""
    name = name or task
    place = home / name
    place.mkdir(parents=True, exist_ok=True)
    if not (place / f"{task}.train.jsonl").exists():
        write_task(task, place, 100, 10, seed=0)
    access = RegistryAccess(address=f"127.0.0.1:{registry}", name=name)
    if keys is not None:
        files = {"ca": "ca.crt", "certificate": "client.crt", "key": "client.key"}
        access = access.model_copy(update={field: keys / file for field, file in files.items()})
    node = Node(
        name=name,
        base=BaseModelConfig(),
        store=place / "store",
        work=place / "work",
        data=(DataSource(task=task, location=str(place / f"{task}.train.jsonl")),),
        threads=1,
        registry=access,
    )
    (place / "node.yaml").write_text(yaml.safe_dump(node.model_dump(mode="json")))
    command = ["flower-supernode", "--superlink", f"127.0.0.1:{gateway}", "--host", "127.0.0.1"]
    command += ["--port", str(free_port()), "--node-config", f'seedbed-node="{place / "node.yaml"}"']
    if keys is None:
        command += ["--insecure"]
    else:
        command += ["--root-certificates", str(keys / "ca.crt"), "--auth-supernode-private-key", str(keys / "node.key")]
    environment = {**flower_environment(place / "flower"), "OMP_NUM_THREADS": "1"}
    return Child(name, command, log=RotatingLog(home / "nodes.log"), environment=environment)


@contextmanager
def participants(home: Path, coordinator: Coordinator, tasks: Sequence[str] = TASKS) -> Iterator[list[Child]]:
    """SuperNodes, one for each task, which are gone when the body ends."""
    nodes = [supernode(home, task, coordinator.port, coordinator.registry_port) for task in tasks]
    try:
        yield nodes
    finally:
        for node in nodes:
            node.ask_to_end()
        for node in nodes:
            node.stop()
