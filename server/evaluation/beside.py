"""What a report tells beside accuracy: drift on general text, what routing tuning changed, and what routers did."""

from __future__ import annotations

from collections.abc import Sequence

from seedbed.server.evaluation.answer import percent, points
from seedbed.server.evaluation.results import CandidateResult, Results, RouterUse
from seedbed.server.evaluation.tables import Grid, interval

_MEAN = "mean"


def general(results: Results) -> Grid | None:
    """Drift of every candidate that is one model, and the mean over the experts alone."""
    rows = [
        [candidate.label, *_drift([candidate])]
        for candidate in results.candidates.values()
        if candidate.general is not None and candidate.kind != "expert"
    ]
    for group, label in (("expert", "experts alone, mean"), ("tuned", "tuned experts alone, mean")):
        alone = _group(results, group)
        if alone and all(candidate.general is not None for candidate in alone.values()):
            rows.append([label, *_drift(list(alone.values()))])
    note = (
        "KL: divergence from the base model's predictions, in nats for each token, 0 is no change (± standard error over "
        "texts). Update: mean size of what the adapter adds to a layer's output."
    )
    headers = ["candidate", "KL to the base", "perplexity", "update"]
    return Grid("On general text, which has nothing to do with the tasks", headers, rows, note=note) if rows else None


def _drift(candidates: Sequence[CandidateResult]) -> list[str]:
    found = [candidate.general for candidate in candidates if candidate.general is not None]
    kl = sum(drift.kl for drift in found) / len(found)
    perplexity = sum(drift.perplexity for drift in found) / len(found)
    norms = [drift.update_norm for drift in found if drift.update_norm is not None]
    error = f" ± {_number(found[0].kl_stderr)}" if len(found) == 1 and kl else ""
    update = _number(sum(norms) / len(norms)) if len(norms) == len(found) else ""
    return [f"{_number(kl)}{error}", f"{perplexity:.2f}", update]


def tuning(results: Results) -> Grid | None:
    """Every expert trained plainly and under routing tuning, side by side, on its own task and on general text."""
    plain, tuned = _group(results, "expert"), _group(results, "tuned")
    tasks = [task for task in plain if task in tuned]
    if not tasks:
        return None
    rows = [[task, *_accuracies(plain[task], tuned[task], task), *_silence(plain[task], tuned[task])] for task in tasks]
    rows.append([_MEAN, *_tuning_means([plain[task] for task in tasks], [tuned[task] for task in tasks], tasks)])
    effect = results.effect("tuned:own", "experts:own", "held_in")
    told = ""
    if effect is not None:
        told = (
            f" Tuned minus plain, own task, mean over tasks: {points(effect.difference)} points ({interval(effect)})."
        )
    headers = ["expert", "own task", "tuned", "KL", "tuned", "update", "tuned"]
    note = f"Each pair: trained plainly, and with routing tuning. KL and update are on general text.{told}"
    return Grid("What routing tuning changed", headers, rows, note=note)


def _tuning_means(
    plain: Sequence[CandidateResult], tuned: Sequence[CandidateResult], tasks: Sequence[str]
) -> list[str]:
    cells = []
    for group in (plain, tuned):
        values = [one.tasks[task].value for one, task in zip(group, tasks, strict=True) if task in one.tasks]
        cells.append(percent(sum(values) / len(values)) if len(values) == len(tasks) else "")
    drifts = [[one.general for one in group if one.general is not None] for group in (plain, tuned)]
    whole = all(len(group) == len(tasks) for group in drifts)
    kls = [_number(sum(one.kl for one in group) / len(group)) if whole else "" for group in drifts]
    norms = [[one.update_norm for one in group if one.update_norm is not None] for group in drifts]
    sizes = [_number(sum(group) / len(group)) if len(group) == len(tasks) else "" for group in norms]
    return [*cells, *kls, *sizes]


def _accuracies(plain: CandidateResult, tuned: CandidateResult, task: str) -> list[str]:
    return [percent(one.tasks[task].value) if task in one.tasks else "" for one in (plain, tuned)]


def _silence(plain: CandidateResult, tuned: CandidateResult) -> list[str]:
    drifts = [candidate.general for candidate in (plain, tuned)]
    kls = ["" if drift is None else _number(drift.kl) for drift in drifts]
    norms = ["" if drift is None or drift.update_norm is None else _number(drift.update_norm) for drift in drifts]
    return [*kls, *norms]


def routers(results: Results) -> Grid | None:
    """How sure each router is and how it spreads the load, over all tasks and layers."""
    rows = [[results.candidates[name].label, *_use(use)] for name, use in used(results).items()]
    note = (
        "Entropy: of the probabilities of a token, 100 % is an even spread over all experts. Most and least used: mean "
        "probability over tokens and layers. Collapsed layers: one expert is the likeliest on more than 90 % of the tokens, or "
        "half of the experts never are."
    )
    headers = ["router", "entropy", "largest p", "most used", "least used", "collapsed layers"]
    return Grid("What the routers did", headers, rows, note=note) if rows else None


def _use(use: RouterUse) -> list[str]:
    load = use.overall.load
    most, least = load.index(max(load)), load.index(min(load))
    collapsed = sum(layer.collapsed for layer in use.layers.values())
    return [
        percent(use.overall.relative_entropy),
        percent(use.overall.max_probability),
        f"{use.names[most]} {percent(load[most])}",
        f"{use.names[least]} {percent(load[least])}",
        f"{collapsed} of {len(use.layers)}" + (": collapsed" if use.overall.collapsed else ""),
    ]


def loads(results: Results, name: str) -> Grid:
    """Which expert a router gives which task to: mean probability over tokens and layers."""
    use = used(results)[name]
    rows = [[task, *(percent(share) for share in layer.load)] for task, layer in use.tasks.items()]
    strong = {(row, 1 + layer.load.index(max(layer.load))) for row, layer in enumerate(use.tasks.values())}
    label = results.candidates[name].label
    return Grid(f"{label}: tasks × experts", ["task", *use.names], rows, frozenset(strong), "Mean probability.")


def used(results: Results) -> dict[str, RouterUse]:
    """Routers by the name of their candidate."""
    return {name: one.routing for name, one in results.candidates.items() if one.routing is not None}


def _group(results: Results, group: str) -> dict[str, CandidateResult]:
    """Single adapters of a group, by task."""
    alone = {name: one for name, one in results.candidates.items() if one.kind == "expert"}
    return {name.partition(":")[2]: one for name, one in alone.items() if name.startswith(f"{group}:")}


def _number(value: float) -> str:
    """Three or four decimals; what is smaller is said to be so."""
    if value == 0:
        return "0"
    if value < 0.0001:
        return "< 0.0001"
    return f"{value:.4f}" if value < 0.01 else f"{value:.3f}" if value < 100 else f"{value:.0f}"
