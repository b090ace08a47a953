"""Checkpoints: a training that was killed goes on where it was, and ends with the very bits of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from seedbed.client.checkpoint import FILE, Checkpoint, Keeper, Progress, read_checkpoint, write_checkpoint
from seedbed.client.jobs import perform
from seedbed.client.launch import TrainOutcome, run
from seedbed.client.spec import TrainSpec
from seedbed.client.training import train
from seedbed.common import basemodel
from seedbed.common.config import BaseModelConfig, LoraSettings, RoutingTuningSettings, TrainingSettings
from seedbed.common.embedded import write_task
from seedbed.common.errors import TrainingError
from seedbed.common.jobs import DataSource, Job, Node
from seedbed.common.storage import DirectoryStore

STEPS, KILLED_AT = 8, 4
Make = Callable[..., TrainSpec]


@pytest.fixture(scope="module")
def addition(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    directory = tmp_path_factory.mktemp("tasks")
    write_task("addition", directory, train=40, test=4, seed=0)
    return DataSource(task="addition", location=str(directory / "addition.train.jsonl"))


@pytest.fixture
def make(addition: DataSource, tmp_path: Path) -> Make:
    """A spec with dropout, so that random numbers matter, and a report every third step, so that sums are pending."""

    def of(place: str, **changes: Any) -> TrainSpec:
        training = {"engine": "torch", "steps": STEPS, "batch_size": 4, "log_every": 3, "weight_decay": 0.1}
        values: dict[str, Any] = {
            "base": BaseModelConfig(),
            "lora": LoraSettings(rank=2, dropout=0.1),
            "training": TrainingSettings.model_validate({**training, **changes.pop("training", {})}),
            "data": (addition,),
            "output": tmp_path / place / "adapter",
            "checkpoint": tmp_path / place / "checkpoint",
            "checkpoint_seconds": 0.0,
            "threads": 1,
        }
        return TrainSpec(**{**values, **changes})

    return of


def kept_step(directory: Path) -> int:
    """Step of the checkpoint in a directory, by what its file says; 0 where there is none."""
    from safetensors import safe_open

    if not (directory / FILE).is_file():
        return 0
    with safe_open(directory / FILE, framework="pt") as file:
        return int(json.loads(file.metadata()["seedbed"])["progress"]["step"])


def workers(mark: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(mark) in argument for argument in process.info["cmdline"] or [])
    ]


def run_spec(spec: TrainSpec, events: list[dict[str, Any]], kill_at: int | None = None) -> TrainOutcome:
    """Run a spec in processes of its own; with `kill_at`, all of them are killed once a report says that step."""
    spec.output.parent.mkdir(exist_ok=True)
    log = spec.output.with_name("log")

    victims: list[psutil.Process] = []

    def on_event(event: dict[str, Any]) -> None:
        events.append(event)
        if kill_at is not None and event["event"] == "start":
            victims.extend(workers(log))  # now: they need not be looked for later
        if kill_at is not None and event["event"] == "step" and event["step"] >= kill_at:
            for process in [*victims, *workers(log)]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)

    return run(spec, on_event=on_event, deadline=300, log=log)


def steps_of(events: list[dict[str, Any]]) -> list[int]:
    return [event["step"] for event in events if event["event"] == "step"]


def killed_and_asked_again(make: Make, **changes: Any) -> tuple[TrainOutcome, TrainOutcome, list[dict[str, Any]]]:
    """Outcomes of an undisturbed training and of one that was killed, and what the second try of the latter told."""
    undisturbed = run_spec(make("undisturbed", **changes), [])
    interrupted: list[dict[str, Any]] = []
    with pytest.raises(TrainingError, match="was killed"):
        run_spec(make("killed", **changes), interrupted, kill_at=KILLED_AT - 1)
    assert "resumed" not in {event["event"] for event in interrupted}
    again: list[dict[str, Any]] = []
    return undisturbed, run_spec(make("killed", **changes), again), again


# --- killed for real ---------------------------------------------------------------------------------------------------


def test_a_killed_worker_goes_on_from_its_checkpoint_to_the_same_digest(make: Make) -> None:
    undisturbed, resumed, events = killed_and_asked_again(make)
    assert [event["event"] for event in events][:2] == ["start", "resumed"]
    assert events[1]["step"] >= KILLED_AT - 2  # the report is older than its step's checkpoint
    assert events[1]["steps"] == STEPS
    assert min(steps_of(events)) > KILLED_AT - 2
    assert resumed.manifest.digest == undisturbed.manifest.digest
    assert resumed.metrics == undisturbed.metrics


@pytest.mark.parametrize(
    ("ranks", "stage", "more"),
    [(1, 0, {}), (2, 2, {}), (2, 3, {}), (1, 3, {"offload_optimizer": True, "offload_parameters": True})],
)
def test_deepspeed_goes_on_to_the_same_digest(make: Make, ranks: int, stage: int, more: dict[str, bool]) -> None:
    deepspeed = {"processes": ranks, "zero_stage": stage, **more}
    undisturbed, resumed, events = killed_and_asked_again(
        make, training={"engine": "deepspeed", "deepspeed": deepspeed}
    )
    assert [event["event"] for event in events][:2] == ["start", "resumed"]
    assert resumed.manifest.digest == undisturbed.manifest.digest


def test_a_client_that_is_killed_is_asked_again_and_the_store_has_the_same_digest(
    addition: DataSource, tmp_path: Path
) -> None:
    job = Job(
        kind="expert",
        name="expert:addition",
        base=basemodel.identify(basemodel.resolve(BaseModelConfig()), "embedded"),
        tasks=("addition",),
        lora=LoraSettings(rank=2, dropout=0.1),
        training=TrainingSettings(engine="torch", steps=60, batch_size=4, log_every=1),
    )

    def node(place: str) -> Node:
        places = {"store": tmp_path / place / "store", "work": tmp_path / place / "work"}
        return Node(name="n", base=BaseModelConfig(), data=(addition,), threads=1, checkpoint_seconds=0.0, **places)

    program = (
        "import sys; from seedbed.client.jobs import perform; from seedbed.common.jobs import Job, Node\n"
        "print(perform(Job.model_validate_json(sys.argv[1]), Node.model_validate_json(sys.argv[2])))"
    )
    work = tmp_path / "killed/work" / job.recipe[:16]
    arguments = [job.model_dump_json(), node("killed").model_dump_json()]
    client = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while kept_step(work / "checkpoint") < 5 and client.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait()
    done = kept_step(work / "checkpoint")
    assert 5 <= done < 60
    killed, undisturbed = perform(job, node("killed")), perform(job, node("undisturbed"))
    assert (killed.error, undisturbed.error) == ("", "")
    assert killed.digest == undisturbed.digest
    assert DirectoryStore(tmp_path / "killed/store").find(job.recipe) == killed.digest
    assert not (work / "checkpoint").exists()  # the store has the result
    lines = [json.loads(line) for line in (work / "progress.jsonl").read_text().splitlines()]
    (resumed,) = [line["step"] for line in lines if line["event"] == "resumed"]
    assert resumed >= done
    assert lines[0]["event"] == "start"
    seen = {line["step"] for line in lines if line["event"] == "step"}
    # What the worker said just before the kill may have been on its way to the client that was killed.
    assert {1, *range(resumed + 1, 61)} <= seen


# --- in one process ----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Stands for the end of the process: what it had in memory is gone."""


def stopped_at(spec: TrainSpec, step: int) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event.get("event") == "step" and event["step"] >= step:
            raise Stopped

    with pytest.raises(Stopped):
        train(spec, stop)


def trained(spec: TrainSpec) -> tuple[Any, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    return train(spec, events.append), events


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(one[name].A, other[name].A) and torch.equal(one[name].B, other[name].B) for name in one)


def notes(events: list[dict[str, Any]]) -> list[str]:
    return [event["message"] for event in events if event["event"] == "note"]


def test_routing_tuning_goes_on_with_the_general_text_of_the_same_step(make: Make, tmp_path: Path) -> None:
    texts = tmp_path / "general.jsonl"
    texts.write_text("".join(json.dumps({"text": f"the number {number}"}) + "\n" for number in range(20)))
    changes = {"tuning": RoutingTuningSettings(), "general": DataSource(task="general", location=str(texts))}
    whole, _ = trained(make("whole", **changes))
    stopped_at(make("stopped", **changes), 6)
    again, events = trained(make("stopped", **changes))
    assert events[1] == {"event": "resumed", "step": 5, "steps": STEPS}
    assert equal(again.value, whole.value)
    assert again.metrics == whole.metrics


def test_a_training_that_was_stopped_after_its_last_step_has_nothing_left_to_do(make: Make) -> None:
    first, _ = trained(make("here"))
    again, events = trained(make("here"))
    assert [event["event"] for event in events] == ["start", "resumed"]
    assert equal(again.value, first.value)
    assert again.metrics == first.metrics


@pytest.mark.parametrize(
    "change", [{"data_seed": 1}, {"training": {"learning_rate": 1e-4}}, {"recipe": "another"}, {"init_seed": 2}]
)
def test_a_checkpoint_of_another_job_is_never_used(make: Make, change: dict[str, Any]) -> None:
    stopped_at(make("here"), 6)
    again, events = trained(make("here", **change))
    assert ["belongs to another job" in note for note in notes(events)] == [True]
    assert steps_of(events) == [3, 6, 8]
    assert equal(again.value, trained(make("elsewhere", **change))[0].value)


def test_a_checkpoint_of_other_data_under_the_same_name_is_never_used(
    make: Make, addition: DataSource, tmp_path: Path
) -> None:
    own = tmp_path / "own.jsonl"
    lines = Path(addition.location).read_text().splitlines(keepends=True)
    own.write_text("".join(lines))
    source = addition.model_copy(update={"location": str(own)})
    stopped_at(make("here", data=(source,)), 6)
    own.write_text("".join(lines[:20]))
    _, events = trained(make("here", data=(source,)))
    assert ["belongs to another job" in note for note in notes(events)] == [True]


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "text"])
def test_a_damaged_checkpoint_is_passed_over_with_a_note(make: Make, damage: str) -> None:
    stopped_at(make("here"), 6)
    file = make("here").checkpoint / FILE
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    contents = {"cut": data[: len(data) // 2], "flipped": data, "emptied": b"", "text": b"not a checkpoint at all"}
    file.write_bytes(contents[damage])
    again, events = trained(make("here"))
    assert ["is damaged" in note for note in notes(events)] == [True]
    assert steps_of(events) == [3, 6, 8]
    assert equal(again.value, trained(make("elsewhere"))[0].value)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(make: Make, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/checkpoint").write_text("a file where the directory should be")
    again, events = trained(make("here"))
    assert len(notes(events)) == STEPS
    assert notes(events)[0].startswith("no checkpoint after step 1: cannot write")
    assert equal(again.value, trained(make("elsewhere"))[0].value)


def test_without_a_directory_nothing_is_kept(make: Make, tmp_path: Path) -> None:
    trained(make("here", checkpoint=None))
    assert not (tmp_path / "here").exists()


# --- the file ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was_and_replaces_the_one_before(tmp_path: Path) -> None:
    progress = Progress().after({"loss": 0.1, "task": 0.1}, 3, 5)
    tensors = {"a": torch.tensor([1.5, -0.0]), "step": torch.tensor(2.0), "random": torch.get_rng_state()}
    write_checkpoint(tmp_path, "f", Checkpoint(Progress(), {"old": torch.ones(1)}))
    write_checkpoint(tmp_path, "f", Checkpoint(progress, tensors))
    found = read_checkpoint(tmp_path, "f", pytest.fail)
    assert found is not None
    assert found.progress == progress
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert os.listdir(tmp_path) == [FILE]


def test_where_there_is_no_checkpoint_nothing_is_said(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path, "f", pytest.fail) is None


def test_means_are_weighted_by_labels_and_start_anew_with_every_report() -> None:
    progress = Progress().after({"loss": 1.0, "task": 1.0}, 1, 10).after({"loss": 4.0, "task": 4.0}, 2, 20)
    told = progress.reported()
    assert told.means == {"loss": 3.0}
    assert (told.step, told.first_loss, told.tokens, told.labels, told.pending) == (2, 1.0, 30, 3, ())


def test_checkpoints_become_rarer_where_they_are_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    keeper = Keeper(tmp_path, "f", 10.0, pytest.fail)
    assert not keeper.due()
    now[0] += 10
    assert keeper.due()
    keeper.keep(now[0] - 3.0, Progress(), {"a": torch.ones(1)})  # it took 3 seconds: a fiftieth of 150
    now[0] += 149
    assert not keeper.due()
    now[0] += 1
    assert keeper.due()


def test_what_a_killed_writer_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1-abc").write_bytes(b"half of a checkpoint")
    Keeper(tmp_path, "f", 0.0, pytest.fail)
    assert os.listdir(tmp_path) == []
