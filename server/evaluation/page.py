"""`report.html`: one file that needs nothing else, for a phone and for a desk, in light and in dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape as _escape

from seedbed.server.evaluation import beside, beside_plots, plots, tables
from seedbed.server.evaluation.markdown import compared, intervals_note
from seedbed.server.evaluation.results import Results, Scope
from seedbed.server.evaluation.style import CSS
from seedbed.server.evaluation.tables import DIGEST, Generation, Grid


def escape(text: str) -> str:
    """Text as HTML; a number keeps its % sign on its line."""
    return _escape(text).replace(" %", "&nbsp;%")


def page(results: Results) -> str:
    """The whole report as an HTML document."""
    sections = [
        ("candidates", "Candidates", _figure(plots.accuracies(results)) + _table(tables.overview(results))),
        ("differences", "Differences", "".join(_difference(results, *pair) for pair in compared(results))),
        ("tasks", "Tasks", _tasks(results)),
        ("experts", "Experts", _optional(tables.experts(results))),
        ("general", "General text", _general(results)),
        ("routers", "Routers", _routers(results)),
        ("effort", "Effort", _optional(tables.candidate_costs(results)) + _optional(tables.costs(results))),
        ("diagnostics", "Diagnostics", _diagnostics(results)),
        ("lineage", "Lineage", _lineage(results)),
        ("making", "How it was made", _making(results)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(results.name)}: Seedbed report</title><style>{CSS}</style></head>\n"
        f'<body><header>{_header(results)}</header><nav aria-label="Sections">{links}</nav>\n'
        f"<main>{body}</main></body></html>\n"
    )


def _header(results: Results) -> str:
    first, _, rest = results.answer.partition(". ")
    base = f" · base model {escape(results.base.name)}" if results.base is not None else ""
    notes = "".join(f'<p class="notice">{escape(note)}</p>' for note in results.notes)
    opening = f'<p class="answer">{escape(first + "." if rest else first)}</p>'
    more = f'<p class="more">{escape(rest)}</p>' if rest else ""
    return f'<p class="kind">Seedbed report{base}</p><h1>{escape(results.name)}</h1>{opening}{more}{notes}'


def _difference(results: Results, candidate: str, scope: Scope) -> str:
    grid = tables.differences(results, candidate, scope)
    figure = _figure(plots.forest(results, candidate, scope), "Filled: the interval leaves out zero.")
    return f"<h3>{escape(grid.caption)}</h3>{figure}{_table(grid, caption=False)}"


def _tasks(results: Results) -> str:
    present = [inside for inside in (False, True) if inside in results.tasks.values()]
    line = " Above the line: held-in tasks." if len(present) == 2 else ""
    figure = _figure(plots.heat_map(results), f"Accuracy in %.{line}", wide=True)
    return figure + "".join(_table(tables.by_task(results, held_in=inside)) for inside in present)


def _general(results: Results) -> str:
    grid = beside.general(results)
    if grid is None:
        return ""
    scatter = beside_plots.drift_scatter(results)
    figure = _figure(scatter, "Further left: closer to the base model.") if scatter else ""
    return figure + _table(grid) + _optional(beside.tuning(results))


def _routers(results: Results) -> str:
    grid = beside.routers(results)
    if grid is None:
        return ""
    figure = _figure(beside_plots.router_layers(results), "100 %: the router prefers no expert there.")
    told = "Probability in %, mean over tokens and layers."
    parts = []
    for name in beside.used(results):
        loads = beside.loads(results, name)
        drawn = _figure(beside_plots.router_loads(results, name), told, wide=True)
        table = f"<details><summary>As a table</summary>{_table(loads, caption=False)}</details>"
        depth = _figure(beside_plots.router_depth(results, name), "The same by module, over all tasks.")
        parts.append(f"<h3>{escape(loads.caption)}</h3>{drawn}{depth}{table}")
    return figure + _table(grid) + "".join(parts)


def _figure(svg: str, caption: str = "", *, wide: bool = False) -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    kind = ' class="wide" tabindex="0"' if wide else ""
    return f"<figure><div{kind}>{svg}</div>{below}</figure>"


def _optional(grid: Grid | None) -> str:
    return _table(grid) if grid is not None else ""


def _table(grid: Grid, *, caption: bool = True) -> str:
    # A region that can be focused, so that a keyboard can scroll it too.
    name = escape(grid.caption)
    title = f"<caption>{escape(grid.caption)}</caption>" if caption else ""
    heads = "".join(f'<th scope="col">{escape(header)}</th>' for header in grid.headers)
    rows = "".join(_row(grid, index, row) for index, row in enumerate(grid.rows))
    note = f'<p class="note">{escape(grid.note)}</p>' if grid.note else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table>{title}'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _row(grid: Grid, index: int, row: Sequence[str]) -> str:
    kind = ' class="total"' if row[0] in ("mean", "all") else ""
    cells = "".join(
        f"<td><strong>{escape(cell)}</strong></td>" if (index, place) in grid.strong else f"<td>{escape(cell)}</td>"
        for place, cell in enumerate(row[1:], start=1)
    )
    return f'<tr{kind}><th scope="row">{escape(row[0])}</th>{cells}</tr>'


def _diagnostics(results: Results) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in tables.diagnostics(results))
    return f"<ul>{lines}</ul>" if lines else ""


def _lineage(results: Results) -> str:
    if not results.lineage:
        return ""
    told = "Each line was made from the line above it. The code is the beginning of the adapter's digest."
    return f'<p class="note">{told}</p><div class="tree">{_tree(tables.lineage(results))}</div>'


def _tree(generations: Sequence[Generation]) -> str:
    items = []
    for generation in generations:
        nodes = " ".join(
            f'<span class="node" title="{escape(node.kind)} {escape(node.digest)}">{escape(node.name)} '
            f"<code>{escape(node.digest[:DIGEST])}</code></span>"
            for node in generation.nodes
        )
        below = _tree(generation.children) if generation.children else ""
        items.append(f"<li>{nodes}{below}</li>")
    return f"<ul>{''.join(items)}</ul>"


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
            parts.append(f"<details><summary>{escape(grid.caption)}</summary>{_table(grid, caption=False)}</details>")
    return "".join(parts)
