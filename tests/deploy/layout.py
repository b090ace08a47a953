"""The layout of a deployed federation: a coordinator and three participants, each on a host of its own, with keys.

The verbs are those that people type. Everything they say and write is kept below one directory, which all hosts see, but
nobody's directory is another's: what they exchange goes over the network between them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from netns import Host, Network
from typer.testing import CliRunner

from seedbed.common.embedded import write_task
from seedbed.common.events import Event, EventLog
from seedbed.server.cli import app

TASKS = {"alice": "addition", "bob": "antonym", "carol": "category"}
"""Who brings what."""
STEPS = 30
SETTINGS = (
    f"tasks.experts=[{', '.join(TASKS.values())}]",
    "tasks.held_out=[]",
    f"training.steps={STEPS}",
    "training.batch_size=64",
    "training.log_every=1",
    "seed.mode=none",
    "evaluation.limit=10",
    "evaluation.drift=false",
    "evaluation.expert_tasks=own",
    "combine.candidates=[average]",
    "stages.quorum=1.0",
    "stages.deadline=900",
    "stages.silence=30",
)
_CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).close()"


class Layout:
    """One federation on four hosts of a network.

    Args:
        root: an empty directory.
    """

    def __init__(self, network: Network, root: Path) -> None:
        self.root, self.run, self.keys = root, root / "coordinator" / "run", root / "keys"
        self.coordinator = network.host()
        self.hosts = {name: network.host() for name in TASKS}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        """What was last started on each host, by whose host it is."""
        self._environment = {
            **os.environ,
            "HOME": str(root),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "400",
            "HF_HUB_OFFLINE": "1",
        }
        (root / "logs").mkdir(parents=True)
        _seedbed("keys", "init", str(self.keys), "--host", self.coordinator.address)
        for name, task in TASKS.items():
            _seedbed("keys", "add", str(self.keys), name)
            write_task(task, root / "data" / name, 256, 8, 0)

    def start_coordinator(self) -> None:
        command = ["coordinator", "embedded", "--out", str(self.run), "--keys", str(self.keys), "--linger", "-1"]
        command += ["--listen", self.coordinator.address, "--quiet"]
        self._start("coordinator", self.coordinator, command + [w for one in SETTINGS for w in ("--set", one)])

    def start(self, name: str) -> None:
        """Have a participant join, on the directory that it had before."""
        command = ["join", self.coordinator.address, "--keys", str(self.keys / "participants" / name), "--once"]
        command += ["--task", str(self.root / "data" / name / f"{TASKS[name]}.train.jsonl"), "--wait", "300"]
        command += ["--work", str(self.root / "work" / name), "--gpus", "none", "--checkpoint-seconds", "0"]
        self._start(name, self.hosts[name], command)

    def _start(self, name: str, host: Host, arguments: list[str]) -> None:
        with (self.root / "logs" / name).open("ab") as log:
            self.running[name] = host.popen(
                [sys.executable, "-m", "seedbed.server.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )

    # -- looking ------------------------------------------------------------------------------------------------------

    def said(self, name: str) -> str:
        """What was printed on a host."""
        return re.sub(r"\x1b\[[0-9;]*m", "", (self.root / "logs" / name).read_text(errors="replace"))

    def events(self, kind: str) -> list[Event]:
        found, _ = EventLog(self.run / "events.jsonl").read()
        return [event for event in found if event.kind == kind]

    def accepted(self) -> list[str]:
        """Names of the jobs whose results are in the ledger, in order."""
        return [entry["name"] for entry in lines(self.run / "ledger.jsonl") if entry["event"] == "accepted"]

    def expert(self, name: str) -> list[dict[str, Any]]:
        """What the training of a participant's expert has told so far, on its own host."""
        return [
            event
            for note in self._notes(name)
            if note["name"].startswith("expert:")
            for event in lines(note["place"] / "progress.jsonl")
        ]

    def state(self, name: str) -> str:
        """How a participant's expert stands, on its own host; empty where it is not there yet."""
        return next((note["state"] for note in self._notes(name) if note["name"].startswith("expert:")), "")

    def _notes(self, name: str) -> list[dict[str, Any]]:
        files = sorted((self.root / "work" / name / "work").glob("*/job.json"))
        return [{**json.loads(file.read_text()), "place": file.parent} for file in files]

    def listeners(self) -> set[tuple[str, str]]:
        """Where something listens beyond loopback, on whose host: address and port."""
        found = set()
        for name, host in (("coordinator", self.coordinator), *self.hosts.items()):
            for line in host.run(["ss", "-H", "-l", "-t", "-u", "-n"]).stdout.splitlines():
                where = re.sub(r"^\[::ffff:([\d.]+)\]", r"\1", line.split()[4])  # as gRPC binds IPv4
                if not where.startswith(("127.", "[::1]")):
                    found.add((name, where))
        return found

    def superlink_port(self) -> int:
        """Of the SuperLink, as its command line says."""
        for process in self.coordinator.processes():
            words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            if "--database" in words and any("flower-superlink" in word for word in words[:3]):
                return int(words[words.index("--port") + 1])
        raise AssertionError(f"no SuperLink runs: {self.said('coordinator')}")

    def reaches(self, host: Host, address: str, port: int) -> bool:
        """Whether a connection from a host is taken; it never leaves the network of the hosts."""
        return host.run([sys.executable, "-c", _CONNECT, address, str(port)]).returncode == 0

    # -- waiting ------------------------------------------------------------------------------------------------------

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 900.0) -> None:
        """Until something is so, while the coordinator serves.

        Raises:
            AssertionError: if it does not become so, with what was said on the hosts.
        """
        end, coordinator = time.monotonic() + seconds, self.running["coordinator"]
        while not condition():
            if time.monotonic() > end or coordinator.poll() is not None:
                said = "\n".join(f"{name}: {self.said(name)[-1500:]}" for name in self.running)
                raise AssertionError(f"waited in vain for {what}\n{said}")
            time.sleep(0.05)

    def end(self) -> dict[str, int]:
        """A finished federation: participants leave by themselves, then the coordinator is told to; their exit codes."""
        codes = {name: self.running[name].wait(300) for name in TASKS}
        self.running["coordinator"].terminate()
        return {**codes, "coordinator": self.running["coordinator"].wait(120)}


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; none where there is no file yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _seedbed(*arguments: str) -> None:
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
