"""`report.md` of an ablation: the answer, every table, and how it was made."""

from __future__ import annotations

from seedbed.server.ablation import tables
from seedbed.server.ablation.effects import MEASURES
from seedbed.server.ablation.results import AblationResults
from seedbed.server.evaluation import beside
from seedbed.server.evaluation.blocks import opening_of
from seedbed.server.evaluation.markdown import plain, table, tree
from seedbed.server.evaluation.results import CandidateResult, Means, Results
from seedbed.server.evaluation.tables import Grid, lineage, settings, versions


def markdown(results: AblationResults) -> str:
    """The whole report."""
    first, rest = opening_of(results.answer)
    parts = [f"# {plain(results.name)}: which part earned how much", f"**{plain(first)}**"]
    parts += [plain(line) for line in rest.split("\n") if line]
    parts += [plain(results.plan.about)] if results.plan.about else []
    parts += [f"> {plain(note)}" for note in results.notes]
    parts += _section("Effects", [tables.effects(results, measure) for measure in MEASURES])
    parts += _section("Missing", [tables.missing(results)])
    parts += _section("Curves", [tables.curve(results, *row) for row in tables.numbered(results)])
    parts += _section("Two parts at once", crosses(results))
    parts += _section("Cells", [tables.means(results), tables.cells(results)])
    parts += _section("Tasks", [tables.by_task(results), tables.task_facts(results)])
    parts += _section("Routers", [beside.routers(as_results(results))])
    parts += _section("Effort", [tables.costs(results)])
    if results.lineage:
        parts += ["## Lineage", "\n".join(tree(lineage(as_results(results)), 0))]
    return "\n\n".join([*parts, "## How it was made", *_making(results)]) + "\n"


def _section(title: str, grids: list[Grid | None]) -> list[str]:
    found = [table(grid) for grid in grids if grid is not None and grid.rows]
    return [f"## {title}", *found] if found else []


def crosses(results: AblationResults) -> list[Grid | None]:
    """Cross tables of the rows that vary two things, for every measure."""
    return [tables.cross(results, row, measure) for row in results.plan.rows for measure in MEASURES]


def as_results(results: AblationResults) -> Results:
    """Routers, lineage and making in the shape that a federation's report has, so that its tables and figures can be used.

    Cells are called by their number there: their own names do not make ids of a page.
    """
    from seedbed.server.ablation.answer import label

    return Results(
        name=results.name,
        answer=results.answer,
        candidates={
            f"cell-{number}": CandidateResult(
                label=label(results, one.cell), kind="mixture", tasks={}, mean=Means(), routing=one.routing
            )
            for number, one in enumerate(results.cells.values())
            if one.routing is not None
        },
        lineage=results.lineage,
        config=results.config,
        versions=results.versions,
    )


def intervals_note(results: AblationResults) -> str:
    """How the numbers were computed."""
    return (
        "Effects are paired by task, random seed and example; each task counts once. Intervals are 95 %: of a bootstrap over "
        "examples, stratified by task, plus the standard error over random seeds times a Student t of one degree of freedom "
        "less than there are seeds (Behrens-Fisher), and never narrower than from examples alone; so few seeds give wide "
        "intervals. p is two-sided, from the same distributions, and adjusted for all comparisons of a measure (Holm). Tasks "
        "count as fixed: nothing is said of other tasks. Per-example outcomes are in ablation_outcomes.json."
    )


def _making(results: AblationResults) -> list[str]:
    parts = [f"Command: `{results.command}`"] if results.command else []
    if results.base is not None:
        parts.append(f"Base model: {plain(results.base.name)}, `{results.base.digest}`")
    parts.append(f"Plan: {plain(results.plan.name)}, configuration {plain(results.plan.config)}, full method "
                 f"{plain(results.plan.full)}.")  # fmt: skip
    parts.append(intervals_note(results))
    own = as_results(results)
    return parts + [table(grid) for grid in (versions(own), settings(own)) if grid.rows]
