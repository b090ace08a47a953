"""A forecast for a terminal: cells, trainings, and one sentence of totals."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from seedbed.server.ablation.forecast import Forecast


def tables(found: Forecast) -> Group:
    """A forecast for a terminal."""
    times = "from the ledger" if found.measured else "by a rule of thumb for this model"
    total = "unknown until something was trained here" if found.seconds is None else _minutes(found.seconds)
    text = (
        f"{len(found.cells)} cells in {found.configurations} configurations, {_seeds(found.seeds)}: "
        f"{found.distinct} distinct trainings instead of {found.alone} cell by cell, {found.cached} of them done. "
        f"{found.scores} scores (a model on a task), {found.scores_cached} of them done. "
        f"Estimated time: {total}"
    )
    text += "." if found.seconds is None else f" with {found.workers} workers, {times}."
    other = [f"Nothing that is there counts: {found.other}. Name another --out."] if found.other else []
    return Group(_cell_table(found), _training_table(found), _combined_table(found), *other, text)


def _cell_table(found: Forecast) -> Table:
    table = Table(title=f"{found.plan.name}: cells", title_justify="left")
    for column in ("row", "cell", "trainings", "new"):
        table.add_column(column, justify="right" if column in ("trainings", "new") else "left")
    before = ""
    for needs in found.cells:
        cell = needs.variant.cell
        name = f"{cell.name} (as full)" if cell.is_full else cell.name
        table.add_row(cell.row if cell.row != before else "", name, str(needs.trainings), str(needs.new))
        before = cell.row
    return table


def _training_table(found: Forecast) -> Table:
    table = Table(title="trainings", title_justify="left")
    for column in ("kind", "distinct", "done", "steps to go", "time of one worker"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in found.trainings:
        time = "-" if row.seconds is None else _minutes(row.seconds)
        table.add_row(row.kind, str(row.distinct), str(row.cached), str(row.steps), time)
    return table


def _combined_table(found: Forecast) -> Table:
    table = Table(title="merges, routers, scores", title_justify="left")
    for column in ("kind", "distinct", "done"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in found.combined:
        table.add_row(row.kind, str(row.distinct), str(row.cached))
    table.add_row("score (a model on a task)", str(found.scores), str(found.scores_cached))
    return table


def _seeds(count: int) -> str:
    return "one random seed" if count == 1 else f"{count} random seeds"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
