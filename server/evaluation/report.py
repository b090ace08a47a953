"""Write and re-write the report of a run, and sum it up for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from seedbed.common.files import atomic_write
from seedbed.server.evaluation import tables
from seedbed.server.evaluation.results import Outcomes, Results, load, save

if TYPE_CHECKING:
    from rich.table import Table

MARKDOWN = "report.md"
HTML = "report.html"


def write_report(results: Results, outcomes: Outcomes, out_dir: Path) -> None:
    """Write `results.json`, `outcomes.json`, `report.md` and `report.html`. Equal results give equal bytes.

    Raises:
        StorageError: if they cannot be written.
    """
    save(out_dir, results, outcomes)
    _draw(results, out_dir)


def render(run_dir: Path) -> Results:
    """Write `report.md` and `report.html` again from `results.json`.

    Raises:
        DataError: if there is no `results.json` of this schema.
        StorageError: if the report cannot be written.
    """
    results = load(run_dir)
    _draw(results, run_dir)
    return results


def _draw(results: Results, out_dir: Path) -> None:
    from seedbed.server.evaluation.markdown import markdown
    from seedbed.server.evaluation.page import page

    atomic_write(out_dir / MARKDOWN, markdown(results).encode())
    atomic_write(out_dir / HTML, page(results).encode())


def summary_table(results: Results) -> Table:
    """Candidates and their mean accuracies, for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    grid = tables.overview(results)
    table = Table(title=grid.caption, title_justify="left")
    for place, header in enumerate(grid.headers[:5]):
        table.add_column(header, justify="right" if place else "left")
    for row, cells in enumerate(grid.rows):
        shown = [
            f"[bold]{escape(cell)}[/]" if (row, place) in grid.strong else escape(cell)
            for place, cell in enumerate(cells)
        ]
        table.add_row(*shown[:5])
    return table
