"""What a person reads while a participant is joined."""

from __future__ import annotations

import io
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from seedbed.client.join import sight
from seedbed.client.join.place import Memory, Place, own_name
from seedbed.client.join.sight import Sight, last_step
from seedbed.client.progress import note_job
from seedbed.common import basemodel
from seedbed.common.config import BaseModelConfig, LoraSettings, TrainingSettings
from seedbed.common.errors import ConfigError
from seedbed.common.jobs import Job, Node
from seedbed.common.registry import FederationInfo

IDENTITY = basemodel.identify(basemodel.resolve(BaseModelConfig()), "embedded")
JOB = Job(
    kind="expert", name="expert:sums", base=IDENTITY, tasks=("sums",), training=TrainingSettings(), lora=LoraSettings()
)
INFO = FederationInfo(
    name="f", version="1", state="running", base=BaseModelConfig(), identity=IDENTITY, lora=LoraSettings(), tasks=("a",)
)


class Screen:
    def __init__(self, work: Path) -> None:
        self.text = io.StringIO()
        self.sight = Sight(Console(file=self.text, width=200), work, "host:7400")

    def after(self, *lines: str) -> str:
        """What is said after the SuperNode has printed these lines."""
        before = len(self.text.getvalue())
        for line in lines:
            self.sight.on_line(line)
        self.sight.tick()
        return self.text.getvalue()[before:]


def test_connections_that_come_and_go_are_said_once(tmp_path: Path) -> None:
    screen = Screen(tmp_path)
    assert "Connected to host:7400 as node 7" in screen.after("\x1b[92mINFO \x1b[0m: SuperNode ID: 7")
    away = "WARNING : Connection attempt failed, retrying in 0.3 seconds"
    assert screen.after(away, away).count("does not answer") == 1
    assert screen.after(away) == ""
    assert "Connected to host:7400 again" in screen.after("INFO : Connection successful after 9.00 seconds")


def test_a_coordinator_that_answers_no_longer_is_said_though_the_supernode_notices_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen(tmp_path)
    screen.after("SuperNode ID: 7")
    screen.sight.asked(answered=False)
    assert "does not answer" not in screen.text.getvalue(), "it may be busy"
    monkeypatch.setattr(sight, "_SILENT_SECONDS", 0.0)
    for _ in range(3):
        screen.sight.asked(answered=False)
    screen.after("WARNING : Connection attempt failed, retrying in 0.3 seconds")
    assert screen.text.getvalue().count("does not answer") == 1
    for _ in range(2):
        screen.sight.asked(answered=True)
    assert screen.text.getvalue().count("host:7400 answers again") == 1


def test_why_a_supernode_ended_is_said_in_flowers_words(tmp_path: Path) -> None:
    screen = Screen(tmp_path)
    screen.after("[code: 2004] Public key is not registered.")
    screen.sight.lost(1, 4.0)
    assert "exit code 1: [code: 2004] Public key is not registered. It is" in screen.text.getvalue().replace("\n", " ")


def test_a_job_is_followed_by_its_files(tmp_path: Path) -> None:
    screen, work = Screen(tmp_path), tmp_path / JOB.recipe[:16]
    work.mkdir()
    note_job(work, JOB, "training")
    step = {"event": "step", "step": 5, "steps": 100, "loss": 1.25}
    (work / "progress.jsonl").write_text('{"event": "start"}\n' + json.dumps(step) + '\n{"event": "st')
    os.utime(work / "progress.jsonl", (time.time() + 1,) * 2)  # a file system's clock may be a tick behind
    said = screen.after()
    assert "expert:sums: training begins" in said
    assert "expert:sums: step 5 of 100, loss 1.25" in said
    assert screen.after() == "", "nothing is new"
    note_job(work, JOB, "failed", "out of memory")
    assert "expert:sums: failed: out of memory" in screen.after()


def test_what_an_earlier_start_left_is_not_news(tmp_path: Path) -> None:
    work = tmp_path / JOB.recipe[:16]
    work.mkdir()
    note_job(work, JOB, "done")
    assert Screen(tmp_path).after() == ""


def test_steps_of_an_earlier_try_are_not_those_of_this_one(tmp_path: Path) -> None:
    file = tmp_path / "progress.jsonl"
    file.write_text('{"event": "step", "step": 99}\n')
    os.utime(file, (1000, 1000))
    assert last_step(file, since=999) == {"event": "step", "step": 99}
    assert last_step(file, since=1001) is None


class TestPlace:
    def test_it_is_found_by_name_below_the_users_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
        assert Place.of("ada").root == tmp_path / "seedbed/ada"
        assert Place.of("ada", tmp_path / "x").root == tmp_path / "x"
        for wrong in ("", "../up", "a b"):
            with pytest.raises(ConfigError):
                Place.of(wrong)

    def test_a_participant_is_called_as_it_wants_or_as_its_machine(self) -> None:
        assert own_name("ada", None) == "ada"
        assert own_name(None, None) == subprocess.check_output(["hostname"], text=True).strip()

    def test_the_node_file_is_the_owners_alone_and_read_back_whole(self, tmp_path: Path) -> None:
        place = Place.of("ada", tmp_path / "ada")
        place.make()
        node = Node(name="ada", base=BaseModelConfig(), store=tmp_path, work=place.work, threads=2)
        place.write_node(node)
        place.write_node(node)
        assert place.node_file.stat().st_mode & 0o777 == 0o600
        assert place.root.stat().st_mode & 0o777 == 0o700
        import yaml

        assert Node.model_validate(yaml.safe_load(place.node_file.read_text())) == node
        assert [path.name for path in place.root.iterdir()] == ["node.yaml"]

    def test_a_coordinator_is_remembered_by_its_address(self, tmp_path: Path) -> None:
        place = Place.of("ada", tmp_path)
        assert place.remembered("host:1") is None
        place.remember(Memory(address="host:1", info=INFO))
        assert place.remembered("host:1") == INFO
        assert place.remembered("other:1") is None
        (tmp_path / "join.json").write_text("{")
        assert place.remembered("host:1") is None
