"""Training in processes of its own: a result or one readable error, and nothing that keeps running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from seedbed.client.launch import TrainOutcome, run
from seedbed.client.spec import TrainSpec
from seedbed.client.worker import as_seedbed_error
from seedbed.common import basemodel
from seedbed.common.config import BaseModelConfig, LoraSettings, TrainingSettings
from seedbed.common.embedded import write_task
from seedbed.common.errors import DataError, StorageError, TrainingError
from seedbed.common.jobs import DataSource
from seedbed.common.storage import read_adapter

ENDLESS = 100_000
"""Optimizer steps of a job that only ends when it is made to."""


@pytest.fixture(scope="module")
def addition(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    directory = tmp_path_factory.mktemp("tasks")
    write_task("addition", directory, train=40, test=4, seed=0)
    return DataSource(task="addition", location=str(directory / "addition.train.jsonl"))


@pytest.fixture
def spec(addition: DataSource, tmp_path: Path) -> Callable[..., TrainSpec]:
    def make(**changes: Any) -> TrainSpec:
        training = {"engine": "torch", "steps": 2, "batch_size": 2, "log_every": 1, **changes.pop("training", {})}
        values: dict[str, Any] = {
            "base": BaseModelConfig(),
            "lora": LoraSettings(rank=2),
            "training": TrainingSettings.model_validate(training),
            "data": (addition,),
            "output": tmp_path / "adapter",
            "threads": 1,
        }
        return TrainSpec(**{**values, **changes})

    return make


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "training.log"


def workers(mark: Path) -> list[psutil.Process]:
    """Processes that carry out the spec beside a log, with the launchers above them."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if any(str(mark) in argument for argument in process.info["cmdline"] or [])
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def gone(mark: Path, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while workers(mark) and time.monotonic() < until:
        time.sleep(0.05)
    return not workers(mark)


def test_a_job_leaves_an_adapter_with_its_manifest_and_told_how_it_went(
    spec: Callable[..., TrainSpec], log: Path
) -> None:
    events: list[dict[str, Any]] = []
    given = spec(kind="seed", parents=("p",), task="addition", recipe="r", settings={"a": 1})
    outcome = run(given, on_event=events.append, log=log)
    assert isinstance(outcome, TrainOutcome)
    assert [event["event"] for event in events] == ["start", "step", "step", "done"]
    adapter, manifest = read_adapter(given.output)
    assert adapter.parameters > 0
    assert manifest == outcome.manifest
    assert manifest.digest == events[-1]["digest"]
    assert (manifest.kind, manifest.parents, manifest.task, manifest.recipe) == ("seed", ("p",), "addition", "r")
    assert manifest.base == basemodel.identify(basemodel.resolve(given.base), "embedded")
    assert manifest.settings == {"a": 1}
    assert manifest.metrics == outcome.metrics == events[-1]["metrics"]
    assert outcome.seconds > 0
    assert gone(log, 0)


def test_errors_of_the_worker_arrive_as_what_they_are(
    spec: Callable[..., TrainSpec], log: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    bad = DataSource(task="bad", location=str(tmp_path / "bad.jsonl"))
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1: 'text' must be a string") as refusal:
        run(spec(data=(bad,)), log=log)
    assert refusal.value.hint
    assert gone(log, 0)


def test_a_worker_that_is_killed_is_told_as_such_and_the_client_lives_on(
    spec: Callable[..., TrainSpec], log: Path
) -> None:
    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            for process in workers(log):
                process.kill()

    with pytest.raises(TrainingError, match="was killed, most likely because memory ran out"):
        run(spec(training={"steps": ENDLESS}), on_event=kill, log=log)
    assert gone(log, 0)


def test_a_worker_that_dies_without_a_word_is_told_with_the_last_of_its_log(
    spec: Callable[..., TrainSpec], log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A package that cannot be imported stands for a broken installation.
    (tmp_path / "transformers.py").write_text(
        "import os, sys\nprint('RuntimeError: no driver', file=sys.stderr)\nos._exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(TrainingError, match="ended with exit code 3: RuntimeError: no driver") as failure:
        run(spec(), log=log)
    assert str(log) in failure.value.hint


def test_a_defect_is_told_in_one_line_and_its_traceback_is_in_the_log(
    spec: Callable[..., TrainSpec], log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "transformers.py").write_text("raise ZeroDivisionError('a defect')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(TrainingError, match="the training process failed: ZeroDivisionError: a defect"):
        run(spec(), log=log)
    assert "Traceback" in log.read_text()


def test_what_libraries_print_is_in_the_log_and_not_among_the_events(
    spec: Callable[..., TrainSpec], log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "transformers.py").write_text("print('{\"event\": \"done\"}')\nraise ImportError('end')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    events: list[dict[str, Any]] = []
    with pytest.raises(TrainingError, match="ImportError: end"):
        run(spec(), on_event=events.append, log=log)
    assert [event["event"] for event in events] == ["error"]
    assert '{"event": "done"}' in log.read_text()


def test_a_job_past_its_deadline_is_ended(spec: Callable[..., TrainSpec], log: Path) -> None:
    with pytest.raises(TrainingError, match="did not finish before its deadline"):
        run(spec(training={"steps": ENDLESS}), deadline=0.5, log=log)
    assert gone(log, 0)


def test_a_training_that_hangs_after_some_steps_is_ended_long_before_its_deadline(
    spec: Callable[..., TrainSpec], log: Path
) -> None:
    def stop_it(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            for process in workers(log):
                if process.pid != os.getpid():
                    process.suspend()

    with pytest.raises(TrainingError, match=r"hangs: no step for \d+ s, where one took at most \d+ s before"):
        run(spec(training={"steps": ENDLESS}), on_event=stop_it, deadline=300, stall=2, log=log)
    assert gone(log, 0)


def test_an_interrupted_client_takes_its_worker_along(spec: Callable[..., TrainSpec], log: Path) -> None:
    def interrupt(event: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(spec(training={"steps": ENDLESS}), on_event=interrupt, log=log)
    assert gone(log, 0)


def test_no_worker_outlives_a_client_that_is_killed(spec: Callable[..., TrainSpec], log: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from seedbed.client.launch import run, TrainSpec\n"
        "spec, log = TrainSpec.model_validate_json(sys.argv[1]), Path(sys.argv[2])\n"
        "run(spec, on_event=lambda event: print(event['event'], flush=True), log=log)"
    )
    # It says nothing for long, so that it cannot learn of our death from a broken pipe.
    given = spec(training={"steps": ENDLESS, "log_every": ENDLESS}).model_dump_json()
    client = subprocess.Popen([sys.executable, "-c", program, given, str(log)], stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "start\n"
        assert [process.pid for process in workers(log) if process.pid != client.pid]
    finally:
        client.send_signal(signal.SIGKILL)
        client.communicate()
    try:
        assert gone(log)
    finally:
        for process in workers(log):
            process.kill()


def test_an_output_that_is_there_is_never_overwritten(spec: Callable[..., TrainSpec], log: Path) -> None:
    given = spec()
    given.output.mkdir()
    with pytest.raises(StorageError, match="is already there"):
        run(given, log=log)
    assert list(given.output.iterdir()) == []


def test_a_worker_can_be_run_by_hand(spec: Callable[..., TrainSpec], tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(spec(training={"steps": 1}).model_dump_json())
    command = [sys.executable, "-m", "seedbed.client.worker", str(tmp_path / "spec.json")]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True)
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["start", "step", "done"]
    again = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert again.returncode == StorageError.exit_code
    assert json.loads(again.stdout.splitlines()[-1])["type"] == "StorageError"


def test_running_out_of_memory_is_recognized_by_its_many_names() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 50)
    for error in (real.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        told = as_seedbed_error(error)
        assert isinstance(told, TrainingError)
        assert told.message == "the training process ran out of memory"
        assert "accumulation" in told.hint


def test_a_worker_needs_neither_deepspeed_nor_datasets_nor_flower() -> None:
    program = (
        "import sys, seedbed.client.worker, seedbed.client.training, seedbed.client.launch\n"
        "print([m for m in ('deepspeed', 'datasets', 'lm_eval', 'flwr', 'peft', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert os.environ.get("RANK") is None
