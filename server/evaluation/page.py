"""`report.html`: one file that needs nothing else, for a phone and for a desk, in light and in dark."""

from __future__ import annotations

from seedbed.server.evaluation import beside, beside_plots, plots, tables
from seedbed.server.evaluation.blocks import document, escape, figure, header, optional, table, tree
from seedbed.server.evaluation.markdown import compared, intervals_note
from seedbed.server.evaluation.results import Results, Scope


def page(results: Results) -> str:
    """The whole report as an HTML document."""
    sections = [
        ("candidates", "Candidates", figure(plots.accuracies(results)) + table(tables.overview(results))),
        ("differences", "Differences", "".join(_difference(results, *pair) for pair in compared(results))),
        ("tasks", "Tasks", _tasks(results)),
        ("experts", "Experts", optional(tables.experts(results))),
        ("general", "General text", _general(results)),
        ("routers", "Routers", routers(results)),
        ("effort", "Effort", optional(tables.candidate_costs(results)) + optional(tables.costs(results))),
        ("diagnostics", "Diagnostics", _diagnostics(results)),
        ("lineage", "Lineage", lineage(results)),
        ("making", "How it was made", _making(results)),
    ]
    return document(results.name, _header(results), sections)


def _header(results: Results) -> str:
    base = f" · base model {results.base.name}" if results.base is not None else ""
    return header(f"Seedbed report{base}", results.name, results.answer, results.notes)


def _difference(results: Results, candidate: str, scope: Scope) -> str:
    grid = tables.differences(results, candidate, scope)
    drawn = figure(plots.forest(results, candidate, scope), "Filled: the interval leaves out zero.")
    return f"<h3>{escape(grid.caption)}</h3>{drawn}{table(grid, caption=False)}"


def _tasks(results: Results) -> str:
    present = [inside for inside in (False, True) if inside in results.tasks.values()]
    line = " Above the line: held-in tasks." if len(present) == 2 else ""
    drawn = figure(plots.heat_map(results), f"Accuracy in %.{line}", wide=True)
    return drawn + "".join(table(tables.by_task(results, held_in=inside)) for inside in present)


def _general(results: Results) -> str:
    grid = beside.general(results)
    if grid is None:
        return ""
    scatter = beside_plots.drift_scatter(results)
    drawn = figure(scatter, "Further left: closer to the base model.") if scatter else ""
    return drawn + table(grid) + optional(beside.tuning(results))


def routers(results: Results) -> str:
    """What every router did, by layer, task and expert; empty where there is none."""
    grid = beside.routers(results)
    if grid is None:
        return ""
    layers = figure(beside_plots.router_layers(results), "100 %: the router prefers no expert there.")
    return layers + table(grid) + "".join(_loads(results, name) for name in beside.used(results))


def _loads(results: Results, name: str) -> str:
    loads = beside.loads(results, name)
    told = "Probability in %, mean over tokens and layers."
    drawn = figure(beside_plots.router_loads(results, name), told, wide=True)
    depth = figure(beside_plots.router_depth(results, name), "The same by module, over all tasks.")
    numbers = f"<details><summary>As a table</summary>{table(loads, caption=False)}</details>"
    return f"<h3>{escape(loads.caption)}</h3>{drawn}{depth}{numbers}"


def _diagnostics(results: Results) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in tables.diagnostics(results))
    return f"<ul>{lines}</ul>" if lines else ""


def lineage(results: Results) -> str:
    """The family tree of all adapters; empty where it is not known."""
    if not results.lineage:
        return ""
    told = "Each line was made from the line above it. The code is the beginning of the adapter's digest."
    return f'<p class="note">{told}</p><div class="tree">{tree(tables.lineage(results))}</div>'


def _making(results: Results) -> str:
    parts = []
    if results.command:
        parts.append(f"<pre><code>{escape(results.command)}</code></pre>")
    if results.base is not None:
        digest = f", <code>{escape(results.base.digest)}</code>" if results.base.digest else ""
        parts.append(f'<p class="note">Base model: {escape(results.base.name)}{digest}</p>')
    parts.append(f'<p class="note">{escape(intervals_note(results))}</p>')
    for grid in (tables.versions(results), tables.settings(results)):
        if grid.rows:
            parts.append(f"<details><summary>{escape(grid.caption)}</summary>{table(grid, caption=False)}</details>")
    return "".join(parts)
