"""Write and re-write the report of a run, and sum it up for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from seedbed.common.files import atomic_write
from seedbed.server.evaluation import tables
from seedbed.server.evaluation.results import Outcomes, Results, Scope, load, save

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
    """Candidates and their mean accuracies, for a terminal of 80 columns; the highest model of a column has a star.

    The interval is that of the difference from the base, on held-out tasks where there are some.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    grid = tables.overview(results)
    # Neither a frame nor % signs: that is what lets six columns stand in 80 without a line break.
    table = Table(title="Mean accuracy in % ± standard error", title_justify="left", box=box.SIMPLE_HEAD)
    table.show_edge = table.pad_edge = False
    table.collapse_padding = True
    held_out, held_in, rank = (grid.headers.index(header) for header in ("held-out", "held-in", "rank"))
    scope: Scope = "held_in" if all(results.tasks.values()) else "held_out"
    beside = 3 if scope == "held_in" else 2
    for header in _beside(beside, ["candidate", "held-out", "held-in", "rank", "steps"], "vs base, 95 %"):
        table.add_column(header, justify="left" if header == "candidate" else "right")
    against, steps = _against_base(results, scope), _steps(results)
    for row, cells in enumerate(grid.rows):
        means = [_mean(cells[column], starred=(row, column) in grid.strong) for column in (held_out, held_in)]
        line = [escape(cells[0]), *means, cells[rank], steps.get(cells[0], "")]
        table.add_row(*_beside(beside, line, against.get(cells[0], "")))
    return table


def _beside(place: int, cells: list[str], inserted: str) -> list[str]:
    return [*cells[:place], inserted, *cells[place:]]


def _mean(cell: str, *, starred: bool) -> str:
    bare = cell.replace(" %", "")
    return f"[bold]*{bare}[/]" if starred else bare


def _against_base(results: Results, scope: Scope) -> dict[str, str]:
    """Interval of each candidate's difference from the base, in points, by label."""
    effects = [effect for effect in results.effects if (effect.reference, effect.scope) == ("base", scope)]
    return {results.candidates[effect.candidate].label: tables.interval(effect) for effect in effects}


def _steps(results: Results) -> dict[str, str]:
    """Optimizer steps behind each candidate, with everything in its lineage, by label."""
    grid = tables.candidate_costs(results)
    return {} if grid is None else {row[0]: row[grid.headers.index("steps")] for row in grid.rows}
