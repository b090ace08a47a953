"""DeepSpeed trains what plain torch trains: with every ZeRO stage, with one rank and two, in one pass or several.

Each case starts processes of its own through DeepSpeed's launcher, which takes some ten seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from seedbed.client.engine import deepspeed_config
from seedbed.client.launch import run
from seedbed.client.spec import TrainSpec
from seedbed.client.training import train
from seedbed.common.adapter import Adapter
from seedbed.common.config import BaseModelConfig, LoraSettings, RoutingTuningSettings, TrainingSettings
from seedbed.common.errors import DataError, TrainingError
from seedbed.common.jobs import DataSource
from seedbed.common.routing import RouterSettings
from seedbed.common.routing.router_file import read_router
from seedbed.common.storage import read_adapter

Make = Callable[..., TrainSpec]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Make:
    # Completions of one to nine words, so that ranks with equally many examples have unequally many labels.
    path = tmp_path_factory.mktemp("tasks") / "uneven.jsonl"
    records = [{"prompt": "count", "completion": " ".join(["more"] * number)} for number in range(1, 10)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = DataSource(task="uneven", location=str(path))

    def make(
        output: Path, engine: str = "deepspeed", accumulation: int = 1, steps: int = 3, **changes: Any
    ) -> TrainSpec:
        settings = {
            "engine": engine,
            "steps": steps,
            "batch_size": 8,
            "warmup_steps": 1,
            "weight_decay": 0.1,
            "log_every": 1,
            "accumulation": accumulation,
            "deepspeed": changes.pop("deepspeed", {}),
        }
        return TrainSpec(
            base=BaseModelConfig(dtype=changes.pop("dtype", "auto")),
            lora=LoraSettings(rank=4),
            training=TrainingSettings.model_validate(settings),
            data=changes.pop("data", (source,)),
            output=output,
            threads=1,
            **changes,
        )

    return make


@pytest.fixture(scope="module")
def reference(spec: Make) -> Adapter:
    return train(spec(Path("unused"), engine="torch"), lambda _: None).value


def distance(one: Adapter, other: Adapter) -> float:
    """Largest difference of any two entries."""
    assert one.keys() == other.keys()
    pairs = [(getattr(one[name], factor), getattr(other[name], factor)) for name in one for factor in "AB"]
    return max(float((left - right).abs().max()) for left, right in pairs)


def alive(mark: Path) -> list[psutil.Process]:
    processes = psutil.process_iter(["cmdline", "status"])
    return [
        process
        for process in processes
        if any(str(mark) in part for part in process.info["cmdline"] or []) and process.info["status"] != "zombie"
    ]


@pytest.mark.parametrize(
    ("ranks", "stage", "accumulation", "more"),
    [
        (1, 0, 1, {}),
        (2, 1, 1, {}),
        (2, 2, 2, {}),
        (2, 3, 1, {}),
        (1, 3, 2, {"offload_optimizer": True, "offload_parameters": True}),
    ],
)
def test_deepspeed_agrees_with_torch(
    spec: Make, reference: Adapter, tmp_path: Path, ranks: int, stage: int, accumulation: int, more: dict[str, bool]
) -> None:
    events: list[dict[str, Any]] = []
    given = spec(
        tmp_path / "adapter",
        accumulation=accumulation,
        deepspeed={"processes": ranks, "zero_stage": stage, **more},
    )
    outcome = run(given, on_event=events.append, deadline=300, log=tmp_path / "log")
    assert [event["event"] for event in events] == ["start", "step", "step", "step", "done"]
    assert events[0]["ranks"] == ranks
    assert distance(read_adapter(outcome.directory)[0], reference) < 1e-4
    assert alive(tmp_path) == []


@pytest.mark.parametrize(("ranks", "stage", "accumulation"), [(2, 2, 2), (2, 3, 1)])
def test_deepspeed_agrees_with_torch_on_routing_tuning(
    spec: Make, tmp_path: Path, ranks: int, stage: int, accumulation: int
) -> None:
    texts = tmp_path / "general.jsonl"
    texts.write_text("".join(json.dumps({"text": f"the number {number}"}) + "\n" for number in range(20)))
    tuning = {
        "tuning": RoutingTuningSettings(kl_weight=2.0, norm_weight=0.5),
        "general": DataSource(task="general", location=str(texts)),
    }
    alone = train(spec(Path("unused"), engine="torch", **tuning), lambda _: None)
    plain = train(spec(Path("unused"), engine="torch"), lambda _: None)
    given = spec(
        tmp_path / "adapter", accumulation=accumulation, deepspeed={"processes": ranks, "zero_stage": stage}, **tuning
    )
    outcome = run(given, deadline=300, log=tmp_path / "log")
    assert distance(read_adapter(outcome.directory)[0], alone.value) < 1e-4
    assert distance(plain.value, alone.value) > 1e-3
    assert outcome.metrics["kl"] == pytest.approx(alone.metrics["kl"], abs=1e-4)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (2, 3)])
def test_deepspeed_agrees_with_torch_on_experts_with_their_router(
    spec: Make, tmp_path: Path, ranks: int, stage: int
) -> None:
    made = {"kind": "molora", "names": ("a", "b"), "router": RouterSettings(kind="molora")}
    alone = train(spec(Path("unused"), engine="torch", **made), lambda _: None).value
    given = spec(tmp_path / "mixture", deepspeed={"processes": ranks, "zero_stage": stage}, **made)
    run(given, deadline=300, log=tmp_path / "log")
    router, _, _ = read_router(tmp_path / "mixture/router")
    for index, expert in enumerate(alone.experts):
        assert distance(read_adapter(tmp_path / f"mixture/expert-00{index}")[0], expert) < 1e-4
    for name, tensors in alone.router.tensors.items():
        assert torch.allclose(tensors["weight"], router.tensors[name]["weight"], atol=1e-4)


def test_deepspeed_agrees_with_torch_on_a_router_over_frozen_experts(spec: Make, tmp_path: Path) -> None:
    for index in range(2):
        run(
            spec(tmp_path / f"expert{index}", engine="torch", data_seed=index),
            deadline=300,
            log=tmp_path / f"log{index}",
        )
    made = {
        "kind": "router",
        "names": ("a", "b"),
        "experts": (tmp_path / "expert0", tmp_path / "expert1"),
        "parents": ("0" * 64, "1" * 64),
        "router": RouterSettings(kind="learned"),
    }
    alone = train(spec(Path("unused"), engine="torch", **made), lambda _: None).value
    run(
        spec(tmp_path / "router", deepspeed={"processes": 2, "zero_stage": 3}, **made),
        deadline=300,
        log=tmp_path / "log",
    )
    router, _, _ = read_router(tmp_path / "router")
    for name, tensors in alone.tensors.items():
        assert tensors["weight"].any()
        assert torch.allclose(tensors["weight"], router.tensors[name]["weight"], atol=1e-4)


def test_factors_stay_float32_over_a_bfloat16_model_in_slices(spec: Make, tmp_path: Path) -> None:
    given = spec(tmp_path / "adapter", dtype="bfloat16", steps=1, deepspeed={"processes": 1, "zero_stage": 3})
    adapter, manifest = read_adapter(run(given, deadline=300, log=tmp_path / "log").directory)
    assert manifest.dtype == "float32"
    factors = next(iter(adapter.values()))
    assert not torch.equal(factors.A, factors.A.bfloat16().float())


def test_an_error_on_two_ranks_is_told_once_and_nothing_keeps_running(spec: Make, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    bad = DataSource(task="bad", location=str(tmp_path / "bad.jsonl"))
    with pytest.raises(DataError, match="line 1: unknown shape"):
        run(spec(tmp_path / "adapter", data=(bad,), deepspeed={"processes": 2}), deadline=300, log=tmp_path / "log")
    assert alive(tmp_path) == []


def test_a_rank_that_is_killed_takes_the_job_with_it(spec: Make, tmp_path: Path) -> None:
    def kill_one(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 1:
            ranks = [process for process in alive(tmp_path) if "deepspeed.launcher.launch" not in process.cmdline()]
            ranks[-1].kill()

    given = spec(tmp_path / "adapter", steps=100_000, deepspeed={"processes": 2})
    with pytest.raises(TrainingError):
        run(given, on_event=kill_one, deadline=300, log=tmp_path / "log")
    assert alive(tmp_path) == []


def test_deepspeed_is_configured_as_the_job_says() -> None:
    training = TrainingSettings.model_validate(
        {
            "batch_size": 12,
            "accumulation": 3,
            "clip_norm": 0.5,
            "deepspeed": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        }
    )
    config = deepspeed_config(training, ranks=2)
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
