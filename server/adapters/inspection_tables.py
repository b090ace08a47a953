"""What `seedbed inspect` prints and writes: tables for a terminal of 80 columns, and everything as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from seedbed.server.adapters.inspection import AdapterFacts, Inspection, ModuleFacts, kind_of_module
from seedbed.server.adapters.inspection_pairs import Matrix, Pairs

_WIDEST = 10
"""Adapters that a matrix shows; of more it shows the extremes."""


def tables(found: Inspection, *, by_module: bool = False) -> Group:
    """Everything that was found.

    Args:
        by_module: a row for every module rather than for every kind of module.
    """
    parts: list[RenderableType] = [_title("Adapters"), _adapters(found.adapters), *_origins(found.adapters), ""]
    parts.append(_title("Updates " + ("by module" if by_module else "by kind of module, means over the n modules")))
    parts.append(_modules(found.adapters, by_module))
    parts.append(Text("σ1 to σ3: largest singular values; effective and stable rank: see --help", "dim"))
    if found.pairs is not None:
        parts += ["", *_pairs([adapter.label for adapter in found.adapters], found.pairs)]
    return Group(*parts)


def as_json(found: Inspection) -> dict[str, Any]:
    """Everything that was found, in full precision."""
    pairs = found.pairs
    return {
        "adapters": [_adapter_json(adapter) for adapter in found.adapters],
        "pairs": None
        if pairs is None
        else {
            "cosine": pairs.cosine,
            "sign_conflict": pairs.conflict,
            "sign_conflict_weighted": pairs.weighted,
            "share_of_rows": pairs.rows,
            "factor_gap": pairs.factor_gap,
        },
    }


def _adapter_json(adapter: AdapterFacts) -> dict[str, Any]:
    modules = {
        name: {
            "rank": module.rank,
            "scaling": module.scaling,
            "norm": module.norm,
            "effective_rank": module.effective_rank,
            "stable_rank": module.stable_rank,
            "singular_values": module.singular_values,
        }
        for name, module in adapter.modules.items()
    }
    return {
        "label": adapter.label,
        "directory": str(adapter.directory),
        "digest": adapter.manifest.digest,
        "manifest": adapter.manifest.model_dump(mode="json"),
        "parameters": adapter.parameters,
        "norm": adapter.norm,
        "modules": modules,
    }


def _adapters(adapters: Sequence[AdapterFacts]) -> Table:
    table = _table()
    for column in ("", "kind", "task"):
        table.add_column(column, overflow="fold")
    for column in ("rank", "alpha", "modules", "parameters", "dtype", "norm"):
        table.add_column(column, justify="right")
    for adapter in adapters:
        manifest = adapter.manifest
        alphas = [module.scaling * module.rank for module in adapter.modules.values()]
        table.add_row(
            Text(adapter.label),
            manifest.kind,
            Text(manifest.task or "–"),
            _range(adapter.ranks),
            _range(alphas),
            f"{len(adapter.modules):,}",
            _short(adapter.parameters),
            manifest.dtype,
            f"{adapter.norm:.4g}",
        )
    return table


def _origins(adapters: Sequence[AdapterFacts]) -> Iterator[Text]:
    bases = {(adapter.manifest.base.name, adapter.manifest.base.digest[:12]) for adapter in adapters}
    for name, digest in sorted(bases):
        yield Text(f"Base model: {name or 'not named'}{f' ({digest})' if digest else ''}")
    for adapter in adapters:
        yield Text(f"{adapter.label}: digest {adapter.manifest.digest[:12]}{_lineage(adapter)}")


def _lineage(adapter: AdapterFacts) -> str:
    manifest = adapter.manifest
    method = f", {manifest.settings['method']}" if "method" in manifest.settings else ""
    shown = ", ".join(parent[:12] for parent in manifest.parents[:4])
    more = f" and {len(manifest.parents) - 4} more" if len(manifest.parents) > 4 else ""
    return f"{method}, from {shown}{more}" if shown else method


def _modules(adapters: Sequence[AdapterFacts], by_module: bool) -> Table:
    """A section for each kind of module (or each module), with a row for each adapter that has it."""
    table = _table()
    table.add_column("module", overflow="fold")
    if not by_module:
        table.add_column("n", justify="right")
    table.add_column("adapter", overflow="fold")
    for column in ("rank", "norm", "σ1", "σ2", "σ3", "eff.", "stable"):
        table.add_column(column, justify="right")
    groups = _groups(adapters, by_module)
    for group, shown in zip(groups, _shortened(groups, by_module), strict=True):
        rows = [
            (adapter, [m for name, m in adapter.modules.items() if _group(name, by_module) == group])
            for adapter in adapters
        ]
        held = [(adapter.label, modules) for adapter, modules in rows if modules]
        if len(held) > _WIDEST:
            held = [(f"mean of {len(held)}", [module for _, modules in held for module in modules])]
        for index, (label, modules) in enumerate(held):
            count = [] if by_module else [str(len(modules))]
            table.add_row(Text("" if index else shown), *count, Text(label), *_numbers(modules))
    return table


def _shortened(groups: Sequence[str], by_module: bool) -> list[str]:
    """Without what all names begin with; a kind of module by its last part, if that says which."""
    if by_module:
        parts = [group.split(".") for group in groups]
        common = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False)))
        return [".".join(part[min(common, len(part) - 1) :]) for part in parts]
    last = [group.rpartition(".")[2] for group in groups]
    return last if len(set(last)) == len(last) else list(groups)


def _numbers(modules: Sequence[ModuleFacts]) -> list[str]:
    def mean(values: Iterator[float]) -> float:
        return statistics.fmean(values)

    def sigma(index: int) -> str:
        held = [m.singular_values[index] for m in modules if index < len(m.singular_values)]
        return f"{statistics.fmean(held):.3g}" if held else "–"

    return [
        _range(sorted({module.rank for module in modules})),
        f"{mean(module.norm for module in modules):.3g}",
        *(sigma(index) for index in range(3)),
        f"{mean(module.effective_rank for module in modules):.1f}",
        f"{mean(module.stable_rank for module in modules):.1f}",
    ]


def _groups(adapters: Sequence[AdapterFacts], by_module: bool) -> list[str]:
    return list(dict.fromkeys(_group(name, by_module) for adapter in adapters for name in adapter.modules))


def _group(name: str, by_module: bool) -> str:
    return name if by_module else kind_of_module(name)


def _pairs(labels: Sequence[str], pairs: Pairs) -> Iterator[RenderableType]:
    yield _matrix("Cosine similarity of the updates", labels, pairs.cosine, "{:.3f}")
    yield ""
    yield _matrix("Sign conflict: entries whose signs differ, in %", labels, _percent(pairs.conflict), "{:.1f}")
    yield ""
    yield _matrix("Sign conflict, weighted by the product's size, in %", labels, _percent(pairs.weighted), "{:.1f}")
    exact = pairs.rows >= 1
    how = "Signs: all entries." if exact else f"Signs: a fixed random {pairs.rows:.2%} of the rows of every module."
    yield Text(how + " Unrelated updates: 50 %.", "dim")
    yield ""
    if pairs.factor_gap is None:
        yield Text(f"Factor gap: none, since {pairs.no_gap}.")
    else:
        yield Text(
            f"Factor gap: {pairs.factor_gap:.3%}: so far is the mean of A and of B apart from the mean of updates."
        )


def _matrix(title: str, labels: Sequence[str], values: Matrix, form: str) -> RenderableType:
    if len(labels) > _WIDEST:
        return _extremes(title, labels, values, form)
    table = _table()
    table.add_column("", overflow="fold")
    for label in labels:
        table.add_column(Text(label, overflow="fold"), justify="right", overflow="fold")
    for index, (label, row) in enumerate(zip(labels, values, strict=True)):
        table.add_row(Text(label), *("·" if index == other else form.format(v) for other, v in enumerate(row)))
    return Group(_title(title), table)


def _table() -> Table:
    """Narrow enough for 80 columns: no vertical lines."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)


def _title(text: str) -> Text:
    return Text(text, "bold")


def _extremes(title: str, labels: Sequence[str], values: Matrix, form: str) -> Text:
    found = sorted((values[i][j], labels[i], labels[j]) for i in range(len(labels)) for j in range(i))
    lines = [f"{title}: {len(found)} pairs, mean {form.format(statistics.fmean(v for v, _, _ in found))}"]
    lines += [
        f"  {what} {form.format(v)}: {one}, {two}" for what, (v, one, two) in (("least", found[0]), ("most", found[-1]))
    ]
    return Text("\n".join(lines))


def _percent(matrix: Matrix) -> Matrix:
    return tuple(tuple(100 * value for value in row) for row in matrix)


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if abs(high - low) <= 1e-9 * abs(high) else f"{low:.4g}–{high:.4g}"


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
