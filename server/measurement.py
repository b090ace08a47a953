"""Stage evaluate: every candidate on every task and on general text, each result kept as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from seedbed.common import basemodel
from seedbed.common.adapter import Adapter
from seedbed.common.config import FederationConfig
from seedbed.common.drift import Drift, TextDrift
from seedbed.common.files import atomic_write
from seedbed.common.manifest import BaseIdentity, Record, recipe_hash
from seedbed.common.routing import Mixture, RoutingDiagnostics
from seedbed.common.routing.router_file import read_router
from seedbed.common.scoring import SeedbedLM
from seedbed.common.storage import AdapterStore, read_adapter, read_manifest
from seedbed.common.tasks import EvalTask, resolve_tasks, task_from_jsonl
from seedbed.server.combination import Combination
from seedbed.server.evaluation.suite import TaskResult, evaluate
from seedbed.server.inputs import Inputs
from seedbed.server.ledger import Entry
from seedbed.server.observer import Observer
from seedbed.server.rundir import RunDirectory

Value = TypeVar("Value", bound=Record)
Scores = dict[str, list[TaskResult]]


class Measurement:
    """Scores candidates over one base model, which is loaded once and only when some score is missing.

    Args:
        run: the open run directory.
        base: identity of the base model, which is part of every score's key.
        inputs: test files of the tasks, and general text.
        observe: who is told of progress.
    """

    def __init__(self, run: RunDirectory, base: BaseIdentity, inputs: Inputs, observe: Observer) -> None:
        self.run = run
        self.base = base
        self.inputs = inputs
        self.observe = observe
        self._loaded = _Loaded()

    def of(self, run: RunDirectory) -> Measurement:
        """The same for another view of the run directory; they share the base model, once it is loaded."""
        other = Measurement(run, self.base, self.inputs, self.observe)
        before, now = self.run.config, run.config
        if before.base == now.base and before.evaluation.batch_tokens == now.evaluation.batch_tokens:
            other._loaded = self._loaded
        return other

    def scores(self, candidates: Sequence[Combination]) -> Scores:
        """All scores by candidate; what an earlier try has measured is read back."""
        tasks = self.tasks()
        pairs = [(candidate, task) for candidate in candidates for task in self._for(candidate, tasks)]
        # By key: one adapter may have several names.
        missing = {self._key(*pair): pair for pair in pairs if self._held(*pair) is None}.values()
        self.observe.stage("evaluate", len(missing))
        for candidate, task in missing:
            self._measure(candidate, task)
            self.observe.advance(f"{candidate.name} on {task.name}")
        found: Scores = {candidate.name: [] for candidate in candidates}
        for candidate, task in pairs:
            result = self._held(candidate, task)
            assert result is not None  # it was measured above
            found[candidate.name].append(result)
        return found

    def drifts(self, candidates: Sequence[Combination]) -> dict[str, TextDrift]:
        """How far each candidate is from the base model on general text; empty where there is none."""
        if self.inputs.general is None or not self.run.config.evaluation.drift:
            return {}
        missing = {one.digest: one for one in candidates if self._held_drift(one) is None}.values()
        self.observe.stage("general text", len(missing))
        for candidate in missing:
            self._measure_drift(candidate)
            self.observe.advance(candidate.name)
        found = {candidate.name: self._held_drift(candidate) for candidate in candidates}
        return {name: drift for name, drift in found.items() if drift is not None}

    def routing(self, candidates: Sequence[Combination]) -> dict[str, dict[str, RoutingDiagnostics]]:
        """What the router of each mixture did, task by task, while it was scored."""
        tasks = self.tasks()
        found: dict[str, dict[str, RoutingDiagnostics]] = {}
        for candidate in candidates:
            for task in self._for(candidate, tasks):
                held = _read(RoutingDiagnostics, self._path(candidate, task, ".routing"))
                if held is not None:
                    found.setdefault(candidate.name, {})[task.name] = held
        return found

    def tasks(self) -> list[EvalTask]:
        """What candidates are measured on."""
        config = self.run.config
        own = [
            task_from_jsonl(
                name, Path(self.inputs.test[name]), config.tasks.prompt, held_in=name in config.tasks.experts
            )
            for name in (*config.tasks.experts, *config.tasks.held_out)
        ]
        return own + (resolve_tasks(config.evaluation.extra) if config.evaluation.extra else [])

    def _for(self, candidate: Combination, tasks: Sequence[EvalTask]) -> list[EvalTask]:
        alone = candidate.task is not None
        tuned = alone and candidate.name.startswith("tuned:")  # asked whether it still does its own task
        own_only = alone and (tuned or self.run.config.evaluation.expert_tasks == "own")
        return [task for task in tasks if not own_only or task.name == candidate.task]

    def _key(self, candidate: Combination, task: EvalTask) -> str:
        """Hash of what determines a score. The data's hashes are the run's: it is not resumed with other data."""
        return score_key(candidate.digest, self.base, task.name, self.run.config)

    def _path(self, candidate: Combination, task: EvalTask, kind: str = "") -> Path:
        return self.run.root / "evaluations" / f"{self._key(candidate, task)}{kind}.json"

    def _held(self, candidate: Combination, task: EvalTask) -> TaskResult | None:
        return _read(TaskResult, self._path(candidate, task))

    def _measure(self, candidate: Combination, task: EvalTask) -> None:
        started = time.monotonic()
        lm = self._wearing(candidate.digest)
        routed = lm.routing.mixture is not None
        lm.routing.record(routed, padding=lm.pad_token_id)
        (result,) = evaluate(lm, [task], limit=self.run.config.evaluation.limit)
        if routed:
            _write(self._path(candidate, task, ".routing"), lm.routing.diagnostics())
            lm.routing.record(False)
        _write(self._path(candidate, task), result)
        self._note(f"{candidate.name} on {task.name}", self._key(candidate, task), candidate, started)

    def _drift_path(self, candidate: Combination) -> Path:
        assert self.inputs.general is not None
        settings = {"texts": self.run.config.tasks.general_test, "max_tokens": self.run.config.training.max_tokens}
        key = recipe_hash({"candidate": candidate.digest, "base": self.base.digest, "general": settings})
        return self.run.root / "evaluations" / f"{key}.drift.json"

    def _held_drift(self, candidate: Combination) -> TextDrift | None:
        return _read(TextDrift, self._drift_path(candidate))

    def _measure_drift(self, candidate: Combination) -> None:
        started = time.monotonic()
        lm = self._wearing(candidate.digest)
        max_tokens = self.run.config.training.max_tokens
        if max_tokens not in self._loaded.drifts:
            assert self.inputs.general is not None
            texts = self.inputs.general.test_texts()
            self._loaded.drifts[max_tokens] = Drift(lm, texts, max_tokens=max_tokens)
        path = self._drift_path(candidate)
        _write(path, self._loaded.drifts[max_tokens].measure())
        self._note(f"{candidate.name} on general text", path.name.partition(".")[0], candidate, started)

    def _note(self, name: str, key: str, candidate: Combination, started: float) -> None:
        seconds = time.monotonic() - started
        self.run.ledger.append(
            Entry(event="evaluated", name=name, key=key, digest=candidate.digest or "", seconds=seconds)
        )

    def _wearing(self, digest: str | None) -> SeedbedLM:
        """The base model with an adapter, or a mixture, swapped in."""
        loaded = self._loaded
        if loaded.lm is None:
            model, tokenizer = basemodel.load(self.run.config.base)
            loaded.lm = SeedbedLM(model, tokenizer, batch_tokens=self.run.config.evaluation.batch_tokens)
        if digest != loaded.worn:
            loaded.lm.set_adapter(wearable(self.run.store, digest) if digest else None)
            loaded.worn = digest
        return loaded.lm


@dataclass
class _Loaded:
    """The base model, what it wears, and what it says of general text, by the longest text."""

    lm: SeedbedLM | None = None
    worn: str | None = None
    drifts: dict[int, Drift] = field(default_factory=dict)


def score_key(digest: str | None, base: BaseIdentity, task: str, config: FederationConfig) -> str:
    """Under which a candidate's score on a task is kept; see `Measurement`."""
    return recipe_hash(
        {
            "candidate": digest,
            "base": base.digest,
            "task": task,
            "prompt": config.tasks.prompt,
            "limit": config.evaluation.limit,
        }
    )


def wearable(store: AdapterStore, digest: str) -> Adapter | Mixture:
    """An adapter of a store, or the mixture of a router with the experts that are its parents."""
    directory = store.open(digest)
    manifest = read_manifest(directory)
    if manifest.kind != "router":
        return read_adapter(directory)[0]
    router, names, _ = read_router(directory)
    return Mixture(names, tuple(read_adapter(store.open(parent))[0] for parent in manifest.parents), router)


def _write(path: Path, value: Record) -> None:
    atomic_write(path, value.model_dump_json().encode())


def _read(kind: type[Value], path: Path) -> Value | None:
    """What was kept there; None where there is nothing to be believed, which is then measured again."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
