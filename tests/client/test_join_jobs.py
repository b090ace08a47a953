"""A job that is asked twice is trained once; what cannot be understood is answered, not raised."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from seedbed.client import jobs
from seedbed.client.app import app
from seedbed.client.progress import JobNote
from seedbed.common import basemodel
from seedbed.common.config import BaseModelConfig, LoraSettings, TrainingSettings
from seedbed.common.errors import EnvironmentFailure
from seedbed.common.exclusive import exclusive
from seedbed.common.jobs import DataSource, Job, JobResult, Node
from seedbed.common.storage import DirectoryStore
from seedbed.common.wire import RECORD, pack, unpack

BASE = BaseModelConfig()
IDENTITY = basemodel.identify(basemodel.resolve(BASE), "embedded")


def sums(path: Path, count: int = 24) -> Path:
    lines = [json.dumps({"prompt": f"{n} + 1", "completion": str(n + 1)}) for n in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def node(tmp_path: Path) -> Node:
    data = DataSource(task="sums", location=str(sums(tmp_path / "sums.jsonl")))
    return Node(name="ada", base=BASE, store=tmp_path / "store", work=tmp_path / "work", data=(data,), threads=1)


def job(steps: int = 2, **changes: object) -> Job:
    training = TrainingSettings(steps=steps, batch_size=4, max_tokens=32, log_every=1, engine="torch")
    fields = {
        "kind": "expert",
        "name": "expert:sums",
        "base": IDENTITY,
        "tasks": ("sums",),
        "lora": LoraSettings(rank=2),
    }
    return Job.model_validate({**fields, "training": training, **changes})


def trainings(node: Node, of: Job) -> int:
    """How often a job has been begun, by the record of its events."""
    log = node.work / of.recipe[:16] / "progress.jsonl"
    return sum(json.loads(line)["event"] == "start" for line in log.read_text().splitlines())


def perform(job: Job, node: Node) -> JobResult:
    return jobs.perform(job, node)


def test_a_job_that_two_processes_are_asked_at_once_is_trained_once(node: Node) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        first, second = (pool.submit(perform, job(), node) for _ in range(2))
        answers = [first.result(), second.result()]
    assert [answer.error for answer in answers] == ["", ""]
    assert len({answer.digest for answer in answers}) == 1
    assert sorted(answer.cached for answer in answers) == [False, True]
    assert trainings(node, job()) == 1


def test_a_job_that_is_done_is_answered_from_the_store(node: Node) -> None:
    first = perform(job(), node)
    again = perform(job(), node)
    assert (again.digest, again.cached, first.cached) == (first.digest, True, False)
    note = JobNote.model_validate_json((node.work / job().recipe[:16] / "job.json").read_text())
    assert (note.name, note.state) == ("expert:sums", "done")


def test_a_result_that_the_store_could_not_take_is_kept_and_handed_in_when_asked_again(node: Node) -> None:
    node.store.write_text("a file where the store should be")
    failed = perform(job(), node)
    assert "store" in failed.error
    assert failed.digest == ""
    node.store.unlink()
    again = perform(job(), node)
    assert again.error == ""
    assert DirectoryStore(node.store).find(job().recipe) == again.digest
    assert trainings(node, job()) == 1, "it was trained a second time"


def test_a_lock_goes_with_its_holder_however_it_ends(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    child = os.fork()
    if child == 0:
        with exclusive(lock, "works"):
            (tmp_path / "held").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(EnvironmentFailure, match="another process works"), exclusive(lock, "works", patience=0):
        pass
    os.kill(child, 9)
    os.waitpid(child, 0)
    with exclusive(lock, "works", patience=0):
        pass


@pytest.fixture
def context(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    for name in ("_run_id", "_node_id", "_task_id"):  # what Flower sets in the process of a task
        monkeypatch.setattr(TaskIdentity, name, 1)
    file = tmp_path / "node.yaml"
    file.write_text(yaml.safe_dump(node.model_dump(mode="json")))
    return Context(1, 7, {"seedbed-node": str(file)}, RecordDict(), {}, 1)


def ask(kind: str, content: RecordDict, context: Context) -> JobResult:
    reply = app(Message(content, 7, kind), context)
    assert not reply.has_error()
    return unpack(JobResult, reply.content.config_records[RECORD])


def test_a_job_of_an_unknown_kind_is_answered_with_an_error(context: Context) -> None:
    answer = ask("train.expertt", RecordDict({RECORD: ConfigRecord(pack(job()))}), context)
    assert answer.node == "ada"
    assert "train.expertt" in answer.error
    assert "train.expert" in answer.hint


@pytest.mark.parametrize(
    "content", [{}, {RECORD: ConfigRecord({"json": "{"})}, {RECORD: ConfigRecord({"json": '{"kind": "expert"}'})}]
)
def test_a_message_that_is_no_job_is_answered_with_an_error(content: dict[str, ConfigRecord], context: Context) -> None:
    answer = ask("train.expert", RecordDict(content), context)
    assert "Job" in answer.error
    assert answer.digest == ""
