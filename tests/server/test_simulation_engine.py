"""Participants that misbehave under Flower's real simulation engine: the federation goes on and nothing is left running."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import cloudpickle
import psutil
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.config_file import parse_config
from seedbed.common.errors import EnvironmentFailure, QuorumError
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.common.manifest import BaseIdentity, Record
from seedbed.common.storage import DirectoryStore, read_adapter, write_adapter
from seedbed.common.wire import RECORD, pack, unpack
from seedbed.server.combination import Combination
from seedbed.server.engine import Engine
from seedbed.server.federation import Federation
from seedbed.server.observer import Silent
from seedbed.server.rundir import RunDirectory
from seedbed.server.simulation import simulate
from seedbed.server.workforce import Workforce

BASE = BaseIdentity(name="tiny", digest="1" * 64)
SHAPES = {"layer": (3, 2)}

# Ray's workers cannot import a test file: its functions travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def participants(store: Path, behaviour: Mapping[str, str]) -> ClientApp:
    """Clients, one for each name in `behaviour`, that hand in dW = 1 or do what their behaviour says."""
    names = list(behaviour)
    app = ClientApp()

    def reply(message: Message, value: Record) -> Message:
        return Message(RecordDict({RECORD: ConfigRecord(pack(value))}), reply_to=message)

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        from importlib.metadata import version

        name = names[int(context.node_config["partition-id"])]
        told = Hello(node=name, version=version("seedbed"), base=BASE, tasks=(name,), devices=("cpu",))
        return reply(message, told)

    @app.train("expert")
    def expert(message: Message, context: Context) -> Message:
        job = unpack(Job, message.content.config_records[RECORD])
        does = behaviour[job.tasks[0]]
        if does == "raise":
            raise RuntimeError("out of coffee")
        if does == "hang":
            time.sleep(600)
        if does == "lie":
            return reply(message, JobResult(node="n", name=job.name, recipe=job.recipe, digest="a" * 64))
        place = store / "made" / job.tasks[0]
        value = Adapter({"layer": LoraFactors(torch.ones(1, 2), torch.ones(3, 1), 1.0)})
        write_adapter(place, value, kind="expert", base=BASE, recipe=job.recipe)
        digest = DirectoryStore(store).put(place)
        return reply(message, JobResult(node=job.tasks[0], name=job.name, recipe=job.recipe, digest=digest))

    return app


def federate(tmp_path: Path, behaviour: Mapping[str, str], quorum: float) -> tuple[RunDirectory, list[Combination]]:
    config = parse_config(
        {
            "tasks": {"experts": list(behaviour)},
            "lora": {"rank": 1, "alpha": 1},
            "seed": {"mode": "none"},
            "combine": {"candidates": ["experts", "average"]},
            "stages": {"deadline": 150, "quorum": quorum},
        }
    )
    run = RunDirectory.open(tmp_path / "run", config, {}, resume=False)
    found: list[Combination] = []

    def work(workforce: Workforce) -> None:
        found.extend(Federation(run, workforce, BASE, SHAPES, Silent()).conduct())

    simulate(run, participants(run.root / "store", behaviour), nodes=len(behaviour), workers=3, work=work)
    return run, found


@pytest.fixture
def left_running() -> Callable[[], list[psutil.Process]]:
    """Tells which processes a test has started and not ended; what other tests share with each other is not meant."""
    before = set(psutil.Process().children(recursive=True))

    def left() -> list[psutil.Process]:
        now = psutil.Process().children(recursive=True)
        return [process for process in now if process not in before and process.status() != psutil.STATUS_ZOMBIE]

    return left


def test_one_raises_one_hangs_one_lies_and_the_others_are_averaged(
    tmp_path: Path, left_running: Callable[[], list[psutil.Process]]
) -> None:
    behaviour = {"a": "work", "b": "raise", "c": "hang", "d": "lie", "e": "work"}
    run, found = federate(tmp_path, behaviour, quorum=0.4)
    reasons = {entry.node: entry.reason for entry in run.ledger.of("quarantined")}
    assert set(reasons) == {"b", "c", "d"}
    assert "out of coffee" in reasons["b"]
    assert "did not answer" in reasons["c"]
    assert "not in the store" in reasons["d"]
    (average,) = (candidate for candidate in found if candidate.name == "average")
    assert average.digest is not None
    value, manifest = read_adapter(run.store.open(average.digest))
    assert len(manifest.parents) == 2
    assert torch.allclose(value["layer"].delta(), torch.ones(3, 2))
    assert not left_running(), "the engine and the participant that hangs have ended"


def test_when_every_client_raises_the_run_fails_with_their_reasons(
    tmp_path: Path, left_running: Callable[[], list[psutil.Process]]
) -> None:
    """Flower itself calls such a run completed."""
    with pytest.raises(QuorumError, match=r"0 of 2 results and needs 2.*out of coffee"):
        federate(tmp_path, {"a": "raise", "b": "raise"}, quorum=1.0)
    assert not left_running()


def test_an_engine_that_does_not_start_says_why_and_leaves_nothing(
    left_running: Callable[[], list[psutil.Process]],
) -> None:
    engine = Engine(cpus=-1, gpus=0)
    with pytest.raises(EnvironmentFailure, match=r"did not start: ValueError: .*negative"):
        engine.start()
    engine.close()
    assert not left_running()


def test_an_engine_is_its_own_even_where_ray_is_told_of_another(
    monkeypatch: pytest.MonkeyPatch, left_running: Callable[[], list[psutil.Process]]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    engine = Engine(cpus=1, gpus=0)
    try:
        assert not engine.start().endswith(":1")
    finally:
        engine.close()
    assert not left_running()
