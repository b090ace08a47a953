"""The tables of a report as plain rows, which Markdown, HTML and the terminal then draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from seedbed.server.evaluation.answer import percent, points
from seedbed.server.evaluation.results import CandidateResult, Cost, Effect, Estimate, LineageNode, Results, Scope
from seedbed.server.evaluation.suite import Score

DIGEST = 10
"""Digits of a digest that are shown."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: the first column names the row, the others are numbers."""

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[tuple[int, int]] = frozenset()
    """Cells to emphasize, as (row, column)."""
    note: str = ""


def overview(results: Results) -> Grid:
    """Every candidate that is one model, with its means and its distance from the base."""
    shown = [(name, candidate) for name, candidate in results.candidates.items() if candidate.kind != "expert"]
    headers = ["candidate", "held-out", "vs base", "held-in", "vs base", "rank", "parameters"]
    rows = [
        [
            candidate.label,
            estimate(candidate.mean.held_out),
            _against_base(results, name, "held_out"),
            estimate(candidate.mean.held_in),
            _against_base(results, name, "held_in"),
            "" if candidate.rank is None else str(candidate.rank),
            "" if candidate.parameters is None else f"{candidate.parameters:,}",
        ]
        for name, candidate in shown
    ]
    rows.append(["guessing", _guessing(results, "held_out"), "", _guessing(results, "held_in"), "", "", ""])
    models = [index for index, (_, candidate) in enumerate(shown) if candidate.kind != "reference"]
    strong = {
        (row, column)
        for column, scope in ((1, "held_out"), (3, "held_in"))
        for row in _largest([(index, getattr(shown[index][1].mean, scope)) for index in models])
    }
    return Grid("Mean accuracy ± standard error", headers, rows, frozenset(strong), _OVERVIEW_NOTE)


def _guessing(results: Results, scope: Scope) -> str:
    chance = results.chance(scope)
    return "" if chance is None else percent(chance)


_OVERVIEW_NOTE = (
    "Each task counts once. “vs base” is the difference in percentage points with its 95 % interval. "
    "The highest model of a column is bold; the two rows about experts are references, not single models."
)


def _largest(cells: Iterable[tuple[int, Estimate | None]]) -> list[int]:
    known = [(cell.value, index) for index, cell in cells if cell is not None]
    return [index for value, index in known if value == max(known)[0]]


def _against_base(results: Results, name: str, scope: Scope) -> str:
    effect = results.effect(name, "base", scope)
    return "" if effect is None else f"{points(effect.difference)} ({interval(effect)})"


def interval(effect: Effect) -> str:
    return f"{points(effect.low)} to {points(effect.high)}"


def estimate(mean: Estimate | None) -> str:
    return "" if mean is None else f"{percent(mean.value)} ± {100 * mean.stderr:.1f}"


def _verdict(effect: Effect) -> str:
    if effect.p_holm < 0.05:
        return "clear"
    return "clear alone" if effect.is_clear else "not clear"


def differences(results: Results, candidate: str, scope: Scope) -> Grid:
    """One candidate against all others."""
    effects = [effect for effect in results.effects if (effect.candidate, effect.scope) == (candidate, scope)]
    rows = [
        [
            results.candidates[effect.reference].label,
            points(effect.difference),
            interval(effect),
            p_value(effect.p_holm),
            _verdict(effect),
            str(effect.n),
        ]
        for effect in effects
    ]
    label = results.candidates[candidate].label
    headers = [f"{label} minus …", "points", "95 % interval", "p (Holm)", "verdict", "examples"]
    note = (
        "Clear: p, adjusted for all comparisons on these tasks (Holm), is below 0.05. Clear alone: only the interval, which is "
        "adjusted for nothing, leaves out zero."
    )
    return Grid(f"How much better the {label} is, on {_tasks(scope)}", headers, rows, note=note)


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _tasks(scope: Scope) -> str:
    return {"held_out": "held-out tasks", "held_in": "held-in tasks", "all": "all tasks"}[scope]


def by_task(results: Results, *, held_in: bool) -> Grid:
    """Tasks × candidates without the single experts, with means in the last row."""
    tasks = [task for task, inside in results.tasks.items() if inside == held_in]
    shown = [candidate for candidate in results.candidates.values() if _has(candidate, tasks)]
    rows = []
    strong = set()
    for row, task in enumerate(tasks):
        scores = [candidate.tasks.get(task) for candidate in shown]
        first = next(entry.tasks[task] for entry in results.candidates.values() if task in entry.tasks)
        rows.append([task, str(first.n), _chance(first), *(_score(score) for score in scores)])
        known = [score.value for score, entry in zip(scores, shown, strict=True) if score and entry.kind != "reference"]
        strong |= {
            (row, 3 + column)
            for column, (score, entry) in enumerate(zip(scores, shown, strict=True))
            if score and known and entry.kind != "reference" and score.value == max(known)
        }
    scope: Scope = "held_in" if held_in else "held_out"
    rows.append(["mean", "", "", *(estimate(getattr(candidate.mean, scope)) for candidate in shown)])
    headers = ["task", "n", "chance", *(candidate.label for candidate in shown)]
    caption = "Held-in tasks: some expert was trained on them" if held_in else "Held-out tasks: zero-shot for everyone"
    return Grid(
        caption, headers, rows, frozenset(strong), "Accuracy ± standard error; n examples; the best model is bold."
    )


def _has(candidate: CandidateResult, tasks: Sequence[str]) -> bool:
    return candidate.kind != "expert" and any(task in candidate.tasks for task in tasks)


def _chance(score: Score) -> str:
    return "" if score.chance is None else percent(score.chance)


def _score(score: Score | None) -> str:
    return "" if score is None else f"{percent(score.value)} ± {100 * score.stderr:.1f}"


def experts(results: Results) -> Grid | None:
    """Every expert alone: on its own task, next to the base and to the average there, and its means."""
    alone = [candidate for name, candidate in results.candidates.items() if name.startswith("expert:")]
    if not alone:
        return None
    beside = [results.candidates[name] for name in ("base", "average") if name in results.candidates]
    rows = [
        [
            candidate.own_task or "",
            _score(candidate.tasks.get(candidate.own_task or "")),
            *(_score(other.tasks.get(candidate.own_task or "")) for other in beside),
            estimate(candidate.mean.held_out),
            estimate(candidate.mean.held_in),
        ]
        for candidate in alone
    ]
    headers = ["expert", "on its own task", *(f"{other.label} there" for other in beside), "held-out", "held-in"]
    note = "What merging costs on a task is the distance between the expert and the average there."
    return Grid("Experts alone", headers, rows, note=note)


def costs(results: Results) -> Grid | None:
    """Training effort by kind of job, and all together."""
    if not results.costs:
        return None
    stages: dict[str, list[Cost]] = {}
    for cost in results.costs:
        stages.setdefault(cost.name.partition(":")[0], []).append(cost)
    rows = [[stage, *_sum(jobs)] for stage, jobs in stages.items()]
    rows.append(["all", *_sum(results.costs)])
    headers = ["jobs of", "jobs", "steps", "examples", "tokens", "seconds"]
    return Grid("Training effort", headers, rows, note="Seconds are of computing, added up over participants.")


def candidate_costs(results: Results) -> Grid | None:
    """What each candidate cost, with everything in its lineage."""
    if not results.costs or not results.lineage:
        return None
    nodes = {node.digest: node for node in results.lineage}
    by_name = {cost.name: cost for cost in results.costs}
    rows = []
    for candidate in results.candidates.values():
        if candidate.digest in nodes and candidate.kind != "expert":
            names = {nodes[digest].name for digest in _ancestry(candidate.digest or "", nodes)}
            rows.append([candidate.label, *_sum([by_name[name] for name in sorted(names & set(by_name))])])
    headers = ["candidate", "jobs", "steps", "examples", "tokens", "seconds"]
    note = "Every training job in the candidate's lineage counts once: its experts, and their seed."
    return Grid("Effort behind each candidate", headers, rows, note=note) if rows else None


def _ancestry(digest: str, nodes: dict[str, LineageNode]) -> set[str]:
    found: set[str] = set()
    waiting = [digest]
    while waiting:
        current = waiting.pop()
        if current in nodes and current not in found:
            found.add(current)
            waiting.extend(nodes[current].parents)
    return found


def _sum(jobs: Sequence[Cost]) -> list[str]:
    total = [len(jobs), *(sum(getattr(job, field) for job in jobs) for field in ("steps", "examples", "tokens"))]
    return [*(f"{value:,}" if value else "" for value in total), f"{sum(job.seconds for job in jobs):,.0f}"]


@dataclass(frozen=True, slots=True)
class Generation:
    """Adapters that were made from the same parents, and what was made from them."""

    nodes: Sequence[LineageNode]
    children: Sequence[Generation]


def lineage(results: Results) -> list[Generation]:
    """The family tree from the first adapters down to the merges, siblings together."""
    groups: dict[tuple[str, ...], list[LineageNode]] = {}
    for node in results.lineage:
        groups.setdefault(node.parents, []).append(node)
    known = {node.digest for node in results.lineage}

    def below(members: Sequence[LineageNode]) -> list[Generation]:
        digests = {member.digest for member in members}
        keys = [key for key in groups if next((parent for parent in key if parent in known), None) in digests]
        return [Generation(groups[key], below(groups[key])) for key in keys]

    roots = [key for key in groups if not known & set(key)]
    members = [split for key in roots for split in _by_family(groups[key])]
    return [Generation(group, below(group)) for group in members]


def _by_family(nodes: Sequence[LineageNode]) -> list[list[LineageNode]]:
    """Adapters without parents share nothing: split them by what they are for."""
    families: dict[str, list[LineageNode]] = {}
    for node in nodes:
        families.setdefault(node.name.partition(":")[0], []).append(node)
    return list(families.values())


def settings(results: Results) -> Grid:
    """The configuration as dotted paths."""
    return Grid("Settings", ["setting", "value"], [list(row) for row in _flat(results.config, "")])


def versions(results: Results) -> Grid:
    return Grid("Versions", ["package", "version"], [list(row) for row in sorted(results.versions.items())])


def _flat(value: object, path: str) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [row for key, inner in value.items() for row in _flat(inner, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list | tuple):
        return [(path, ", ".join(str(item) for item in value))]
    return [(path, "" if value is None else str(value))] if path else []


_DIAGNOSTICS = {
    "factor_gap_seeded": (
        "Averaging A and B apart instead of their products is off by {value} of the exact mean, for the seeded experts."
    ),
    "factor_gap_tuned": "The same for the routing-tuned experts: {value}.",
    "factor_gap_unseeded": "The same for experts that never shared a seed: {value}.",
}


_ORDER = "order_sensitivity_"


def diagnostics(results: Results) -> list[str]:
    """Each diagnostic as a sentence."""
    return [_diagnostic(results, name, value) for name, value in results.diagnostics.items()]


def _diagnostic(results: Results, name: str, value: float) -> str:
    if name in _DIAGNOSTICS:
        return _DIAGNOSTICS[name].format(value=percent(value))
    if name.startswith(_ORDER):
        candidate = results.candidates.get(name.removeprefix(_ORDER))
        label = candidate.label if candidate is not None else name.removeprefix(_ORDER)
        return f"Folding the adapters in in another order changes “{label}” by {percent(value)} of its size."
    return f"{name}: {value:.4g}"
