"""The tables of an ablation's report as plain rows."""

from __future__ import annotations

from collections.abc import Sequence

from seedbed.server.ablation.answer import interval, label, plain, readable, signed, unit
from seedbed.server.ablation.effects import FULL, LOWER_IS_BETTER, MEASURES, MeanOf, Measure, PartEffect
from seedbed.server.ablation.results import AblationResults, CellResult
from seedbed.server.ablation.values import Cell, Row
from seedbed.server.evaluation.answer import percent
from seedbed.server.evaluation.tables import DIGEST, Grid, p_value

NAMES: dict[Measure, str] = {
    "held_out": "held-out accuracy",
    "held_in": "held-in accuracy",
    "retention": "retention",
    "kl": "KL to the base",
    "perplexity": "perplexity",
}


def effects(results: AblationResults, measure: Measure) -> Grid | None:
    """Full method minus every cell, in the order of the plan; none where nothing was compared."""
    found = results.of_measure(measure)
    if not found:
        return None
    rows = [
        [
            label(results, results.cells[effect.cell].cell),
            signed(measure, effect.difference),
            interval(effect),
            "" if effect.same else p_value(effect.p_holm),
            verdict(effect),
            amount(measure, effect.full),
            amount(measure, effect.value),
            str(len(effect.seeds)),
            str(len(effect.tasks)),
            str(effect.n),
        ]
        for effect in found
    ]
    strong = frozenset((row, 1) for row, effect in enumerate(found) if effect.is_clear)
    headers = ["cell", f"full − cell{unit(measure) and ','}{unit(measure)}", "95 % interval", "p (Holm)", "verdict"]
    headers += ["full", "cell", "seeds"]
    if measure in LOWER_IS_BETTER:
        headers, rows = [*headers, "texts"], [[*row[:-2], row[-1]] for row in rows]
    else:
        headers += ["tasks", "examples"]
    return Grid(f"Effects on {NAMES[measure]}", headers, rows, strong, f"{_MEANING[measure]} {_VERDICTS}")


_MEANING: dict[Measure, str] = {
    "held_out": "Tasks that neither an expert nor the seed was trained on. Positive: the part earned so much.",
    "held_in": "The experts' own tasks. Positive: the part earned so much.",
    "retention": (
        "Accuracy as a share of the accuracy of the task's own expert alone, mean over held-in tasks; what the expert "
        "reaches counts as given. Positive: the part earned so much."
    ),
    "kl": "Nats a token on general text; lower is better. Negative: the part keeps the model closer to its base.",
    "perplexity": "On general text; lower is better. Negative: the part keeps it low.",
}
_VERDICTS = (
    "Clear: p, adjusted for all comparisons of this table (Holm), is below 0.05. Clear alone: only the interval, which is "
    "adjusted for nothing, leaves out zero."
)


def verdict(effect: PartEffect) -> str:
    if effect.same:
        return "the full method"
    if effect.is_clear:
        return "clear"
    return "clear alone" if effect.excludes_zero else "not clear"


def amount(measure: Measure, value: float) -> str:
    """A measure itself, with its unit where it is a share."""
    return plain(measure, value) if measure in LOWER_IS_BETTER else percent(value)


def mean(measure: Measure, found: MeanOf | None) -> str:
    return "" if found is None else f"{amount(measure, found.value)} ± {plain(measure, found.stderr)}"


def measured(results: AblationResults) -> list[Measure]:
    """Measures that some cell has."""
    return [measure for measure in MEASURES if any(measure in cell.means for cell in results.cells.values())]


def means(results: AblationResults) -> Grid:
    """Every cell with its means, numbered as in the scatter plots."""
    shown = measured(results)
    rows = [
        [
            f"{number} {label(results, cell.cell)}",
            *(mean(measure, cell.means.get(measure)) for measure in shown),
            str(len(cell.digests)),
        ]
        for number, cell in enumerate(results.cells.values())
    ]
    note = (
        "Mean ± standard error, over examples and (with several) over random seeds; each task counts once, and every cell "
        "has its own tasks. The effects compare equal tasks, example by example."
    )
    return Grid("Every cell", ["cell", *(NAMES[measure] for measure in shown), "seeds"], rows, note=note)


def tasks(results: AblationResults) -> list[str]:
    """Held-in tasks of the full method first, then the others, in the order of measuring."""
    found: dict[str, bool] = {}
    for cell in _full_first(results):
        for name, task in cell.tasks.items():
            found.setdefault(name, task.held_in)
    return sorted(found, key=lambda name: not found[name])


def held_in_count(results: AblationResults) -> int:
    """How many of `tasks` are held in."""
    first = _full_first(results)
    return sum(next(cell.tasks[name].held_in for cell in first if name in cell.tasks) for name in tasks(results))


def _full_first(results: AblationResults) -> list[CellResult]:
    return sorted(results.cells.values(), key=lambda cell: cell.cell.name != FULL)


def task_facts(results: AblationResults) -> Grid:
    """Every task: who was trained on it, and what guessing gives."""
    rows = []
    for name in tasks(results):
        holders = [cell for cell in _full_first(results) if name in cell.tasks]
        task = holders[0].tasks[name]
        others = [one.tasks[name] for one in holders]
        rows.append(
            [
                name,
                _everywhere([one.held_in for one in others], "an expert"),
                _everywhere([one.seen_by_seed for one in others], "the seed"),
                task.metric,
                str(task.n),
                "" if task.chance is None else percent(task.chance),
            ]
        )
    headers = ["task", "experts", "seed", "metric", "examples", "guessing"]
    note = "Experts, seed: whether an expert, or the seed adapter, was trained on the task's data, in all cells or in some."
    return Grid("Tasks", headers, rows, note=note)


def _everywhere(flags: Sequence[bool], who: str) -> str:
    return ("trained on it" if all(flags) else f"{who} in some cells") if any(flags) else "no"


def by_task(results: AblationResults) -> Grid:
    """Cells × tasks."""
    names = tasks(results)
    rows = [
        [label(results, cell.cell), *(_task(cell, name) for name in names)]
        for cell in results.cells.values()
        if cell.tasks
    ]
    return Grid("Cells × tasks", ["cell", *names], rows, note="Accuracy ± standard error over examples and seeds.")


def _task(cell: CellResult, name: str) -> str:
    task = cell.tasks.get(name)
    return "" if task is None else f"{percent(task.value)} ± {100 * task.stderr:.1f}"


def numbered(results: AblationResults) -> list[tuple[Row, list[Cell]]]:
    """Rows of two or more cells whose values are numbers, with those cells by value: what curves are drawn of."""
    found = []
    for row in results.plan.rows:
        cells = [
            one.cell for one in results.cells.values() if one.cell.row == row.label and one.cell.number is not None
        ]
        if len(cells) > 1:
            found.append((row, sorted(cells, key=lambda cell: cell.number or 0.0)))
    return found


def curve_measures(results: AblationResults, cells: Sequence[Cell]) -> list[Measure]:
    """Measures that at least two of the cells were compared in."""
    return [
        measure
        for measure in MEASURES
        if sum(results.effect(cell.name, measure) is not None for cell in cells) > 1
    ]  # fmt: skip


def curve(results: AblationResults, row: Row, cells: Sequence[Cell]) -> Grid | None:
    """One row's cells by value, on the tasks that all of them have."""
    shown = curve_measures(results, cells)
    if not shown:
        return None
    rows = []
    for cell in cells:
        found = [results.effect(cell.name, measure) for measure in shown]
        rows.append([cell.value or f"{cell.number:g}", *(_point(effect) for effect in found)])
    return Grid(readable(row.label), [readable(row.label), *(NAMES[measure] for measure in shown)], rows, note=_CURVE)


_CURVE = "± standard error over examples and random seeds, on the tasks that all cells of the row have."


def _point(effect: PartEffect | None) -> str:
    if effect is None:
        return ""
    return f"{amount(effect.measure, effect.value)} ± {plain(effect.measure, effect.value_stderr)}"


def cross(results: AblationResults, row: Row, measure: Measure) -> Grid | None:
    """First × second value of a row that varies two things at once; none for other rows."""
    pairs = two_parts(results, row)
    found = {pair: effect for name, pair in pairs.items() if (effect := results.effect(name, measure)) is not None}
    if not found:
        return None
    firsts, seconds = (list(dict.fromkeys(pair[side] for pair in pairs.values())) for side in (0, 1))
    rows = [[first, *(_crossed(found.get((first, second))) for second in seconds)] for first in firsts]
    strong = {(firsts.index(pair[0]), 1 + seconds.index(pair[1])) for pair, effect in found.items() if effect.is_clear}
    note = "Of the cell, and in brackets full method minus cell; bold where that is clear after Holm's correction."
    return Grid(
        f"{readable(row.label)}: {NAMES[measure]}", [readable(row.label), *seconds], rows, frozenset(strong), note
    )


def _crossed(effect: PartEffect | None) -> str:
    if effect is None:
        return ""
    return f"{amount(effect.measure, effect.value)} ({signed(effect.measure, effect.difference)})"


def two_parts(results: AblationResults, row: Row) -> dict[str, tuple[str, str]]:
    """Cell -> its two values, of a row of two parts in which both take several values."""
    if len(row.part) != 2:
        return {}
    values = {name: one.cell.value.split(", ") for name, one in results.cells.items() if one.cell.row == row.label}
    pairs = {name: (parts[0], parts[1]) for name, parts in values.items() if len(parts) == 2}
    sides = [{pair[side] for pair in pairs.values()} for side in (0, 1)]
    return pairs if min(map(len, sides)) > 1 else {}


def cells(results: AblationResults) -> Grid:
    """What every cell is, by the configuration."""
    rows = [
        [
            label(results, one.cell),
            one.cell.candidate,
            ", ".join(f"seed {seed}: {_short(one.cell, digest)}" for seed, digest in one.digests.items()),
            ", ".join(one.cell.changes) or "none",
        ]
        for one in results.cells.values()
    ]
    note = f"Changes: on top of {results.plan.config}{_given(results)}. Digests of the measured candidates, shortened."
    return Grid("What every cell is", ["cell", "candidate", "digests", "changes"], rows, note=note)


def _short(cell: Cell, digest: str | None) -> str:
    if digest is None:
        return "base model" if cell.candidate == "base" else "from the scores of several"
    return digest[:DIGEST]


def _given(results: AblationResults) -> str:
    return f" with {', '.join(results.plan.changes)}" if results.plan.changes else ""


def costs(results: AblationResults) -> Grid | None:
    """What every cell cost with everything in its lineage."""
    rows = [
        [
            label(results, one.cell),
            str(one.cost.trainings),
            f"{one.cost.seconds:,.0f}",
            f"{one.cost.tokens:,}",
            f"{one.cost.bytes_moved:,}",
        ]
        for one in results.cells.values()
        if one.digests
    ]
    note = (
        "Over all random seeds, with everything in a cell's lineage. What cells share counts in each of them but was made "
        "once, so the rows do not add up to what the plan cost."
    )
    headers = ["cell", "trainings", "seconds", "tokens", "bytes moved"]
    return (
        Grid("What every cell cost", headers, rows, note=note)
        if any(_has_cost(one) for one in results.cells.values())
        else None
    )


def _has_cost(cell: CellResult) -> bool:
    return bool(cell.cost.trainings or cell.cost.seconds or cell.cost.tokens or cell.cost.bytes_moved)


def failures(results: AblationResults) -> list[tuple[str, int, str]]:
    """Label, random seed and reason of every run of a cell that gave nothing."""
    return [
        (label(results, one.cell), seed, reason)
        for one in results.cells.values()
        for seed, reason in one.failures.items()
    ]


def missing(results: AblationResults) -> Grid | None:
    """Runs that failed and comparisons that could not be made, with their reasons."""
    rows = [[cell, f"seed {seed}", reason] for cell, seed, reason in failures(results)]
    rows += [[label(results, results.cells[one.cell].cell), NAMES[one.measure], one.reason] for one in results.missing]
    return Grid("What is missing", ["cell", "of", "reason"], rows) if rows else None
