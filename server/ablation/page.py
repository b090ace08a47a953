"""`report.html` of an ablation: the answer, then effects, curves, cells, tasks, routers, and how all of it was made."""

from __future__ import annotations

from seedbed.server.ablation import plots, tables
from seedbed.server.ablation.effects import MEASURES, Measure
from seedbed.server.ablation.markdown import as_results, crosses, intervals_note
from seedbed.server.ablation.results import AblationResults
from seedbed.server.evaluation.blocks import document, escape, figure, header, optional, table
from seedbed.server.evaluation.page import lineage, routers
from seedbed.server.evaluation.tables import settings, versions


def page(results: AblationResults) -> str:
    """The whole report as an HTML document, which needs nothing else."""
    own = as_results(results)
    sections = [
        ("effects", "Effects", "".join(_effects(results, measure) for measure in MEASURES)),
        ("missing", "Missing", optional(tables.missing(results))),
        ("curves", "Curves", _curves(results)),
        ("crosses", "Two parts at once", "".join(map(optional, crosses(results)))),
        ("cells", "Cells", _scatters(results) + table(tables.means(results))),
        ("tasks", "Tasks", _tasks(results)),
        ("routers", "Routers", routers(own)),
        ("effort", "Effort", optional(tables.costs(results))),
        ("lineage", "Lineage", table(tables.cells(results)) + _family(lineage(own))),
        ("making", "How it was made", _making(results)),
    ]
    base = f" · base model {results.base.name}" if results.base is not None else ""
    head = header(f"Seedbed ablation{base}", results.name, results.answer, results.notes)
    about = f'<p class="more">{escape(results.plan.about)}</p>' if results.plan.about else ""
    return document(results.name, head + about, sections)


def _effects(results: AblationResults, measure: Measure) -> str:
    grid = tables.effects(results, measure)
    if grid is None:
        return ""
    drawn = ""
    if any(not effect.same for effect in results.of_measure(measure)):
        drawn = figure(plots.forest(results, measure), "Filled: clear after Holm's correction.")
    return f"<h3>{escape(grid.caption)}</h3>{drawn}{table(grid, caption=False)}"


def _curves(results: AblationResults) -> str:
    parts = []
    for row, cells in tables.numbered(results):
        grid = tables.curve(results, row, cells)
        if grid is not None:
            measures = tables.curve_measures(results, cells)
            drawn = "".join(figure(plots.curve(results, row, cells, measure)) for measure in measures)
            parts.append(f"<h3>{escape(grid.caption)}</h3>{drawn}{table(grid, caption=False)}")
    return "".join(parts)


def _scatters(results: AblationResults) -> str:
    pairs: tuple[tuple[Measure, Measure, str], ...] = (
        ("retention", "held_out", "Up and to the right is better."),
        ("kl", "retention", "Up and to the left is better."),
    )
    drawn = [(plots.scatter(results, across, up), told) for across, up, told in pairs]
    below = " The square is the full method; numbers as in the table below; bars are standard errors."
    return "".join(figure(svg, told + below) for svg, told in drawn if svg)


def _tasks(results: AblationResults) -> str:
    if not tables.tasks(results):
        return ""
    caption = "Accuracy in %. Left of the line: held-in tasks."
    drawn = figure(plots.heat_map(results), caption, wide=True)
    return drawn + table(tables.by_task(results)) + table(tables.task_facts(results))


def _family(tree: str) -> str:
    # Of many cells and seeds it is long, and few read it.
    return f"<details><summary>Family tree of all adapters</summary>{tree}</details>" if tree else ""


def _making(results: AblationResults) -> str:
    parts = [f"<pre><code>{escape(results.command)}</code></pre>"] if results.command else []
    if results.base is not None:
        digest = f", <code>{escape(results.base.digest)}</code>" if results.base.digest else ""
        parts.append(f'<p class="note">Base model: {escape(results.base.name)}{digest}</p>')
    plan = f"Plan {results.plan.name}, configuration {results.plan.config}, full method {results.plan.full}."
    parts += [f'<p class="note">{escape(text)}</p>' for text in (plan, intervals_note(results))]
    for grid in (versions(as_results(results)), settings(as_results(results))):
        if grid.rows:
            parts.append(f"<details><summary>{escape(grid.caption)}</summary>{table(grid, caption=False)}</details>")
    return "".join(parts)
