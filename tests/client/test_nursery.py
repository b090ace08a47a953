"""Forked training processes: the same results and the same ends as those that are started anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from seedbed.client import launch
from seedbed.client.launch import run
from seedbed.client.nursery import Nursery
from seedbed.client.spec import TrainSpec
from seedbed.common.config import BaseModelConfig, LoraSettings, TrainingSettings
from seedbed.common.embedded import write_task
from seedbed.common.errors import DataError, TrainingError
from seedbed.common.jobs import DataSource
from seedbed.common.storage import read_adapter

ENDLESS = 100_000
Make = Callable[..., TrainSpec]


@pytest.fixture(scope="module")
def addition(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    directory = tmp_path_factory.mktemp("tasks")
    write_task("addition", directory, train=40, test=4, seed=0)
    return DataSource(task="addition", location=str(directory / "addition.train.jsonl"))


@pytest.fixture
def spec(addition: DataSource, tmp_path: Path) -> Make:
    def make(name: str = "adapter", steps: int = 2, **changes: Any) -> TrainSpec:
        training = {"engine": "torch", "steps": steps, "batch_size": 2, "log_every": 1}
        values: dict[str, Any] = {
            "base": BaseModelConfig(),
            "lora": LoraSettings(rank=2),
            "training": TrainingSettings.model_validate(training),
            "data": (addition,),
            "output": tmp_path / name,
            "threads": 1,
        }
        return TrainSpec(**{**values, **changes})

    return make


@pytest.fixture(autouse=True)
def no_nursery_is_left() -> Iterator[None]:
    yield
    while launch._kept:
        launch._kept.pop().close()
    assert not [child for child in psutil.Process().children(recursive=True) if "nursery" in " ".join(child.cmdline())]


def forked() -> list[psutil.Process]:
    """Workers that are at work now."""
    (nursery,) = [child for child in psutil.Process().children() if "seedbed.client.nursery" in child.cmdline()]
    return [child for child in nursery.children() if child.status() != psutil.STATUS_ZOMBIE]


def test_a_forked_job_gives_the_same_bits_as_one_that_is_started_anew(spec: Make, tmp_path: Path) -> None:
    cold = run(spec("cold"), log=tmp_path / "cold.log")
    events: list[dict[str, Any]] = []
    warm = run(spec("warm"), on_event=events.append, log=tmp_path / "warm.log", warm=True)
    assert [event["event"] for event in events] == ["start", "step", "step", "done"]
    assert warm.manifest == cold.manifest
    first, second = (read_adapter(outcome.directory)[0] for outcome in (cold, warm))
    assert all(torch.equal(first[name].B, second[name].B) for name in first)


def test_one_nursery_serves_all_jobs_of_a_client(spec: Make, tmp_path: Path) -> None:
    run(spec("one"), log=tmp_path / "one.log", warm=True)
    kept = list(launch._kept)
    run(spec("two"), log=tmp_path / "two.log", warm=True)
    assert launch._kept == kept
    assert forked() == []


def test_a_process_number_that_a_finished_job_had_before_does_not_end_the_next_job(spec: Make, tmp_path: Path) -> None:
    run(spec("one"), log=tmp_path / "one.log", warm=True)
    codes = launch._kept[-1]._codes
    (last,) = codes
    codes.update(dict.fromkeys(range(last, last + 20_000), 0))  # as after many jobs, once numbers begin anew
    assert run(spec("two"), log=tmp_path / "two.log", warm=True).directory.is_dir()


def test_an_error_of_a_forked_worker_arrives_as_what_it_is(spec: Make, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    bad = DataSource(task="bad", location=str(tmp_path / "bad.jsonl"))
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1"):
        run(spec(data=(bad,)), log=tmp_path / "log", warm=True)


def test_a_forked_worker_that_is_killed_is_told_as_such_and_the_next_job_works(spec: Make, tmp_path: Path) -> None:
    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            forked()[0].kill()

    with pytest.raises(TrainingError, match="killed, most likely because memory ran out"):
        run(spec("one", ENDLESS), on_event=kill, log=tmp_path / "one.log", warm=True)
    assert run(spec("two"), log=tmp_path / "two.log", warm=True).directory.is_dir()


def test_a_forked_job_past_its_deadline_is_ended(spec: Make, tmp_path: Path) -> None:
    run(spec("first"), log=tmp_path / "first.log", warm=True)  # the nursery is up
    with pytest.raises(TrainingError, match="did not finish before its deadline"):
        run(spec("adapter", ENDLESS), deadline=2, log=tmp_path / "log", warm=True)
    assert forked() == []


def test_a_nursery_that_was_killed_is_replaced(spec: Make, tmp_path: Path) -> None:
    run(spec("one"), log=tmp_path / "one.log", warm=True)
    launch._kept[-1]._process.kill()
    launch._kept[-1]._process.wait()
    until = time.monotonic() + 60
    while launch._kept[-1].alive and time.monotonic() < until:
        time.sleep(0.01)
    assert run(spec("two"), log=tmp_path / "two.log", warm=True).directory.is_dir()


def test_where_nothing_can_be_imported_the_job_says_why(
    spec: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformers.py").write_text("raise ZeroDivisionError('a defect')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(TrainingError, match="ZeroDivisionError: a defect"):
        run(spec(), log=tmp_path / "log", warm=True)


def test_what_a_forked_worker_prints_is_in_its_own_log(tmp_path: Path) -> None:
    nursery = Nursery()
    with (tmp_path / "log").open("wb") as log:
        worker = nursery.start(tmp_path / "no-such-spec.json", os.environ, log)
        assert worker.stdout is not None
        told = json.loads(worker.stdout.readline())
        assert worker.wait(60) != 0
    nursery.close()
    assert told["event"] == "error"
    assert "no-such-spec.json" in told["message"]
    assert "Traceback" in (tmp_path / "log").read_text()


CLIENT = """
import sys
from pathlib import Path
from seedbed.client.launch import run
from seedbed.client.nursery import Nursery
from seedbed.client.spec import TrainSpec
spec = TrainSpec.model_validate_json(Path(sys.argv[1]).read_text())
run(spec, on_event=lambda event: print(event["event"], flush=True), log=Path(sys.argv[2]), warm=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_client_that_is_killed(spec: Make, tmp_path: Path, number: int) -> None:
    file = tmp_path / "spec.json"
    file.write_text(spec("adapter", ENDLESS).model_dump_json())
    command = [sys.executable, "-c", CLIENT, str(file), str(tmp_path / "log")]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    while client.stdout.readline().strip() != "step":
        assert client.poll() is None
    family = psutil.Process(client.pid).children(recursive=True)
    assert len(family) == 2, "a nursery and a worker"
    os.kill(client.pid, number)
    client.wait()
    _, left = psutil.wait_procs(family, timeout=60)
    assert left == []


def test_a_nursery_that_does_not_answer_is_not_waited_for(
    spec: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seedbed.client import nursery

    monkeypatch.setattr(nursery, "_START_SECONDS", 0.5)
    kept = Nursery()
    launch._kept.append(kept)
    kept._process.send_signal(signal.SIGSTOP)
    outcome = run(spec(), log=tmp_path / "log", warm=True)
    assert outcome.directory.is_dir(), "the worker was started anew"
    kept._process.send_signal(signal.SIGCONT)
