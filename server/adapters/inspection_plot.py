"""The picture of `seedbed inspect`: spectra, norms by layer, and heat maps of cosines and sign conflicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seedbed.common.errors import ConfigError, nearest
from seedbed.common.files import storing, temporary_beside
from seedbed.server.adapters.inspection import AdapterFacts, Inspection, kind_of_module, layer_of
from seedbed.server.adapters.inspection_pairs import Matrix

SUFFIXES = (".png", ".svg", ".pdf")
_MOST_SIGMAS = 128


def require_suffix(path: Path) -> None:
    """Refuse a kind of picture that cannot be drawn.

    Raises:
        ConfigError: naming those that can.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path.name} has no known kind of picture", nearest(path.suffix.lower(), SUFFIXES))


def write_plot(path: Path, found: Inspection) -> None:
    """Draw everything into one file, whose suffix says the kind; an old file is replaced.

    Raises:
        ConfigError: if the suffix is unknown.
        StorageError: if the file system refuses.
    """
    require_suffix(path)
    import matplotlib

    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "seedbed", "axes.spines.top": False,
                                "axes.spines.right": False}):  # fmt: skip
        figure = _figure(found)
        kind = path.suffix.lower().removeprefix(".")
        metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
        with storing("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = temporary_beside(path)
            try:
                figure.savefig(aside, format=kind, dpi=150, metadata=metadata)
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)


def _figure(found: Inspection) -> Any:
    from matplotlib.figure import Figure

    count = len(found.adapters)
    side = min(6.0, max(3.6, 1.8 + 0.3 * count))
    rows = 1 if found.pairs is None else 2
    figure = Figure(figsize=(10, 3.8 + (side if rows == 2 else 0)), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False, height_ratios=[3.8, side][:rows])
    colors = _colors(max(count, 1))
    _spectra(axes[0][0], found.adapters, colors)
    _norms(axes[0][1], found.adapters, colors)
    if found.pairs is not None:
        labels = [adapter.label for adapter in found.adapters]
        _heat(axes[1][0], labels, found.pairs.cosine, "Cosine similarity", "RdBu_r", -1, 1)
        _heat(axes[1][1], labels, found.pairs.conflict, "Sign conflict (share of entries)", "PuOr_r", 0, 1)
    return figure


def _spectra(axes: Any, adapters: Sequence[AdapterFacts], colors: Sequence[Any]) -> None:
    """Singular values by index: the median over modules, and the middle 80 % of them."""
    import numpy as np

    single = len(adapters) == 1
    kinds = list(dict.fromkeys(kind_of_module(name) for name in adapters[0].modules)) if single else []
    groups: list[tuple[str, list[tuple[float, ...]]]]
    if single:
        of_kind = adapters[0].modules.items()
        groups = [(k, [m.singular_values for n, m in of_kind if kind_of_module(n) == k]) for k in kinds]
        colors = _colors(len(kinds))
    else:
        groups = [(a.label, [m.singular_values for m in a.modules.values()]) for a in adapters]
    for (label, spectra), color in zip(groups, colors, strict=False):
        longest = min(_MOST_SIGMAS, max(map(len, spectra)))
        values = np.full((len(spectra), longest), np.nan)
        for row, spectrum in zip(values, spectra, strict=True):
            shown = [value if value > 0 else np.nan for value in spectrum[:longest]]
            row[: len(shown)] = shown
        usable = np.flatnonzero(~np.isnan(values).all(axis=0))
        if not len(usable):
            continue
        low, middle, high = np.nanquantile(values[:, usable], [0.1, 0.5, 0.9], axis=0)
        axes.plot(usable + 1, middle, color=color, label=label, marker="o" if longest <= 16 else None, markersize=3)
        axes.fill_between(usable + 1, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set(yscale="log", xlabel="index", ylabel="singular value", title="Spectra: median and middle 80 % of modules")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(_plain_number)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(left=0.5)
    axes.grid(alpha=0.25)
    _legend(axes)


def _norms(axes: Any, adapters: Sequence[AdapterFacts], colors: Sequence[Any]) -> None:
    """Frobenius norm of each layer's update."""
    for adapter, color in zip(adapters, colors, strict=False):
        squares: dict[int, float] = {}
        for name, module in adapter.modules.items():
            layer = layer_of(name)
            if layer is not None:
                squares[layer] = squares.get(layer, 0.0) + module.norm**2
        layers = sorted(squares)
        axes.plot(layers, [math.sqrt(squares[layer]) for layer in layers], "o-", color=color, label=adapter.label, ms=3)
    axes.set(xlabel="layer", ylabel="norm of the update", title="Size by layer (Frobenius norm)")
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    if len(adapters) > 1:
        _legend(axes)


def _heat(axes: Any, labels: Sequence[str], values: Matrix, title: str, cmap: str, low: float, high: float) -> None:
    image = axes.imshow(values, cmap=cmap, vmin=low, vmax=high)
    axes.set_title(title)
    size = 9 if len(labels) <= 16 else max(3, 150 / len(labels))
    axes.set_xticks(range(len(labels)), [_brief(label) for label in labels], rotation=40, ha="right", fontsize=size)
    axes.set_yticks(range(len(labels)), [_brief(label) for label in labels], fontsize=size)
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.04)
    if len(labels) <= 10:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                shade = abs(value - (low + high) / 2) / ((high - low) / 2)
                color = "white" if shade > 0.6 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)


def _plain_number(value: float, _position: int) -> str:
    """Ticks of a logarithmic axis at 1, 2 and 5 times a power of ten, as numbers that one can read."""
    mantissa = value / 10 ** math.floor(math.log10(value)) if value > 0 else 0.0
    return f"{value:.6g}" if any(math.isclose(mantissa, shown) for shown in (1, 2, 5)) else ""


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 1 if len(labels) <= 8 else 2
        axes.legend(handles, [_brief(label) for label in labels], fontsize=7, ncols=columns, frameon=False)


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](index) for index in range(10)]
    return [colormaps["viridis"](index / (count - 1)) for index in range(count)]


def _brief(label: str) -> str:
    return label if len(label) <= 22 else f"…{label[-21:]}"
