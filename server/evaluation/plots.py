"""The report's figures as inline SVG: equal results give equal bytes, and colours follow the page's theme."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from seedbed.server.evaluation.answer import percent, points
from seedbed.server.evaluation.results import Results, Scope

# Drawn in these colours, which are then replaced by the page's own: text, faint lines, and two series.
INK, FAINT, FIRST, SECOND = "#010203", "#040506", "#070809", "#0a0b0c"
_THEME = {INK: "currentColor", FAINT: "var(--line)", FIRST: "var(--first)", SECOND: "var(--second)"}
_WIDTH = 4.9
_SIZE = 10.5
"""Inches and points: at a phone's width the letters still measure 10 pixels."""
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": _SIZE,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": FAINT,
}


def accuracies(results: Results) -> str:
    """Mean accuracy of every candidate on held-out and held-in tasks, with error bars of one standard error.

    A dotted line in the colour of the tasks says where guessing is.
    """
    shown = [candidate for candidate in results.candidates.values() if candidate.kind != "expert"]
    series: list[tuple[Scope, str, str, str, float]] = [
        ("held_out", "held-out tasks", "o", FIRST, -0.13),
        ("held_in", "held-in tasks", "s", SECOND, 0.13),
    ]
    told = []
    with figure(0.42 * len(shown) + 1.3) as (whole, axes, svg):
        for scope, label, marker, colour, shift in series:
            rows = [(row, mean) for row, entry in enumerate(shown) if (mean := getattr(entry.mean, scope)) is not None]
            if not rows:
                continue
            axes.errorbar(
                [100 * mean.value for _, mean in rows],
                [row + shift for row, _ in rows],
                xerr=[100 * mean.stderr for _, mean in rows],
                fmt=marker,
                color=colour,
                label=label,
                markersize=6,
                capsize=3,
            )
            numbers = [f"{shown[row].label} {percent(mean.value)}" for row, mean in rows]
            chance = results.chance(scope)
            if chance is not None:
                # Shifted dots: where both kinds of task have one chance, both colours show.
                axes.axvline(100 * chance, color=colour, linestyle=(10 * shift, (1, 3)), linewidth=1.5, zorder=1)
                numbers.append(f"guessing {percent(chance)}")
            told.append(f"{label}: " + ", ".join(numbers))
        _rows(axes, [entry.label for entry in shown])
        axes.set_xlabel("mean accuracy, %")
        if any("guessing" in line for line in told):
            axes.plot([], [], color=INK, linestyle=(0, (1, 3)), linewidth=1.5, label="guessing")
        if told:
            whole.legend(loc="outside upper left", ncols=3, frameon=False, handletextpad=0.3, columnspacing=1.2)
    return svg("accuracies", "Mean accuracy of each candidate", ". ".join(told))


def forest(results: Results, candidate: str, scope: Scope) -> str:
    """Differences between one candidate and all others, with 95 % intervals."""
    effects = [effect for effect in results.effects if (effect.candidate, effect.scope) == (candidate, scope)]
    label = results.candidates[candidate].label
    labels = [results.candidates[effect.reference].label for effect in effects]
    with figure(0.36 * len(effects) + 1.1) as (_, axes, svg):
        axes.axvline(0, color=INK, linewidth=1)
        for row, effect in enumerate(effects):
            # Filled where the interval leaves out zero, hollow where it does not: readable without colour.
            axes.plot([100 * effect.low, 100 * effect.high], [row, row], color=FIRST, linewidth=2)
            axes.plot(
                [100 * effect.difference],
                [row],
                marker="o",
                color=FIRST,
                markersize=8,
                fillstyle="full" if effect.is_clear else "none",
            )
        _rows(axes, labels)
        axes.set_xlabel("difference, percentage points")
    told = ", ".join(
        f"{name} {points(effect.difference)} ({points(effect.low)} to {points(effect.high)})"
        for name, effect in zip(labels, effects, strict=True)
    )
    return svg(f"forest-{candidate}-{scope}", f"Advantage of the {label} with 95 % intervals", told)


def heat_map(results: Results) -> str:
    """Accuracy of each candidate on each task; held-in tasks above the line, held-out tasks below."""
    import numpy as np

    tasks = results.tasks
    shown = list(results.candidates.values())
    grid = np.full((len(tasks), len(shown)), np.nan)
    for column, candidate in enumerate(shown):
        for row, task in enumerate(tasks):
            if task in candidate.tasks:
                grid[row, column] = 100 * candidate.tasks[task].value
    return grid_of_numbers(
        "heat-map",
        "Accuracy in % of each candidate (columns) on each task (rows)",
        list(tasks),
        [candidate.label for candidate in shown],
        grid,
        line=sum(tasks.values()),
    )


def grid_of_numbers(
    key: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Any,
    *,
    line: int | None = None,
    column: int | None = None,
    margin: float = 1.8,
    top: float = 100,
) -> str:
    """A heat map with its numbers, from 0 to `top`; missing ones (NaN) stay empty.

    Args:
        line: number of rows above a thick line.
        column: number of columns before a thick line.
        margin: inches for the rows' names.
    """
    import numpy as np

    grid = np.asarray(values, dtype=float)
    with figure(0.3 * len(rows) + 2.2, max(_WIDTH, 0.42 * len(columns) + margin)) as (_, axes, svg):
        edges = np.arange(len(columns) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5
        axes.pcolormesh(*edges, np.ma.masked_invalid(grid), cmap="viridis", vmin=0, vmax=top)
        axes.invert_yaxis()
        for (row, place), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "black" if value > 0.6 * top else "white"
                axes.text(place, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8.5)
        if line is not None:
            axes.axhline(line - 0.5, color=INK, linewidth=2)
        if column is not None:
            axes.axvline(column - 0.5, color=INK, linewidth=2)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xticks(range(len(columns)), columns, rotation=55, ha="left")
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return svg(key, title, "The tables below hold it.")


def _rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.grid(axis="x", linewidth=0.8)
    axes.set_axisbelow(True)


Writer = Callable[[str, str, str], str]


@contextmanager
def figure(height: float, width: float = _WIDTH) -> Iterator[tuple[Any, Any, Writer]]:
    """A figure, its axes, and a function ``(key, title, description) -> svg`` to be called after the body."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "seedbed"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot(), lambda key, title, told: _inline(buffer.getvalue(), key, title, told)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def _inline(document: str, key: str, title: str, told: str) -> str:
    """Fit a stand-alone SVG into a page: no XML header, own ids, the page's colours and fonts, a title."""
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.S)
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", body)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.S)
    body = re.sub(r"font-family: [^;\"]+;? ?", "", body)
    for drawn, themed in _THEME.items():
        body = body.replace(drawn, themed)
    width = re.search(r'width="([\d.]+)pt"', body)
    body = re.sub(r' (width|height)="[\d.]+pt"', "", body, count=2)
    style = f'style="max-width: {float(width.group(1)) * 1.75:.0f}px"' if width else ""
    head = f'<svg class="plot" {style} role="img" aria-labelledby="{key}-title {key}-desc"'
    named = f'<title id="{key}-title">{html.escape(title)}</title><desc id="{key}-desc">{html.escape(told)}</desc>'
    opening, rest = body.split(">", 1)
    return f"{opening.replace('<svg', head, 1)}>{named}{rest}"
