"""`seedbed join` against a real SuperLink: a SuperNode that works, that is started again, and that leaves nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from seedbed.common.config_file import parse_config
from seedbed.common.flower import flower_environment
from seedbed.common.processes import Child, RotatingLog, free_port
from seedbed.server.coordinator.bundle import write_bundle
from seedbed.server.coordinator.control import SuperLinkControl
from seedbed.server.ledger import Entry, Ledger
from seedbed.server.rundir import RunDirectory

PATIENCE = 500.0
SERVER_APP = """
import json
from pathlib import Path
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from seedbed.common import basemodel
from seedbed.common.config import BaseModelConfig, LoraSettings, TrainingSettings
from seedbed.common.jobs import Job
from seedbed.server.messenger import GridWorkforce

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = json.loads(context.run_config["seedbed-command"])
    workforce = GridWorkforce(grid)
    (node, hello), *_ = workforce.hello(1, 400).items()
    training = TrainingSettings(steps=settings["steps"], batch_size=4, max_tokens=32, log_every=1, engine="torch")
    identity = basemodel.identify(basemodel.resolve(BaseModelConfig()), "embedded")
    job = Job(kind="expert", name="expert:sums", base=identity, tasks=("sums",), training=training, lora=LoraSettings(rank=2))
    answers = []
    workforce.perform([(node, job)], 300, lambda _node, _job, answer: answers.append(answer))
    found = {"hello": hello.model_dump(mode="json"), "node": node, "answer": answers[0].model_dump(mode="json")}
    Path(settings["out"]).write_text(json.dumps(found))
"""
JOIN = """
import sys
from pathlib import Path
from rich.console import Console
from seedbed.client.join.verb import JoinRequest, join
host, task, work, once = sys.argv[1:]
join(JoinRequest(host, [task], name="ada", work=Path(work), once=once == "once"), Console(force_terminal=False, width=500))
"""


def until(condition: Callable[[], object], what: str, by: subprocess.Popen[bytes] | None = None) -> None:
    """Wait for something that must come, as long as the process lives that it comes from."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        assert by is None or by.poll() is None, f"{what} will not come: the participant has ended"
        time.sleep(0.1)


class World:
    """A SuperLink, a registry and a gateway of one federation, and those who join it."""

    def __init__(self, root: Path) -> None:
        self.root, self.run = root, root / "run"
        self.superlink_port, self.port, self.registry_port = free_port(), free_port(), free_port()
        self.children: dict[str, Child] = {}
        self.joined: list[subprocess.Popen[bytes]] = []
        config = parse_config({"tasks": {"experts": ["sums"], "held_out": []}, "lora": {"rank": 2}})
        RunDirectory.open(self.run, config, {}, resume=False).close()
        task = [json.dumps({"prompt": f"{n} + 1", "completion": str(n + 1)}) for n in range(24)]
        (root / "sums.train.jsonl").write_text("\n".join(task) + "\n")
        for service in ("superlink", "registry", "gateway"):
            self.start(service)
        self.control = SuperLinkControl(f"127.0.0.1:{self.superlink_port}")
        until(self.control.ready, "the SuperLink")

    def finish(self) -> None:
        """Have the federation finished, by what its run directory says."""
        Ledger(self.run / "ledger.jsonl").append(Entry(event="finished"))

    def start(self, service: str) -> None:
        command = {
            "superlink": [
                *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.superlink_port)),
                *("--database", str(self.root / "state.db"), "--disable-runtime-dependency-installation"),
            ],
            "registry": [
                *(sys.executable, "-m", "seedbed.server.registry", "--run", str(self.run)),
                *("--listen", f"127.0.0.1:{self.registry_port}"),
            ],
            "gateway": [
                *(sys.executable, "-m", "seedbed.server.gateway", "--run", str(self.run)),
                *("--listen", f"127.0.0.1:{self.port}", "--registry-port", str(self.registry_port)),
                *("--upstream", f"http://127.0.0.1:{self.superlink_port}"),
            ],
        }[service]
        log = RotatingLog(self.root / f"{service}.log")
        self.children[service] = Child(
            service, command, log=log, environment=flower_environment(self.root / "superlink")
        )

    def join(self, *, once: bool = False) -> subprocess.Popen[bytes]:
        host, task, work = f"127.0.0.1:{self.port}", str(self.root / "sums.train.jsonl"), str(self.root / "ada")
        with self.output.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-u", "-c", JOIN, host, task, work, "once" if once else "for ever"],
                stdout=output,
                stderr=output,
            )
        self.joined.append(process)
        return process

    @property
    def output(self) -> Path:
        return self.root / "join.out"

    def said(self, text: str, times: int = 1) -> bool:
        return self.output.exists() and self.output.read_text().count(text) >= times

    def online(self) -> list[int]:
        return [node.node_id for node in self.control.nodes() if node.status == "online"]

    def ask(self, steps: int) -> Path:
        """Submit a run that wants one expert; where its answer will be."""
        app, out = write_bundle(self.root), self.root / f"answer-{steps}.json"
        project = app / "pyproject.toml"
        project.write_text(project.read_text().replace("seedbed.server.app:app", "asking:app"))
        (app / "asking.py").write_text(SERVER_APP)
        self.control.start(app, {"seedbed-command": json.dumps({"steps": steps, "out": str(out)})})
        return out

    def close(self) -> None:
        for process in self.joined:
            if process.poll() is None:
                process.kill()
            process.wait()
        for child in self.children.values():
            child.kill()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()


def below(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def supernode(process: subprocess.Popen[bytes]) -> psutil.Process:
    (found,) = [
        child
        for child in below(process)
        if "seedbed.client.join.supernode" in child.cmdline() and "keeper.py" not in " ".join(child.cmdline())
    ]
    return found


def gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
    assert not alive, [process.cmdline() for process in alive]


def test_a_participant_trains_what_it_is_asked_and_leaves_when_the_federation_has_finished(world: World) -> None:
    process = world.join(once=True)
    out = world.ask(steps=3)
    until(out.exists, "the answer", process)
    found = json.loads(out.read_text())
    assert found["hello"]["node"] == "ada"
    assert found["hello"]["tasks"] == ["sums"]
    assert found["answer"]["error"] == ""
    assert (world.run / "store/adapters" / found["answer"]["digest"] / "seedbed.json").is_file()
    until(lambda: world.said("expert:sums: done"), "the end of the job")
    assert process.poll() is None
    started = below(process)
    world.finish()
    assert process.wait(PATIENCE) == 0
    gone(started)


def test_a_supernode_that_is_killed_is_started_again_and_works(world: World) -> None:
    process = world.join()
    until(lambda: world.said("Connected to"), "the connection", process)
    killed = supernode(process)
    killed.kill()
    gone([killed])
    until(lambda: world.said("Connected to", times=2), "the second connection", process)
    assert world.said("ended with exit code 137")
    out = world.ask(steps=1)
    until(out.exists, "the answer", process)
    assert json.loads(out.read_text())["answer"]["error"] == ""


def test_a_coordinator_that_goes_and_comes_back_finds_the_participant_again(world: World) -> None:
    process = world.join()
    until(lambda: world.said("Connected to"), "the connection", process)
    world.children["superlink"].kill()
    world.children["gateway"].kill()
    until(lambda: world.said("does not answer"), "the loss being noticed")
    process.kill()  # even a participant that is started anew while nobody is there
    process.wait()
    again = world.join()
    until(lambda: world.said("joining as soon as it does again"), "the second start", again)
    world.start("gateway")
    world.start("superlink")
    until(world.control.ready, "the SuperLink")
    until(world.online, "the participant")
    assert again.poll() is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 0)])
def test_however_a_participant_ends_in_the_middle_of_a_job_nothing_is_left_running(
    world: World, number: signal.Signals, code: int
) -> None:
    process = world.join()
    world.ask(steps=100_000)
    until(lambda: world.said("expert:sums: step"), "a training that goes on", process)
    started = below(process)
    commands = " ".join(word for child in started for word in child.cmdline())
    assert "flwr-clientapp" in commands
    assert "seedbed.client.nursery" in commands or "seedbed.client.worker" in commands
    process.send_signal(number)
    assert process.wait(PATIENCE) == code
    gone(started)


def test_one_place_is_joined_once_at_a_time(world: World) -> None:
    process = world.join()
    until(lambda: world.said("Connected to"), "the connection", process)
    second = world.join()
    assert second.wait(PATIENCE) != 0
    assert world.said("has joined as 'ada'")
