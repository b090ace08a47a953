"""What the README tells whoever launches, joins or contributes is run as it stands: on loopback, with TLS on.

Only names change: the coordinator's host is this machine, its ports are free ones, and it listens on loopback.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from seedbed.common.embedded import MODEL_DIR, examples
from seedbed.common.processes import free_port
from seedbed.common.storage import read_manifest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
HOST = "coordinator.example.org"
SEEDBED = [sys.executable, "-m", "seedbed.server.cli"]


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(title: str, language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", section(title), flags=re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


def commands(title: str) -> list[list[str]]:
    lines = [line for block in blocks(title) for line in block.splitlines()]
    return [shlex.split(line.partition(" #")[0])[1:] for line in lines if line.startswith("seedbed ")]


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    return condition()


class Stranger:
    """Somebody who types what the README says, in an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.registry_port = free_port(), free_port()
        self.started: list[subprocess.Popen[bytes]] = []
        home = folder / "home"
        self.environment = {**os.environ, "HOME": str(home), "XDG_DATA_HOME": str(home), "XDG_CACHE_HOME": str(home)}

    def _words(self, words: list[str]) -> list[str]:
        named = [f"localhost:{self.port}" if word == HOST and words[0] != "keys" else word for word in words]
        return ["127.0.0.1" if word == "0.0.0.0" else word for word in named]

    def run(self, words: list[str]) -> str:
        done = subprocess.run(
            [*SEEDBED, *self._words(words)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=200,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, words: list[str], *more: str) -> Path:
        log = self.folder / f"{words[0]}-{len(self.started)}.log"
        with log.open("wb") as stream:
            self.started.append(
                subprocess.Popen(
                    [*SEEDBED, *self._words(words), *more],
                    cwd=self.folder,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
            )
        return log

    def end(self) -> list[psutil.Process]:
        """End everything as Ctrl-C would, and give back what is left."""
        family = [child for one in self.started for child in _family(one.pid)]
        for one in reversed(self.started):
            one.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(family, timeout=30)
        for process in left:
            process.kill()
        for one in self.started:
            one.wait(30)
        return left


def _family(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    path = folder / "runs/pair/events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Stranger]:
    someone = Stranger(tmp_path)
    try:
        yield someone
    finally:
        someone.end()


def write_training_data(path: Path, task: str) -> None:
    records = (
        {"prompt": one.prompt, "choices": list(one.choices), "label": one.label}
        for one in examples(task, "train", 200, 0)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_a_federation_is_launched_joined_and_contributed_to_as_the_readme_says(stranger: Stranger) -> None:
    folder = stranger.folder
    launch, join, contribute = map(
        commands, ("Launch a coordinator", "Join as a GPU client", "Contribute without Flower")
    )
    (folder / "federation.yaml").write_text(blocks("Launch a coordinator", "yaml")[0], encoding="utf-8")
    for task in ("addition", "antonym"):
        write_training_data(folder / f"{task}.train.jsonl", task)

    for words in [one for one in launch if one[:2] in (["keys", "init"], ["keys", "add"])]:
        stranger.run(words)
    for name in ("alice", "bob", "carol"):
        shutil.copytree(folder / "keys/participants" / name, folder / name)

    (coordinator,) = [one for one in launch if one[0] == "coordinator"]
    log = stranger.start(coordinator, "--port", str(stranger.port), "--registry-port", str(stranger.registry_port))
    assert wait_until(lambda: "Participants join with" in log.read_text(), 120), log.read_text()
    assert f"seedbed join {coordinator_name(log)}:{stranger.port} --task FILE --keys FOLDER" in log.read_text()

    preflight, alice = join
    assert "base model" in stranger.run(preflight)
    bob = [word.replace("alice", "bob").replace("addition", "antonym") for word in alice]
    for words in (alice, bob):
        stranger.start(words)
    assert wait_until(lambda: bool(events(folder, "finished") or events(folder, "failed")), 300), log.read_text()
    assert events(folder, "finished"), log.read_text()
    assert "alice" in stranger.run(next(one for one in launch if one[0] == "status"))

    fetch_seed, hand_in, withdraw, fetch_best = contribute
    stranger.run(fetch_seed)
    (code,) = blocks("Contribute without Flower", "python")
    subprocess.run([sys.executable, "-c", f"BASE = {str(MODEL_DIR)!r}\n{code}"], cwd=folder, check=True, timeout=200)
    told = stranger.run(hand_in)
    (digest,) = re.findall(r"^digest (\w{64})$", told, flags=re.MULTILINE)
    assert wait_until(lambda: len(events(folder, "finished")) == 2, 200), log.read_text()
    assert digest in read_manifest(folder / "runs/pair/adapters/average").parents

    stranger.run([digest if word == "DIGEST" else word for word in withdraw])
    assert wait_until(lambda: len(events(folder, "finished")) == 3, 200), log.read_text()
    assert digest not in read_manifest(folder / "runs/pair/adapters/average").parents
    stranger.run(fetch_best)
    assert (folder / "best/adapter_model.safetensors").stat().st_size > 0

    for verb in ("list", "rotate", "revoke"):
        assert "bob" in stranger.run(next(one for one in launch if one[:2] == ["keys", verb]))
    assert not stranger.end(), "nothing is left running"


def coordinator_name(log: Path) -> str:
    """The name in the join line: the address that it listens on, since it was given no other."""
    (name,) = re.findall(r"seedbed join ([\w.]+):\d+ ", log.read_text())
    assert name in ("127.0.0.1", "localhost")
    return str(name)
