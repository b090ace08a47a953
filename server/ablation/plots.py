"""Figures of an ablation: effects with intervals, cells by task, retention against generalization, curves over values."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from seedbed.server.ablation import tables
from seedbed.server.ablation.answer import interval, label, plain, readable, signed, unit
from seedbed.server.ablation.effects import FULL, LOWER_IS_BETTER, Measure, PartEffect
from seedbed.server.ablation.results import AblationResults
from seedbed.server.ablation.values import Cell, Row
from seedbed.server.evaluation.plots import FIRST, INK, SECOND, figure, grid_of_numbers

_LETTERS = 25
"""Of a label's line."""
_TICKS = 5
"""Most intervals between numbers along an axis, so that long ones such as −0.005 do not touch."""


def forest(results: AblationResults, measure: Measure) -> str:
    """Full method minus every cell, with 95 % intervals; filled where it is clear after Holm's correction."""
    effects = [effect for effect in results.of_measure(measure) if not effect.same]
    labels = [_wrapped(label(results, results.cells[effect.cell].cell)) for effect in effects]
    scale = _scale(measure)
    lines = [text.count("\n") + 1 for text in labels]
    with figure(0.12 * len(effects) + 0.2 * sum(lines) + 1.0) as (_, axes, svg):
        axes.axvline(0, color=INK, linewidth=1)
        for row, effect in enumerate(effects):
            axes.plot([scale * effect.low, scale * effect.high], [row, row], color=FIRST, linewidth=2)
            fill = "full" if effect.is_clear else "none"
            axes.plot([scale * effect.difference], [row], marker="o", color=FIRST, markersize=8, fillstyle=fill)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.tick_params(length=0)
        axes.grid(axis="x", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(_TICKS))
        axes.set_xlabel(f"full method − cell,{unit(measure) or ' perplexity'}")
    told = ", ".join(
        f"{label(results, results.cells[effect.cell].cell)} {signed(measure, effect.difference)} ({interval(effect)})"
        for effect in effects
    )
    return svg(f"forest-{measure}", f"Effects on {tables.NAMES[measure]} with 95 % intervals", told)


def heat_map(results: AblationResults) -> str:
    """Accuracy of every cell (rows) on every task (columns), held-in tasks left of the line."""
    names = tables.tasks(results)
    shown = [one for one in results.cells.values() if one.tasks]
    labels = [_wrapped(label(results, one.cell), 34) for one in shown]
    grid = [[100 * one.tasks[name].value if name in one.tasks else np.nan for name in names] for one in shown]
    margin = 0.6 + 0.085 * max(len(line) for text in labels for line in text.split("\n"))
    title = "Accuracy in % of every cell (rows) on every task (columns)"
    held_in = tables.held_in_count(results)
    column = held_in if 0 < held_in < len(names) else None
    return grid_of_numbers("cells-tasks", title, labels, names, grid, column=column, margin=margin)


def scatter(results: AblationResults, across: Measure, up: Measure) -> str:
    """Every cell by two measures, under its number in the table of cells; empty where fewer than two have both."""
    shown = [
        (number, one, one.means[across], one.means[up])
        for number, one in enumerate(results.cells.values())
        if across in one.means and up in one.means and not one.cell.is_full
    ]
    if len(shown) < 2:
        return ""
    with figure(3.6) as (_, axes, svg):
        for number, one, x, y in shown:
            is_full = one.cell.name == FULL
            axes.errorbar(
                [_scale(across) * x.value],
                [_scale(up) * y.value],
                xerr=[_scale(across) * x.stderr],
                yerr=[_scale(up) * y.stderr],
                marker="s" if is_full else "o",
                color=SECOND if is_full else FIRST,
                markersize=8 if is_full else 6,
                linewidth=0.8,
            )
            axes.annotate(
                str(number),
                (_scale(across) * x.value, _scale(up) * y.value),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=9,
            )
        axes.set_xlabel(axis(across))
        axes.set_ylabel(axis(up))
        axes.grid(linewidth=0.8)
        axes.margins(0.08)
    told = ", ".join(
        f"{number} {label(results, one.cell)}: {tables.amount(across, x.value)} and {tables.amount(up, y.value)}"
        for number, one, x, y in shown
    )
    return svg(f"scatter-{across}-{up}", f"{tables.NAMES[across]} against {tables.NAMES[up]} of every cell", told)


def curve(results: AblationResults, row: Row, cells: Sequence[Cell], measure: Measure) -> str:
    """One measure over a row's values, with standard errors; the full method as a dashed line."""
    found = [(cell, effect) for cell in cells if (effect := results.effect(cell.name, measure)) is not None]
    scale = _scale(measure)
    with figure(2.5) as (whole, axes, svg):
        axes.axhline(scale * _full(found), color=SECOND, linestyle="--", linewidth=1.5, label="full method")
        axes.errorbar(
            [cell.number for cell, _ in found],
            [scale * effect.value for _, effect in found],
            yerr=[scale * effect.value_stderr for _, effect in found],
            marker="o",
            color=FIRST,
            capsize=3,
            linewidth=1.5,
            label="cell ± standard error",
        )
        axes.set_xticks([cell.number for cell, _ in found], [f"{cell.number:g}" for cell, _ in found])
        axes.set_xlabel(readable(row.label))
        axes.set_ylabel(axis(measure))
        axes.grid(linewidth=0.8)
        whole.legend(loc="outside upper left", ncols=2, frameon=False)
    told = ", ".join(
        f"{cell.number:g}: {tables.amount(measure, effect.value)} ± {plain(measure, effect.value_stderr)}"
        for cell, effect in found
    )
    key = f"curve-{results.plan.rows.index(row)}-{measure}"
    return svg(key, f"{tables.NAMES[measure]} by {readable(row.label)}", told)


def axis(measure: Measure) -> str:
    return {"kl": "KL, nats a token", "perplexity": "perplexity"}.get(measure, f"{tables.NAMES[measure]}, %")


def _full(found: Sequence[tuple[Cell, PartEffect]]) -> float:
    """The full method on the row's tasks: of the cell that shares most seeds with it."""
    return max((effect for _, effect in found), key=lambda effect: len(effect.seeds)).full


def _scale(measure: Measure) -> float:
    return 1.0 if measure in LOWER_IS_BETTER else 100.0


def _wrapped(text: str, width: int = _LETTERS) -> str:
    """At most two lines."""
    return "\n".join(textwrap.wrap(text, width, max_lines=2, placeholder=" …")) or text
