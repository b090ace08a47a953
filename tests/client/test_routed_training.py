"""Gates, routers and experts with routers as jobs: what is trained, what stays frozen, and what is left on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seedbed.client.outcome import manifest_of, put_result, write_result
from seedbed.client.spec import TrainSpec
from seedbed.client.training import Trained, train
from seedbed.common import basemodel
from seedbed.common.adapter import Adapter
from seedbed.common.config import BaseModelConfig, LoraSettings, TrainingSettings
from seedbed.common.embedded import write_task
from seedbed.common.errors import AdapterMismatchError
from seedbed.common.jobs import DataSource
from seedbed.common.manifest import BaseIdentity
from seedbed.common.routing import Mixture, Router, RouterSettings
from seedbed.common.routing.router_file import read_router, write_router
from seedbed.common.storage import DirectoryStore, read_adapter, read_manifest, write_adapter

TASKS = ("addition", "antonym")
LEARNED = RouterSettings(kind="learned")


@pytest.fixture(scope="module")
def base() -> BaseIdentity:
    config = BaseModelConfig()
    return basemodel.identify(basemodel.resolve(config), config.model)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSource, ...]:
    directory = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        write_task(task, directory, train=100, test=4, seed=0)
    return tuple(DataSource(task=task, location=str(directory / f"{task}.train.jsonl")) for task in TASKS)


def spec(output: Path, data: tuple[DataSource, ...], **changes: Any) -> TrainSpec:
    training = {"engine": "torch", "steps": 5, "batch_size": 8, "learning_rate": 1e-2, "max_tokens": 64}
    values: dict[str, Any] = {
        "base": BaseModelConfig(),
        "lora": LoraSettings(rank=2),
        "training": TrainingSettings.model_validate({**training, **changes.pop("training", {})}),
        "data": data,
        "threads": 1,
        "output": output,
    }
    return TrainSpec(**{**values, **changes})


def run(given: TrainSpec) -> Trained:
    return train(given, lambda _: None)


@pytest.fixture(scope="module")
def experts(
    tmp_path_factory: pytest.TempPathFactory, data: tuple[DataSource, ...], base: BaseIdentity
) -> tuple[Path, ...]:
    root = tmp_path_factory.mktemp("experts")
    for source in data:
        trained = run(spec(root / "unused", (source,), training={"steps": 40}))
        assert isinstance(trained.value, Adapter)
        write_adapter(root / source.task, trained.value, kind="expert", base=base)
    return tuple(root / task for task in TASKS)


def digests(experts: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(read_manifest(directory).digest for directory in experts)


def test_a_router_learns_over_experts_that_stay_as_they_are(
    tmp_path: Path, data: tuple[DataSource, ...], experts: tuple[Path, ...]
) -> None:
    given = spec(tmp_path / "router", data, kind="router", experts=experts, names=TASKS, router=LEARNED,
                 training={"steps": 40, "log_every": 10})  # fmt: skip
    events: list[dict[str, Any]] = []
    trained = train(given, events.append)
    assert isinstance(trained.value, Router)
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < 0.9 * losses[0]
    assert all(tensors["weight"].any() for tensors in trained.value.tensors.values()), "every layer's gate has moved"
    write_result(given.model_copy(update={"parents": digests(experts)}), trained)
    manifest = manifest_of(tmp_path / "router")
    assert (manifest.kind, manifest.parents) == ("router", digests(experts))


def test_a_router_goes_on_from_where_the_last_round_ended(
    tmp_path: Path, data: tuple[DataSource, ...], experts: tuple[Path, ...], base: BaseIdentity
) -> None:
    given = spec(tmp_path / "router", data, kind="router", experts=experts, names=TASKS, router=LEARNED)
    first = run(given).value
    assert isinstance(first, Router)
    write_router(tmp_path / "start", first, kind="router", base=base, names=TASKS, parents=digests(experts))
    still = {"learning_rate": 1e-9, "steps": 1}
    again = run(spec(tmp_path / "x", data, kind="router", experts=experts, names=TASKS, router=LEARNED, training=still,
                     start=tmp_path / "start")).value  # fmt: skip
    assert isinstance(again, Router)
    for name, tensors in first.tensors.items():
        assert torch.allclose(tensors["weight"], again.tensors[name]["weight"], atol=1e-6)


def test_spreading_the_load_makes_a_router_more_even(
    tmp_path: Path, data: tuple[DataSource, ...], experts: tuple[Path, ...]
) -> None:
    def bias(weight: float) -> float:
        given = spec(tmp_path / "x", data[:1], kind="router", experts=experts, names=TASKS, router=LEARNED,
                     load_balance=weight, training={"steps": 15})  # fmt: skip
        value = run(given).value
        assert isinstance(value, Router)
        return sum(float((tensors["bias"][0] - tensors["bias"][1]).abs()) for tensors in value.tensors.values())

    assert bias(10.0) < bias(0.0)


def test_a_gate_is_trained_for_one_frozen_expert(
    tmp_path: Path, data: tuple[DataSource, ...], experts: tuple[Path, ...]
) -> None:
    given = spec(
        tmp_path / "gate", data[:1], kind="gate", experts=experts[:1], names=TASKS[:1], parents=digests(experts[:1])
    )
    trained = run(given)
    write_result(given, trained)
    router, names, manifest = read_router(tmp_path / "gate")
    assert (manifest.kind, names, router.settings.kind) == ("gate", ("addition",), "phatgoose")
    expert, _ = read_adapter(experts[0])
    assert set(router.tensors) == set(expert)
    assert all(tensors["gates"].shape == (1, expert[name].shape[1]) for name, tensors in router.tensors.items())


def test_experts_and_their_router_are_trained_together_and_stored_apart(
    tmp_path: Path, data: tuple[DataSource, ...], base: BaseIdentity
) -> None:
    molora = RouterSettings(kind="molora")
    given = spec(tmp_path / "out", data, kind="molora", names=TASKS, router=molora, recipe="ab" * 32)
    trained = run(given)
    assert isinstance(trained.value, Mixture)
    digest = write_result(given, trained)
    store = DirectoryStore(tmp_path / "store")
    assert put_result(given.output, store) == digest
    manifest = read_manifest(store.open(digest))
    stored = [read_adapter(store.open(parent)) for parent in manifest.parents]
    assert [own.task for _, own in stored] == list(TASKS)
    first, second = (adapter for adapter, _ in stored)
    name = next(iter(first))
    assert first[name].B.any()
    assert not torch.allclose(first[name].A, second[name].A), "experts begin apart"
    assert store.find("ab" * 32) == digest


def test_a_router_for_experts_of_another_model_is_refused(tmp_path: Path, data: tuple[DataSource, ...]) -> None:
    from seedbed.common.adapter import LoraFactors

    stranger = Adapter({"model.layers.99.q_proj": LoraFactors(torch.ones(1, 4), torch.ones(4, 1), 1.0)})
    write_adapter(tmp_path / "stranger", stranger, kind="expert", base=BaseIdentity(name="other"))
    given = spec(tmp_path / "x", data, kind="router", experts=(tmp_path / "stranger",), names=("a",), router=LEARNED)
    with pytest.raises(AdapterMismatchError, match=r"layers\.99"):
        run(given)
