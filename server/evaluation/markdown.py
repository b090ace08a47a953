"""`report.md`: the report as Markdown, every table and no plots."""

from __future__ import annotations

from collections.abc import Sequence

from seedbed.server.evaluation import beside, tables
from seedbed.server.evaluation.results import LineageNode, Results, Scope
from seedbed.server.evaluation.tables import DIGEST, Generation, Grid


def markdown(results: Results) -> str:
    """The whole report."""
    parts = [f"# {plain(results.name)}: what the federation gained", f"**{plain(results.answer)}**"]
    parts += [f"> {plain(note)}" for note in results.notes]
    parts += ["## Candidates", table(tables.overview(results))]
    grids = [tables.differences(results, *pair) for pair in compared(results)]
    parts += ["## Differences", *map(table, grids)] if grids else []
    parts += ["## Tasks", *(table(tables.by_task(results, held_in=inside)) for inside in _present(results))]
    others = (beside.general(results), beside.tuning(results), beside.routers(results))
    for grid in (tables.experts(results), *others, tables.candidate_costs(results), tables.costs(results)):
        parts += [f"## {grid.caption}", table(grid, caption=False)] if grid else []
    if results.diagnostics:
        parts += ["## Diagnostics", "\n".join(f"- {plain(line)}" for line in tables.diagnostics(results))]
    if results.lineage:
        parts += ["## Lineage", "\n".join(tree(tables.lineage(results), 0))]
    parts += ["## How it was made", *_making(results)]
    return "\n\n".join(parts) + "\n"


def compared(results: Results) -> list[tuple[str, Scope]]:
    """Candidates that were compared with more than the base, held-out tasks first."""
    pairs = [(effect.candidate, effect.scope) for effect in results.effects if effect.reference != "base"]
    return sorted(dict.fromkeys(pairs), key=lambda pair: pair[1] != "held_out")


def intervals_note(results: Results) -> str:
    """How the numbers were computed, in two sentences."""
    return (
        "Intervals are 95 % percentile intervals of a paired bootstrap over examples, stratified by task; standard "
        "errors are those of a mean of independent examples. Both say what other examples of the same tasks would have "
        "given: not other tasks, and not other training runs, of which there is one. The best candidate was chosen on "
        "the examples that it is measured on, which flatters it a little."
    )


def _present(results: Results) -> list[bool]:
    return [inside for inside in (False, True) if inside in results.tasks.values()]


def _making(results: Results) -> list[str]:
    parts = [f"Command: `{results.command}`"] if results.command else []
    if results.base is not None:
        parts.append(f"Base model: {results.base.name}, `{results.base.digest}`")
    parts.append(intervals_note(results))
    grids = (tables.versions(results), tables.settings(results))
    return parts + [table(grid) for grid in grids if grid.rows]


def table(grid: Grid, *, caption: bool = True) -> str:
    """A grid with its note."""
    lines = [f"**{grid.caption}**", ""] if caption else []
    lines.append("| " + " | ".join(map(_cell, grid.headers)) + " |")
    lines.append("| --- |" + " ---: |" * (len(grid.headers) - 1))
    for row, cells in enumerate(grid.rows):
        shown = [
            f"**{_cell(cell)}**" if (row, place) in grid.strong else _cell(cell) for place, cell in enumerate(cells)
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines + (["", grid.note] if grid.note else []))


def _cell(text: str) -> str:
    return plain(text).replace("|", r"\|")


def plain(text: str) -> str:
    """Text without line breaks and without what Markdown would take for markup."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_<>[]" else letter for letter in text)
    return " ".join(escaped.split())


def tree(generations: Sequence[Generation], depth: int) -> list[str]:
    """Lines of nested lists."""
    lines = []
    for generation in generations:
        lines.append("  " * depth + "- " + ", ".join(_node(node) for node in generation.nodes))
        lines += tree(generation.children, depth + 1)
    return lines


def _node(node: LineageNode) -> str:
    return f"{plain(node.name)} `{node.digest[:DIGEST]}`"
