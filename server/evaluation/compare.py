"""From scores to results: means, differences with intervals, and the answer in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from seedbed.common.drift import TextDrift
from seedbed.common.manifest import BaseIdentity
from seedbed.common.routing import RoutingDiagnostics
from seedbed.common.routing.diagnostics import pooled
from seedbed.common.routing.settings import CONSTANT
from seedbed.server.evaluation.results import (
    CandidateResult,
    Cost,
    Effect,
    Estimate,
    GeneralText,
    Kind,
    LineageNode,
    Means,
    Outcomes,
    Results,
    RouterUse,
    Scope,
)
from seedbed.server.evaluation.statistics import holm, mean_over_tasks, paired_difference, standard_error
from seedbed.server.evaluation.suite import Score, TaskResult

OWN = "experts:own"
TYPICAL = "experts:mean"
ORACLE = "experts:best"
TUNED = "tuned:own"
_NAMES: dict[str, tuple[Kind, str]] = {
    "base": ("base", "base model"),
    "seed": ("seed", "seed alone"),
    "average": ("merge", "seeded average"),
    "compressed": ("merge", "compressed average"),
    "factor_mean": ("merge", "factor mean"),
    "unseeded": ("merge", "unseeded average"),
    "joint": ("joint", "joint training"),
    OWN: ("reference", "each task's own expert"),
    TYPICAL: ("reference", "experts alone, mean"),
    ORACLE: ("reference", "oracle expert"),
    TUNED: ("reference", "each task's tuned expert"),
    "svd": ("merge", "mean cut to one rank"),
    "uniform": ("mixture", "uniform router"),
    "learned": ("mixture", "learned router"),
    "arrow": ("mixture", "arrow router"),
    "phatgoose": ("mixture", "phatgoose router"),
    "sequence": ("mixture", "sequence router"),
    "molora": ("joint", "MoLoRA"),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One candidate with its scores."""

    name: str
    """`base`, `seed`, `expert:TASK`, `average`, … (any other name counts as a merge)."""
    scores: Sequence[TaskResult]
    digest: str | None = None
    rank: int | None = None
    parameters: int | None = None
    parents: tuple[str, ...] = ()
    drift: TextDrift | None = None
    routing: Mapping[str, RoutingDiagnostics] = field(default_factory=dict)
    """Of a mixture, by task."""
    mixture: bool = False


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What else a report tells: how the candidates came about."""

    command: str = ""
    base: BaseIdentity | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    lineage: Sequence[LineageNode] = ()
    costs: Sequence[Cost] = ()
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


def build_results(
    name: str, measured: Sequence[Measured], circumstances: Circumstances | None = None, *, seed: int = 0
) -> tuple[Results, Outcomes]:
    """Compare candidates and put everything into one document.

    Args:
        name: of the federation.
        measured: every candidate, in the order of the tables; two references are added that are computed from the
            experts.
        seed: of the bootstrap.
    """
    from seedbed.server.evaluation.answer import answer

    whole = [*measured, *_references(measured)]
    outcomes = {entry.name: {score.task: score.outcomes for score in entry.scores} for entry in whole}
    own = {entry.name: outcomes[entry.name] for entry in measured}
    tasks = {score.task: score.held_in for entry in measured for score in entry.scores}
    candidates = {entry.name: _candidate(entry, tasks) for entry in whole}
    about = circumstances or Circumstances()
    results = Results(
        name=name,
        answer="",
        command=about.command,
        base=about.base,
        candidates=candidates,
        effects=tuple(_effects(candidates, outcomes, tasks, seed)),
        diagnostics=dict(about.diagnostics),
        lineage=tuple(about.lineage),
        costs=tuple(about.costs),
        notes=tuple(about.notes),
        config=dict(about.config),
        versions=dict(about.versions),
    )
    return results.model_copy(update={"answer": answer(results)}), own


def kind_and_label(name: str) -> tuple[Kind, str]:
    """What a candidate is, by its name."""
    group, separator, task = name.partition(":")
    if name not in _NAMES and separator and group in ("expert", "tuned", "unseeded"):
        return "expert", f"{group} {task}" if group == "expert" else f"{group} expert {task}"
    return _NAMES.get(name, ("merge", name))


def contenders(candidates: Mapping[str, CandidateResult]) -> list[str]:
    """The models that a federation can publish: its merges and mixtures; without any, whatever is no reference."""
    merges = [name for name, candidate in candidates.items() if candidate.kind in ("merge", "mixture")]
    return merges or [name for name, candidate in candidates.items() if candidate.kind not in ("expert", "reference")]


def best(candidates: Mapping[str, CandidateResult], scope: Scope) -> str | None:
    """The contender of highest mean accuracy in `scope`; of equals, the first."""
    ranked = [
        (estimate.value, name)
        for name in contenders(candidates)
        if (estimate := getattr(candidates[name].mean, scope)) is not None
    ]
    return max(ranked, key=lambda pair: pair[0])[1] if ranked else None


def _references(measured: Sequence[Measured]) -> list[Measured]:
    """Pseudo-candidates that are computed from the experts' scores; see SCHEMA.md."""
    experts, tuned = (_alone(measured, group) for group in ("expert", "tuned"))
    own_tuned = [score for task, entry in tuned.items() for score in entry.scores if score.task == task]
    if not experts:
        return [Measured(TUNED, own_tuned)] if own_tuned else []
    by_task: dict[str, list[TaskResult]] = {}
    for entry in experts.values():
        for score in entry.scores:
            by_task.setdefault(score.task, []).append(score)
    own = [score for task, entry in experts.items() for score in entry.scores if score.task == task]
    typical = [mean_score(scores) for scores in by_task.values() if len(scores) == len(experts) > 1]
    best_of = [
        oracle_score(task, scores, list(experts)) for task, scores in by_task.items() if len(scores) == len(experts) > 1
    ]
    found = ((OWN, own), (TUNED, own_tuned), (TYPICAL, typical), (ORACLE, best_of))
    return [Measured(name, scores) for name, scores in found if scores]


def oracle_score(task: str, scores: Sequence[TaskResult], experts: Sequence[str]) -> TaskResult:
    """One task's score of an oracle that knows the task: an upper reference for everything that chooses one expert.

    On an expert's own task that expert; on others the best, chosen with the answers at hand, which favours it.

    Args:
        scores: of every expert on the task.
        experts: their tasks, in the same order.
    """
    return scores[experts.index(task)] if task in experts else max(scores, key=lambda score: score.value)


def _alone(measured: Sequence[Measured], group: str) -> dict[str, Measured]:
    """The single adapters of a group, by task."""
    return {entry.name.partition(":")[2]: entry for entry in measured if entry.name.startswith(f"{group}:")}


def mean_score(scores: Sequence[TaskResult]) -> TaskResult:
    """The mean over several models, example by example, of one task's scores."""
    outcomes = np.mean([score.outcomes for score in scores], axis=0)
    normalized = [score.acc_norm for score in scores if score.acc_norm is not None]
    return scores[0].model_copy(
        update={
            "value": float(outcomes.mean()),
            "stderr": standard_error(outcomes),
            "acc_norm": float(np.mean(normalized)) if normalized else None,
            "outcomes": tuple(float(value) for value in outcomes),
        }
    )


def _candidate(entry: Measured, tasks: Mapping[str, bool]) -> CandidateResult:
    kind, label = kind_and_label(entry.name)
    if entry.mixture:
        # Experts that were trained with their router have seen all data: a reference, as joint training is.
        together = any(diagnostics.kind == "molora" for diagnostics in entry.routing.values())
        kind = "joint" if together else "mixture"
    scores = {score.task: Score(**score.model_dump(exclude={"outcomes"})) for score in entry.scores}
    means = Means(
        held_in=_mean(scores, [task for task, held_in in tasks.items() if held_in]),
        held_out=_mean(scores, [task for task, held_in in tasks.items() if not held_in]),
        all=_mean(scores, list(tasks)),
    )
    return CandidateResult(
        label=label,
        kind=kind,
        own_task=entry.name.partition(":")[2] if kind == "expert" else None,
        general=_general(entry.drift) if entry.drift is not None else None,
        routing=router_use(entry.routing) if entry.routing else None,
        digest=entry.digest,
        rank=entry.rank,
        parameters=entry.parameters,
        parents=entry.parents,
        tasks=scores,
        mean=means,
    )


def _general(drift: TextDrift) -> GeneralText:
    return GeneralText(
        kl=drift.kl,
        kl_stderr=standard_error(drift.kls),
        perplexity=drift.perplexity,
        update_norm=drift.update_norm,
        texts=len(drift.tokens),
        tokens=sum(drift.tokens),
    )


def router_use(by_task: Mapping[str, RoutingDiagnostics]) -> RouterUse:
    first = next(iter(by_task.values()))
    constant = first.kind in CONSTANT
    layers = {
        name: pooled([diagnostics.layers[name] for diagnostics in by_task.values()], constant=constant)
        for name in first.layers
    }
    overall = pooled(list(layers.values()), constant=constant)
    collapsed = 2 * sum(layer.collapsed for layer in layers.values()) > len(layers)
    return RouterUse(
        kind=first.kind,
        names=first.names,
        overall=overall.model_copy(update={"collapsed": collapsed}),
        tasks={task: diagnostics.overall for task, diagnostics in by_task.items()},
        layers=layers,
    )


def _mean(scores: Mapping[str, Score], tasks: Sequence[str]) -> Estimate | None:
    if not tasks or any(task not in scores for task in tasks):
        return None
    value, stderr = mean_over_tasks([scores[task].value for task in tasks], [scores[task].stderr for task in tasks])
    return Estimate(value=value, stderr=stderr, tasks=len(tasks))


def _effects(
    candidates: Mapping[str, CandidateResult], outcomes: Outcomes, tasks: Mapping[str, bool], seed: int
) -> list[Effect]:
    scopes: tuple[tuple[Scope, bool], ...] = (("held_out", False), ("held_in", True))
    found: list[Effect] = []
    for scope, held_in in scopes:
        chosen = {
            name: {task: values for task, values in by_task.items() if tasks[task] == held_in}
            for name, by_task in outcomes.items()
        }
        found += _scope_effects(_pairs(candidates, scope), chosen, scope, seed)
    return found


def _pairs(candidates: Mapping[str, CandidateResult], scope: Scope) -> list[tuple[str, str]]:
    """The seeded average (or first merge) and the best contender against everything, all models against the base."""
    whole = [
        name
        for name, candidate in candidates.items()
        if candidate.kind != "expert" and getattr(candidate.mean, scope) is not None
    ]
    models = [name for name in whole if candidates[name].kind != "reference"]
    first = "average" if "average" in candidates else next(iter(contenders(candidates)), None)
    against = [(name, other) for name in (first, best(candidates, scope)) for other in whole if name in whole]
    against += [(name, "base") for name in models if "base" in whole]
    against += [(TUNED, OWN)] if {TUNED, OWN} <= set(whole) else []
    return list(dict.fromkeys((name, other) for name, other in against if name is not None and name != other))


def _scope_effects(pairs: Sequence[tuple[str, str]], outcomes: Outcomes, scope: Scope, seed: int) -> list[Effect]:
    differences = [paired_difference(outcomes[ours], outcomes[theirs], seed=seed) for ours, theirs in pairs]
    adjusted = holm([difference.p for difference in differences])
    return [
        Effect(
            candidate=ours,
            reference=theirs,
            scope=scope,
            difference=difference.value,
            low=difference.low,
            high=difference.high,
            p=difference.p,
            p_holm=p_holm,
            n=difference.n,
            tasks=difference.tasks,
        )
        for (ours, theirs), difference, p_holm in zip(pairs, differences, adjusted, strict=True)
    ]
