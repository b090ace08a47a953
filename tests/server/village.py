"""Participants of a few lines, for tests of the stages: they "train" by adding numbers that one can do in the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.config import FederationConfig
from seedbed.common.config_file import parse_config
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.common.manifest import BaseIdentity
from seedbed.common.routing import Router, RouterSettings
from seedbed.common.routing.router_file import read_router, write_router
from seedbed.common.storage import DirectoryStore, read_adapter, write_adapter
from seedbed.server.rundir import RunDirectory
from seedbed.server.workforce import Failure

BASE = BaseIdentity(name="tiny", digest="1" * 64)
OTHER = BaseIdentity(name="other", digest="2" * 64)
SHAPES = {"layer": (3, 2)}
TASKS = ("a", "b", "c", "d")
Fault = Callable[[Job, Path], "JobResult | Failure | None"]


def config(**values: Any) -> FederationConfig:
    return parse_config(
        {
            "tasks": {"experts": list(TASKS)},
            "lora": {"rank": 1, "alpha": 1},
            "seed": {"steps": 2},
            "training": {"steps": 3},
            **values,
        }
    )


def adapter(b: float, module: str = "layer", rows: int = 3) -> Adapter:
    """dW = b · ones(rows, 2)."""
    return Adapter({module: LoraFactors(torch.ones(1, 2), torch.full((rows, 1), b), 1.0)})


def _place(store: Path, job: Job) -> Path:
    return store.parent / "made" / f"{job.name.replace(':', '-')}-{len(list(store.parent.glob('made/*')))}"


def put(store: Path, job: Job, value: Adapter, **fields: Any) -> str:
    made = {
        "kind": job.kind,
        "base": BASE,
        "parents": job.parents,
        "recipe": job.recipe,
        "task": job.tasks[0] if len(job.tasks) == 1 else None,
        "metrics": {"loss": 1.0},
        **fields,
    }
    place = _place(store, job)
    write_adapter(place, value, **made)
    return DirectoryStore(store).put(place)


def router(weight: float, experts: int, size: int = 2, kind: str = "learned") -> Router:
    """Every number of the router is `weight`."""
    if kind == "phatgoose":
        settings = RouterSettings(kind="phatgoose", top_k=1)
        return Router(settings, {"layer": {"gates": torch.full((experts, size), float(weight))}})
    tensors = {"weight": torch.full((experts, size), float(weight)), "bias": torch.full((experts,), float(weight))}
    return Router(RouterSettings.model_validate({"kind": kind}), {"layer": tensors})


def put_router(store: Path, job: Job, value: Router, **fields: Any) -> str:
    made = {
        "kind": "gate" if job.kind == "gate" else "router",
        "base": BASE,
        "names": job.names,
        "parents": job.parents,
        "recipe": job.recipe,
        **fields,
    }
    place = _place(store, job)
    write_router(place, value, **made)
    return DirectoryStore(store).put(place)


class Village:
    """Participants that "train" by adding the number of steps to B (and the length of the task's name), or to every number of a
    router, or do what `faults` says for a job's name."""

    def __init__(self, store: Path, faults: Mapping[str, Fault] | None = None) -> None:
        self.store = store
        self.faults = dict(faults or {})
        self.asked: list[str] = []
        self.jobs: dict[str, Job] = {}
        self.hellos: dict[int, Hello | Failure] = {
            index: Hello(node=f"node-{task}", version=version("seedbed"), base=BASE, tasks=(task,), devices=("cpu",))
            for index, task in enumerate(TASKS)
        }
        self.hellos[len(TASKS)] = Hello(
            node="all-data", version=version("seedbed"), base=BASE, tasks=TASKS, pooled=True, devices=("cpu",)
        )

    def hello(self, expected: int, deadline: float) -> Mapping[int, Hello | Failure]:
        return self.hellos

    def perform(
        self,
        jobs: Sequence[tuple[int, Job]],
        deadline: float,
        on_answer: Callable[[int, Job, JobResult | Failure], None],
    ) -> None:
        for node, job in jobs:
            self.asked.append(job.name)
            self.jobs[job.name] = job
            fault = self.faults.get(job.name)
            answer = fault(job, self.store) if fault else None
            on_answer(node, job, answer or self._train(job))

    def _train(self, job: Job) -> JobResult:
        if job.kind == "gate":
            return done(job, put_router(self.store, job, router(job.training.steps, 1, kind="phatgoose")))
        if job.kind == "router":
            start = 0.0
            if job.parent:
                before, _, _ = read_router(DirectoryStore(self.store).open(job.parent))
                start = float(before.tensors["layer"]["bias"][0])
            trained = router(start + job.training.steps + len(job.tasks[0]), len(job.experts))
            return done(job, put_router(self.store, job, trained))
        if job.kind == "molora":
            return done(job, self._molora(job))
        start = 0.0
        if job.parent:
            parent, _ = read_adapter(DirectoryStore(self.store).open(job.parent))
            start = float(parent["layer"].B[0, 0])
        return done(job, put(self.store, job, adapter(start + job.training.steps + len(job.tasks[0]))))

    def _molora(self, job: Job) -> str:
        experts = tuple(
            put(self.store, job, adapter(1.0 + index), kind="expert", recipe="", parents=(), task=name)
            for index, name in enumerate(job.names)
        )
        return put_router(self.store, job, router(1.0, len(experts), kind="molora"), parents=experts)


def done(job: Job, digest: str) -> JobResult:
    return JobResult(node="node", name=job.name, recipe=job.recipe, digest=digest)


def open_run(root: Path, settings: FederationConfig | None = None, resume: bool = False) -> RunDirectory:
    return RunDirectory.open(root, settings or config(), {"data": "hash"}, resume=resume)
