"""What an ablation would do, without doing it: `--dry-run`. Cells, trainings by kind, what is there already, and how long."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seedbed.common import basemodel
from seedbed.common.batteries import expand as expand_batteries
from seedbed.common.config import FederationConfig
from seedbed.common.errors import ModelError, ResumeError
from seedbed.common.jobs import Job
from seedbed.common.manifest import BaseIdentity
from seedbed.server.ablation.artifacts import Graph, candidate_digest, walk
from seedbed.server.ablation.cells import Group, Variant, configured, expand, groups, whole_config, with_candidates
from seedbed.server.ablation.plan import kept_plan, refuse_change
from seedbed.server.ablation.values import Plan
from seedbed.server.combination import Parts
from seedbed.server.measurement import score_key
from seedbed.server.simulation import worker_count

_KINDS = ("seed", "expert", "tuned expert", "joint", "molora", "gate", "router")
_RULE = {"seed": 35, "expert": 35, "tuned expert": 90, "joint": 35, "molora": 140, "gate": 50, "router": 70}
"""Milliseconds of one core for a step of each kind, with the embedded model and 16 examples in a batch: our own measurements on
one machine, used until the ledger knows better."""
_RULE_SCORE = 0.3
"""Seconds for a candidate on a task, likewise."""


@dataclass(frozen=True, slots=True)
class Trainings:
    """Trainings of one kind."""

    kind: str
    distinct: int
    cached: int
    steps: int
    """Of those that are missing."""
    seconds: float | None
    """Of one worker for those that are missing; none where nothing is known."""


@dataclass(frozen=True, slots=True)
class Artifacts:
    """Merges, routers or means of one kind, which are computed from trainings."""

    kind: str
    distinct: int
    cached: int


@dataclass(frozen=True, slots=True)
class CellNeeds:
    """What one cell takes, over all random seeds."""

    variant: Variant
    trainings: int
    """If it were run alone."""
    new: int
    """That no cell before it needs."""


@dataclass
class History:
    """What the ledger and the kept scores of a directory say; read without touching them."""

    trained: dict[str, str] = field(default_factory=dict)
    combined: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of every training, by recipe."""
    scored: list[float] = field(default_factory=list)
    """Seconds of every score."""
    scores: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, root: Path | None) -> History:
        found = cls()
        if root is None or not (root / "ledger.jsonl").is_file():
            return found
        for entry in _entries(root / "ledger.jsonl"):
            event, key = entry.get("event"), str(entry.get("key", ""))
            if event == "accepted":
                found.trained[key] = str(entry["digest"])
                found.seconds[key] = float(entry.get("seconds", 0.0))
            elif event == "combined":
                found.combined[key] = str(entry["digest"])
            elif event == "evaluated" and "general text" not in str(entry.get("name", "")):
                found.scored.append(float(entry.get("seconds", 0.0)))
        found.scores = {path.stem for path in (root / "evaluations").glob("*.json")}
        return found


@dataclass(frozen=True, slots=True)
class Forecast:
    """An ablation before it is run."""

    plan: Plan
    seeds: int
    workers: int
    cells: tuple[CellNeeds, ...]
    configurations: int
    trainings: tuple[Trainings, ...]
    combined: tuple[Artifacts, ...]
    scores: int
    """Distinct pairs of a model and a task."""
    scores_cached: int
    seconds: float | None
    """Of the whole rest, with all workers."""
    measured: bool
    """Whether the times come from the ledger, not from the rule."""
    other: str = ""
    """Why nothing that lies in the directory counts, although there is something."""

    @property
    def alone(self) -> int:
        """Trainings if every cell were run by itself."""
        return sum(cell.trainings for cell in self.cells)

    @property
    def distinct(self) -> int:
        return sum(row.distinct for row in self.trainings)

    @property
    def cached(self) -> int:
        return sum(row.cached for row in self.trainings)


def forecast(plan: Plan, seeds: Sequence[int], root: Path | None = None) -> Forecast:
    """Look ahead; nothing is written.

    Args:
        root: directory of an earlier, unfinished run, whose artifacts need not be made again. One that could not be
            continued with this plan does not count.

    Raises:
        ConfigError: if the plan makes no sense.
    """
    variants = expand(plan)
    config = whole_config(plan, variants)
    base = _identity(config)
    other = _not_continued(root, plan)
    history = History.of(None if other else root)
    cells, graph = _cells(variants, seeds, base, history)
    known = Graph(history.trained, history.combined)
    scores = {key for seed in seeds for group in groups(variants) for key in score_keys(group, seed, base, known)}
    trainings = tuple(row for row in (_trainings(kind, graph, history, config) for kind in _KINDS) if row.distinct)
    left = scores - history.scores
    per_score = sum(history.scored) / len(history.scored) if history.scored else _rule(config, _RULE_SCORE)
    workers = worker_count(config, len(config.tasks.experts))
    times = [row.seconds for row in trainings]
    seconds = None
    if per_score is not None and None not in times:
        seconds = sum(value or 0.0 for value in times) / workers + len(left) * per_score
    return Forecast(
        plan=plan,
        seeds=len(seeds),
        workers=workers,
        cells=tuple(cells),
        configurations=len(groups(variants)),
        trainings=trainings,
        combined=tuple(_combined(known.made, history)),
        scores=len(scores),
        scores_cached=len(scores & history.scores),
        seconds=seconds,
        measured=bool(history.seconds),
        other=other,
    )


def _not_continued(root: Path | None, plan: Plan) -> str:
    """Why a directory cannot be continued with a plan; empty where it can, or is not there."""
    try:
        before = kept_plan(root) if root is not None else None
        if before is not None:
            refuse_change(before, plan, str(root))
    except ResumeError as error:
        return error.message
    return ""


def _combined(made: Mapping[str, str], history: History) -> Iterator[Artifacts]:
    for kind in dict.fromkeys(made.values()):
        recipes = {recipe for recipe, of in made.items() if of == kind}
        yield Artifacts(kind, len(recipes), len(recipes & history.combined.keys()))


def _cells(
    variants: Sequence[Variant], seeds: Sequence[int], base: BaseIdentity, history: History
) -> tuple[list[CellNeeds], Graph]:
    """Each cell's own trainings, and the graph of all."""
    whole = Graph(history.trained, history.combined)
    found = []
    for variant in variants:
        alone = Graph(history.trained, history.combined)
        for seed in seeds:
            walk(configured(with_candidates([variant]), seed), base, alone)
        new = alone.jobs.keys() - whole.jobs.keys()
        whole.jobs.update({recipe: job for recipe, job in alone.jobs.items() if recipe in new})
        found.append(CellNeeds(variant, len(alone.jobs), len(new)))
    return found, whole


def score_keys(group: Group, seed: int, base: BaseIdentity, known: Graph) -> Iterator[str]:
    """Under which the scores are kept that the cells of one configuration need; some may be needed more than once.

    Args:
        known: what was trained and combined before; what the cells combine is noted there.
    """
    config = configured(group.config, seed)
    graph = Graph(known.trained, known.combined, made=known.made)
    parts = walk(config, base, graph)
    tasks = (*config.tasks.experts, *config.tasks.held_out, *expand_batteries(config.evaluation.extra))
    for variant in group.variants:
        yield from (
            score_key(digest, base, task, config)
            for digest, of_tasks in _models(variant, parts, seed, graph, tasks)
            for task in of_tasks
        )


def _models(
    variant: Variant, parts: Parts, seed: int, graph: Graph, tasks: Sequence[str]
) -> Iterator[tuple[str | None, Sequence[str]]]:
    """What is measured for a cell, and on which tasks."""
    candidate = variant.candidate
    group = parts.groups.get(candidate.of, {})
    if candidate.role in ("alone", "oracle"):
        yield from ((digest, tasks) for digest in group.values())
        return
    yield candidate_digest(candidate, parts, seed, graph), tasks
    yield from ((digest, (task,)) for task, digest in group.items())


def _trainings(kind: str, graph: Graph, history: History, config: FederationConfig) -> Trainings:
    jobs = {recipe: job for recipe, job in graph.jobs.items() if kind_of(job) == kind}
    done = [(job, history.seconds[recipe]) for recipe, job in jobs.items() if recipe in history.seconds]
    steps = sum(job.training.steps for recipe, job in jobs.items() if recipe not in history.trained)
    known = sum(job.training.steps for job, _ in done)
    each = sum(seconds for _, seconds in done) / known if known else _rule(config, _RULE[kind] / 1000)
    seconds = 0.0 if not steps else None if each is None else steps * each
    return Trainings(kind, len(jobs), len(done), steps, seconds)


def kind_of(job: Job) -> str:
    return "tuned expert" if job.tuning is not None else job.kind


def _rule(config: FederationConfig, value: float) -> float | None:
    """A rule of thumb, for the model that it was measured on."""
    return value if config.base.model == "embedded" else None


def _identity(config: FederationConfig) -> BaseIdentity:
    """Of the base model; only its name where it is not at hand, so that a plan can be looked at before."""
    try:
        return basemodel.identify(basemodel.resolve(config.base), config.base.model)
    except ModelError:
        return BaseIdentity(name=config.base.model)


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the line that is being written, or was when the run was ended
            continue
