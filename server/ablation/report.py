"""From what was measured to the report of an ablation, and a summary for a terminal.

results = write_ablation(plan, outcomes, out_dir, command)     ablation.json, outcomes, report.md, report.html
print(summary(results))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seedbed.common.files import atomic_write
from seedbed.common.routing.diagnostics import LayerDiagnostics, pooled
from seedbed.common.routing.settings import CONSTANT
from seedbed.server.ablation.answer import answer, interval, label, signed
from seedbed.server.ablation.effects import (
    FULL,
    MEASURES,
    Measure,
    Missing,
    Observations,
    PartEffect,
    effects,
    mean_of,
    observations,
)
from seedbed.server.ablation.results import (
    AblationResults,
    CellCost,
    CellResult,
    TaskMean,
    load,
    load_outcomes,
    save,
)
from seedbed.server.ablation.values import CellOutcome, Plan, SeedOutcome
from seedbed.server.evaluation.compare import Circumstances
from seedbed.server.evaluation.report import HTML, MARKDOWN
from seedbed.server.evaluation.results import RouterUse
from seedbed.server.evaluation.statistics import seeded_mean

if TYPE_CHECKING:
    from rich.console import Group


def write_ablation(
    plan: Plan,
    outcomes: Sequence[CellOutcome],
    out_dir: Path,
    command: str,
    circumstances: Circumstances | None = None,
) -> AblationResults:
    """Compute all effects and write `ablation.json`, `ablation_outcomes.json`, `report.md` and `report.html`.

    Args:
        outcomes: of every cell, the full method (`full`) among them; their order is that of the tables and changes no number.
        command: that made it.
        circumstances: base model, lineage, configuration, versions and notes, where they are known.

    Raises:
        StorageError: if a file cannot be written.
    """
    about = circumstances or Circumstances()
    observed = observations(outcomes)
    found, missing = effects([outcome.cell for outcome in outcomes], observed)
    results = AblationResults(
        name=plan.name,
        answer="",
        command=command or about.command,
        plan=plan,
        cells={outcome.cell.name: _cell(outcome, observed) for outcome in outcomes},
        effects=tuple(found),
        missing=tuple(missing),
        notes=(*_notes(outcomes, found), *about.notes),
        base=about.base,
        lineage=tuple(about.lineage),
        config=dict(about.config),
        versions=dict(about.versions),
    )
    results = results.model_copy(update={"answer": answer(results)})
    save(out_dir, results, observed)
    _draw(results, out_dir)
    return results


def render(directory: Path) -> AblationResults:
    """Write `report.md` and `report.html` again from `ablation.json`.

    Raises:
        DataError: if there is no `ablation.json` of this schema.
        StorageError: if the report cannot be written.
    """
    results = load(directory)
    _draw(results, directory)
    return results


def recompute(directory: Path) -> tuple[list[PartEffect], list[Missing]]:
    """All effects from the per-example outcomes of a finished ablation: equal to those of `ablation.json`.

    Raises:
        DataError: if a file is missing, damaged or of another schema.
    """
    cells = [one.cell for one in load(directory).cells.values()]
    return effects(cells, load_outcomes(directory))


def _draw(results: AblationResults, out_dir: Path) -> None:
    from seedbed.server.ablation.markdown import markdown
    from seedbed.server.ablation.page import page

    atomic_write(out_dir / MARKDOWN, markdown(results).encode())
    atomic_write(out_dir / HTML, page(results).encode())


def summary(results: AblationResults) -> Group:
    """The answer, the effects of every measure and what failed, for a terminal of 80 columns."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from seedbed.server.ablation.tables import NAMES, amount, failures, verdict
    from seedbed.server.evaluation.tables import p_value

    tables = []
    for measure in MEASURES:
        found = results.of_measure(measure)
        if not found:
            continue
        title = f"{NAMES[measure]}: full method minus cell"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.show_edge = table.pad_edge = False
        table.collapse_padding = True
        for header in ("cell", "cell's", "effect", "95 %", "p (Holm)", ""):
            table.add_column(header, justify="left" if header == "cell" else "right", overflow="fold")
        for effect in found:
            p = "" if effect.same else p_value(effect.p_holm)
            name = escape(label(results, results.cells[effect.cell].cell))
            cells = (amount(measure, effect.value), signed(measure, effect.difference), interval(effect), p)
            mark = "=" if effect.same else "*" if verdict(effect) == "clear" else ""
            table.add_row(name, *cells, mark)
        tables.append(table)
    failed = [Text(f"Failed: {cell}, random seed {seed}: {reason}") for cell, seed, reason in failures(results)]
    return Group(
        Text(results.answer),
        *(part for table in tables for part in (Text(""), table)),
        *([Text("")] if failed else []),
        *failed,
    )


def _cell(outcome: CellOutcome, observed: Observations) -> CellResult:
    seeds = {seed: outcome.seeds[seed] for seed in sorted(outcome.seeds)}
    found = {measure: mean_of(observed[outcome.cell.name], measure) for measure in MEASURES}
    means: dict[Measure, object] = {measure: mean for measure, mean in found.items() if mean is not None}
    return CellResult.model_validate(
        {
            "cell": outcome.cell,
            "digests": {seed: one.digest for seed, one in seeds.items()},
            "failures": outcome.failures,
            "means": means,
            "tasks": _tasks(seeds),
            "cost": _cost(seeds.values()),
            "routing": _routing([one.routing for one in seeds.values() if one.routing is not None]),
        }
    )


def _tasks(seeds: Mapping[int, SeedOutcome]) -> dict[str, TaskMean]:
    """Of the tasks that all seeds have, with the same number of examples."""
    scores = [{score.task: score for score in one.scores} for one in seeds.values()]
    found = {}
    for name, first in (scores[0] if scores else {}).items():
        group = [by_task[name] for by_task in scores if name in by_task and by_task[name].n == first.n]
        if len(group) == len(scores):
            value, spread = seeded_mean({name: np.array([score.outcomes for score in group])})
            found[name] = TaskMean(
                metric=first.metric,
                value=value,
                stderr=spread.stderr,
                n=first.n,
                held_in=first.held_in,
                seen_by_seed=any(name in one.seen_by_seed for one in seeds.values()),
                chance=first.chance,
            )
    return found


def _cost(seeds: Iterable[SeedOutcome]) -> CellCost:
    found = list(seeds)
    return CellCost(
        trainings=sum(one.trainings for one in found),
        seconds=sum(one.seconds for one in found),
        tokens=sum(one.tokens for one in found),
        bytes_moved=sum(one.bytes_moved for one in found),
    )


def _routing(uses: Sequence[RouterUse]) -> RouterUse | None:
    """What the routers of all seeds did together; of the first alone, where the experts have other names."""
    if not uses:
        return None
    first = uses[0]
    alike = [use for use in uses if (use.names, use.kind) == (first.names, first.kind)]
    constant = first.kind in CONSTANT

    def together(parts: Iterable[Mapping[str, LayerDiagnostics]]) -> dict[str, LayerDiagnostics]:
        found = list(parts)
        names = [name for name in found[0] if all(name in part for part in found)]
        return {name: pooled([part[name] for part in found], constant=constant) for name in names}

    layers = together(use.layers for use in alike)
    collapsed = 2 * sum(layer.collapsed for layer in layers.values()) > len(layers)
    overall = pooled([use.overall for use in alike], constant=constant)
    return RouterUse(
        kind=first.kind,
        names=first.names,
        overall=overall.model_copy(update={"collapsed": collapsed}),
        tasks=together(use.tasks for use in alike),
        layers=layers,
    )


def _notes(outcomes: Sequence[CellOutcome], found: Sequence[PartEffect]) -> list[str]:
    """What a reader must know: how few seeds there are, what failed, which tasks a row is compared on."""
    counts = sorted({len(effect.seeds) for effect in found})
    notes = []
    if counts[:1] == [1]:
        who = "There is one random seed" if counts == [1] else "Some cells share one random seed with the full method"
        notes.append(
            f"{who}: intervals then say what other examples of the same tasks would have given, and nothing of other "
            "training runs."
        )
    elif counts and counts[0] <= 3:
        few = "Two" if counts[0] == 2 else "Three"
        notes.append(
            f"{few} random seeds say little of other training runs: intervals are wide, and only effects of many times the "
            "spread between seeds stand after a correction for many comparisons."
        )
    failed = [outcome for outcome in outcomes if outcome.failures]
    if failed:
        names = ", ".join(outcome.cell.name for outcome in failed)
        notes.append(f"Not every run succeeded ({names}); the section Missing has the reasons.")
    return notes + _left_out(outcomes, found)


def _left_out(outcomes: Sequence[CellOutcome], found: Sequence[PartEffect]) -> list[str]:
    """Rows whose cells differ in their tasks, and are compared on fewer than the full method has."""
    full = next((outcome for outcome in outcomes if outcome.cell.name == FULL), None)
    if full is None or not full.seeds:
        return []
    observed = observations([full])[FULL]
    rows: dict[tuple[str, Measure], tuple[int, int]] = {}
    for effect in found:
        whole = mean_of({seed: observed[seed] for seed in effect.seeds}, effect.measure)
        if whole is not None and len(effect.tasks) < whole.tasks:
            rows[effect.row, effect.measure] = (len(effect.tasks), whole.tasks)
    return [
        f"{row}: {measure.replace('_', '-')} is compared on {count} of {whole} tasks, which all its cells have."
        for (row, measure), (count, whole) in rows.items()
    ]
