"""Asking over Flower's Grid: every job gets exactly one answer, by the deadline at the latest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from seedbed.common.config import LoraSettings, TrainingSettings
from seedbed.common.errors import EnvironmentFailure
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.common.manifest import BaseIdentity, Record
from seedbed.common.wire import RECORD, pack, unpack
from seedbed.server.messenger import GridWorkforce
from seedbed.server.workforce import Failure

BASE = BaseIdentity(name="tiny", digest="0" * 64)


@pytest.fixture(autouse=True)
def run_of_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Message wants to know the run that it belongs to; Flower's runtime sets it in a real one."""
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)


class LoopGrid(Grid):
    """A Grid in one process: `answer` says what a node replies to a message; None is silence."""

    def __init__(self, nodes: int, answer: Callable[[Message], RecordDict | Error | None]) -> None:
        self.nodes = list(range(1, nodes + 1))
        self.answer = answer
        self.waiting: dict[str, Message] = {}

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("deprecated by Flower")

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = key = f"m{len(self.waiting)}"
            self.waiting[key] = message
            yield key

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for key in list(message_ids):
            content = self.answer(self.waiting[key])
            if content is not None:
                yield Message(content, reply_to=self.waiting[key])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("it can wait for ever")


def record(value: Record) -> RecordDict:
    return RecordDict({RECORD: ConfigRecord(pack(value))})


def job(task: str) -> Job:
    return Job(
        kind="expert", name=f"expert:{task}", base=BASE, tasks=(task,), lora=LoraSettings(), training=TrainingSettings()
    )


def answers(grid: Grid, jobs: list[tuple[int, Job]], deadline: float = 1.0) -> dict[str, JobResult | Failure]:
    found: dict[str, JobResult | Failure] = {}

    def keep(node: int, asked: Job, answer: JobResult | Failure) -> None:
        assert asked.name not in found, "one answer for each job"
        found[asked.name] = answer

    GridWorkforce(grid).perform(jobs, deadline, keep)
    return found


def do(message: Message) -> RecordDict:
    asked = unpack(Job, message.content.config_records[RECORD])
    return record(JobResult(node="n", name=asked.name, recipe=asked.recipe, digest="d"))


def test_each_job_gets_its_own_result_even_when_one_node_has_two() -> None:
    jobs = [(1, job("a")), (1, job("b")), (2, job("c"))]
    found = answers(LoopGrid(2, do), jobs)
    assert {name: answer.recipe for name, answer in found.items() if isinstance(answer, JobResult)} == {
        asked.name: asked.recipe for _, asked in jobs
    }


def test_jobs_of_two_names_and_one_recipe_are_two_jobs() -> None:
    twin = job("a").model_copy(update={"name": "unseeded:a"})
    assert twin.recipe == job("a").recipe
    assert answers(LoopGrid(1, do), [(1, job("a")), (1, twin)]).keys() == {"expert:a", "unseeded:a"}


def test_silence_is_a_failure_at_the_deadline_and_the_others_count() -> None:
    grid = LoopGrid(2, lambda message: None if message.metadata.dst_node_id == 1 else do(message))
    found = answers(grid, [(1, job("a")), (2, job("b"))], deadline=0.5)
    assert isinstance(found["expert:b"], JobResult)
    silent = found["expert:a"]
    assert isinstance(silent, Failure)
    assert "did not answer" in silent.reason


def test_an_error_reply_is_a_failure_with_flowers_reason() -> None:
    (answer,) = answers(LoopGrid(1, lambda _: Error(code=0, reason="it burns\nat length")), [(1, job("a"))]).values()
    assert answer == Failure(1, "raised an error: it burns")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (RecordDict(), "holds no JobResult"),
        (RecordDict({RECORD: ConfigRecord({"json": "{}"})}), "malformed at 'node'"),
        (RecordDict({RECORD: ConfigRecord({"json": "x" * 5_000_000})}), "characters long"),
        (RecordDict({RECORD: ConfigRecord({"json": 3})}), "holds no JobResult"),
    ],
)
def test_a_reply_that_is_no_result_is_a_failure(content: RecordDict, reason: str) -> None:
    (answer,) = answers(LoopGrid(1, lambda _: content), [(1, job("a"))]).values()
    assert isinstance(answer, Failure)
    assert reason in answer.reason


def test_hello_goes_on_with_whoever_is_there_at_the_deadline() -> None:
    hello = Hello(node="n", version="1", base=BASE, tasks=("a",), devices=("cpu",))
    found = GridWorkforce(LoopGrid(2, lambda _: record(hello))).hello(expected=3, deadline=0.5)
    assert found == {1: hello, 2: hello}


def test_cancelling_ends_the_wait_at_once() -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(EnvironmentFailure, match="cancelled"):
        GridWorkforce(LoopGrid(1, lambda _: None), cancelled).perform([(1, job("a"))], 600, lambda *_: None)
