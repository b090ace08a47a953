"""From scores to what a cell gave: its own tasks and zero-shot tasks, drift, routing, and the cost of its lineage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from seedbed.common.config import FederationConfig
from seedbed.common.drift import TextDrift
from seedbed.common.errors import DataError, SeedbedError
from seedbed.common.routing import RoutingDiagnostics
from seedbed.common.storage import read_manifest
from seedbed.server.ablation.cells import Variant
from seedbed.server.ablation.values import SeedOutcome
from seedbed.server.assembly import lineage
from seedbed.server.candidates import Candidate
from seedbed.server.combination import Combination, Parts, alone_name
from seedbed.server.evaluation.compare import mean_score, oracle_score, router_use
from seedbed.server.evaluation.suite import TaskResult
from seedbed.server.rundir import RunDirectory

Scores = Mapping[str, Sequence[TaskResult]]


class Scorer(Protocol):
    """What measures candidates; `server.measurement.Measurement`."""

    def of(self, run: RunDirectory) -> Scorer: ...

    def scores(self, candidates: Sequence[Combination]) -> Scores: ...

    def drifts(self, candidates: Sequence[Combination]) -> Mapping[str, TextDrift]: ...

    def routing(self, candidates: Sequence[Combination]) -> Mapping[str, Mapping[str, RoutingDiagnostics]]: ...


@dataclass(frozen=True, slots=True)
class Made:
    """Cells of one configuration and one random seed whose candidates are there."""

    run: RunDirectory
    variants: tuple[Variant, ...]
    parts: Parts
    combinations: Mapping[str, Combination]
    """Candidates that are one model, by name."""

    @property
    def config(self) -> FederationConfig:
        return self.run.config


def measure(made: Made, scorer: Scorer, costs: Costs) -> tuple[dict[str, SeedOutcome], dict[str, str]]:
    """Outcomes by cell name, and for cells that could not be measured why."""
    outcomes: dict[str, SeedOutcome] = {}
    failures: dict[str, str] = {}
    try:  # all at once, for one progress bar
        found: _Found | None = _Found.of(made, made.variants, scorer)
    except Exception:
        found = None
    for variant in made.variants:
        try:
            known = found or _Found.of(made, (variant,), scorer)
            outcomes[variant.cell.name] = _outcome(made, variant, known, costs)
        except Exception as error:  # whatever is wrong with one cell, the others go on
            failures[variant.cell.name] = reason_of(error)
    return outcomes, failures


def reason_of(error: BaseException) -> str:
    return error.message if isinstance(error, SeedbedError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True)
class _Found:
    scores: Scores
    drifts: Mapping[str, TextDrift]
    routing: Mapping[str, Mapping[str, RoutingDiagnostics]]

    @classmethod
    def of(cls, made: Made, variants: Sequence[Variant], scorer: Scorer) -> _Found:
        models = {
            variant.candidate.name: made.combinations[variant.candidate.name]
            for variant in variants
            if variant.candidate.name in made.combinations
        }
        chosen = list(models.values())
        everywhere: dict[str, Combination] = {}
        own: dict[str, Combination] = {}
        for variant in variants:
            place = everywhere if variant.candidate.role in ("alone", "oracle") else own
            place.update({one.name: one for one in _alone(made, variant.candidate)})
        scores = dict(_scorer(scorer, made, "own").scores([*chosen, *own.values()]))
        if everywhere:
            scores |= _scorer(scorer, made, "all").scores(list(everywhere.values()))
        return cls(scores, scorer.drifts(chosen), scorer.routing(chosen))


def _scorer(scorer: Scorer, made: Made, expert_tasks: Literal["own", "all"]) -> Scorer:
    """One that measures single experts on their own tasks, or on all."""
    evaluation = made.config.evaluation.model_copy(update={"expert_tasks": expert_tasks})
    return scorer.of(made.run.view(made.config.model_copy(update={"evaluation": evaluation})))


def _alone(made: Made, candidate: Candidate) -> list[Combination]:
    """The single adapters that a candidate is made of, or the experts for one that is made of none."""
    group = made.parts.groups.get(candidate.of, {})
    return [Combination(alone_name(candidate.of, task), digest, task) for task, digest in group.items()]


def _outcome(made: Made, variant: Variant, found: _Found, costs: Costs) -> SeedOutcome:
    candidate, held_in = variant.candidate, made.config.tasks.experts
    alone = _alone(made, candidate)
    own = {str(one.task): score.value for one in alone for score in found.scores[one.name] if score.task == one.task}
    model = made.combinations.get(candidate.name)
    if model is None and candidate.role not in ("alone", "oracle"):
        raise DataError(f"candidate '{candidate.name}' could not be made", "See the ledger for what was left out.")
    if model is not None:
        scores, digests = found.scores[model.name], [model.digest] if model.digest else []
    else:
        scores = _of_experts(candidate, [found.scores[one.name] for one in alone], [str(one.task) for one in alone])
        digests = [one.digest for one in alone if one.digest]
    cost = costs.of(made.run, digests)
    by_task = found.routing.get(candidate.name)
    return SeedOutcome(
        digest=model.digest if model is not None else None,
        of=tuple(digests) if model is None else (),
        # What is held in depends on the configuration: a kept score may be another's.
        scores=tuple(score.model_copy(update={"held_in": score.task in held_in}) for score in scores),
        seen_by_seed=tuple(task for task in held_in if task in cost.seed_tasks),
        own=own,
        drift=found.drifts.get(candidate.name) if model is not None else None,
        routing=router_use(by_task) if by_task else None,
        trainings=cost.trainings,
        seconds=cost.seconds,
        tokens=cost.tokens,
        bytes_moved=cost.bytes_moved,
    )


def _of_experts(candidate: Candidate, scores: Sequence[Sequence[TaskResult]], tasks: Sequence[str]) -> list[TaskResult]:
    """What is computed from the scores of single experts.

    `experts` (LoRA per task): each held-in task answered by its own expert, others by an expert taken at random (the mean
    over experts, example by example). `oracle`: see `oracle_score`.
    """
    by_task: dict[str, list[TaskResult]] = {}
    for of_expert in scores:
        for score in of_expert:
            by_task.setdefault(score.task, []).append(score)
    found = []
    for task, several in by_task.items():
        if len(several) < len(scores):
            raise DataError(f"task {task} was not measured with every expert", "Set evaluation.expert_tasks to all.")
        if candidate.role == "oracle":
            found.append(oracle_score(task, several, tasks))
        else:
            found.append(several[tasks.index(task)] if task in tasks else mean_score(several))
    return found


@dataclass(frozen=True, slots=True)
class Cost:
    """Of everything in the lineage of some adapters."""

    trainings: int
    seconds: float
    tokens: int
    bytes_moved: int
    """Adapters that participants fetched and handed in."""
    seed_tasks: frozenset[str]
    """Tasks whose clients trained the seed."""


@dataclass
class Costs:
    """Costs by lineage; what is known of an adapter is read once."""

    _parents: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)
    _seed_task: dict[str, str] = field(default_factory=dict)

    def of(self, run: RunDirectory, digests: Sequence[str]) -> Cost:
        nodes: set[str] = set()
        for digest in digests:
            self._visit(run, digest, nodes)
        done = {entry.digest: entry for entry in run.ledger.of("accepted") if entry.digest in nodes}
        return Cost(
            trainings=len(done),
            seconds=sum(entry.seconds for entry in done.values()),
            tokens=sum(int(entry.detail.get("tokens", 0)) for entry in done.values()),
            bytes_moved=sum(self._sizes[one] for digest in done for one in (digest, *self._parents[digest])),
            seed_tasks=frozenset(self._seed_task[digest] for digest in done if digest in self._seed_task),
        )

    def _visit(self, run: RunDirectory, digest: str, nodes: set[str]) -> None:
        if digest in nodes:
            return
        if digest not in self._parents:
            self._read(run, digest)
        nodes.add(digest)
        for parent in self._parents[digest]:
            self._visit(run, parent, nodes)

    def _read(self, run: RunDirectory, digest: str) -> None:
        for node in lineage(run.store, run.ledger, [digest]):
            if node.digest in self._parents:
                continue
            directory = run.store.open(node.digest)
            self._parents[node.digest] = node.parents
            self._sizes[node.digest] = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
            task = read_manifest(directory).task
            if node.kind == "seed" and task:
                self._seed_task[node.digest] = task
