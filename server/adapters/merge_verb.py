"""What the verb `merge` does with its arguments, and what it says: three kinds of result, one line each, and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from seedbed.common.errors import ConfigError
from seedbed.server.adapters.change import change_average
from seedbed.server.adapters.files import Progress, require_absent, write_merged
from seedbed.server.adapters.plan import plan_merge
from seedbed.server.merging import METHODS, Method, method_named, option_rows
from seedbed.server.observer import Bars


@dataclass(frozen=True)
class MergeRequest:
    """The arguments of `seedbed merge`, as given."""

    adapters: Sequence[Path]
    out: Path | None
    method: str | None = None
    rank: int | None = None
    weights: str | None = None
    options: Sequence[str] = ()
    seed: Path | None = None
    dtype: str | None = None
    fold: str | None = None
    without: Sequence[str] = ()
    added: Sequence[Path] = ()


def merge(request: MergeRequest, console: Console, notes: Console) -> None:
    """Do what the request says and print one line on `console`, and what a user must know on `notes`.

    Raises:
        SeedbedError: whatever is wrong; then nothing is written.
    """
    if not request.adapters:
        raise ConfigError("merge needs adapters", "Give PEFT directories, or see the methods with --list.")
    if request.out is None:
        raise ConfigError("merge needs --out", "Name the directory to make.")
    if request.without or request.added:
        return _change(request, request.out, console, notes)
    if request.fold is not None:
        return _fold(request, request.fold, request.out, console, notes)
    require_absent(request.out)
    method = request.method or "average"
    plan = plan_merge(
        request.adapters,
        method,
        rank=request.rank,
        weights=parse_weights(request.weights),
        options=parse_options(request.options),
        seed=request.seed,
        dtype=request.dtype,
    )
    with _progress(notes) as progress:
        manifest = write_merged(plan, request.out, progress=progress)
    size = f"rank {manifest.rank}, {manifest.modules} modules, {manifest.dtype}"
    _say(console, f"{method} of {_count(len(request.adapters))}: {request.out} ({size})")
    unused = [f"--seed is not used: {_SEED_CANCELS}"] if request.seed is not None and plan.seed is None else []
    return _note(notes, [*plan.notes(), *unused])


_SEED_CANCELS = "at task_scale 1 without include_seed it cancels."


def _fold(request: MergeRequest, model: str, out: Path, console: Console, notes: Console) -> None:
    from seedbed.server.adapters.fold import fold

    if request.dtype not in (None, "auto"):
        raise ConfigError("--dtype is not for --fold", "A folded model keeps the dtype of its base.")
    require_absent(out)
    method = request.method or "average"
    plan = plan_merge(
        request.adapters,
        method,
        rank=request.rank,
        weights=parse_weights(request.weights),
        options=parse_options(request.options),
        seed=request.seed,
        dtype="float32",
        exact=True,
    )
    with _progress(notes) as progress:
        made = fold(plan, model, out, progress=progress)
    size = f"{made.changed} of {made.tensors} tensors changed, {made.bytes / 1e6:,.1f} MB"
    _say(console, f"{method} of {_count(len(request.adapters))} folded into {model}: {out} ({size})")
    _note(notes, plan.notes())


def _change(request: MergeRequest, out: Path, console: Console, notes: Console) -> None:
    if len(request.adapters) != 1:
        raise ConfigError(
            f"--without and --with change one average, got {len(request.adapters)} directories",
            "Give the average alone.",
        )
    given = {"--rank": request.rank, "--opt": request.options or None, "--seed": request.seed, "--fold": request.fold}
    given |= {"--dtype": None if request.dtype == "auto" else request.dtype}
    given |= {"--method": None if request.method == "average" else request.method}
    for option, value in given.items():
        if value is not None:
            raise ConfigError(f"{option} does not go with --without and --with", "An average stays an average.")
    weights = parse_weights(request.weights)
    if weights is not None and not request.added:
        raise ConfigError("--weights with --without has nothing to weigh", "Those that stay keep their weights.")
    with _progress(notes) as progress:
        manifest = change_average(
            request.adapters[0],
            out,
            without=request.without,
            added=request.added,
            weights=weights,
            progress=progress,
        )
    told = [f"{len(request.without)} taken out"] if request.without else []
    told += [f"{len(request.added)} added"] if request.added else []
    if manifest.dtype != "float32" and request.without:
        _note(
            notes,
            [f"Where weights differ, a result in {manifest.dtype} is equal to averaging anew up to its rounding."],
        )
    size = f"rank {manifest.rank}, {manifest.modules} modules, {manifest.dtype}"
    _say(console, f"average of {_count(len(manifest.parents))}, {', '.join(told)}: {out} ({size})")


def parse_weights(text: str | None) -> list[float] | None:
    """Numbers separated by commas.

    Raises:
        ConfigError: if they are none.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights {text!r} are not numbers separated by commas", "Example: --weights 1,1,2"
        ) from None


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """``key=value`` pairs with values in YAML.

    Raises:
        ConfigError: if one has no ``=`` or a value that is no YAML, or a key comes twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--opt {text!r} is not key=value", "Example: --opt density=0.3")
        if key.strip() in found:
            raise ConfigError(f"--opt {key.strip()} is given twice", "Give it once.")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):  # a date that there is not; too deep
            raise ConfigError(f"--opt {text[:60]!r}: the value is not YAML", "Example: --opt density=0.3") from None
    return found


def methods_table(name: str | None = None) -> Table:
    """The table of methods; or every option of one of them.

    Raises:
        ConfigError: if there is no such method.
    """
    return _one_method(method_named(name)) if name is not None else _all_methods()


def _all_methods() -> Table:
    table = Table(
        title="Methods of merging (more on one: --list --method NAME)",
        title_justify="left",
        show_lines=True,
        expand=True,
    )
    table.add_column("method", no_wrap=True)
    table.add_column("what it makes", ratio=6)
    table.add_column("options, defaults", ratio=4)
    table.add_column("rank; cost", ratio=5)
    for row in METHODS.values():
        what = Text.assemble(row.summary, (f"\n{row.source}", "dim"))
        options = "\n".join(f"{name}={default}" for name, _, default, _ in option_rows(row))
        table.add_row(row.name, what, Text(options), Text.assemble(f"{row.rank}\n", (row.cost, "dim")))
    return table


def _one_method(row: Method) -> Table:
    table = Table(title=f"{row.name}: {row.summary}", title_justify="left", show_lines=True, expand=True)
    told = [f"Source: {row.source}.", f"Rank of the result: {row.rank}.", f"Cost: {row.cost}."]
    table.caption, table.caption_justify = (
        "\n".join([*told, *([f"Note: {row.warning}"] if row.warning else [])]),
        "left",
    )
    table.add_column("option", no_wrap=True)
    table.add_column("values", ratio=2)
    table.add_column("default", no_wrap=True)
    table.add_column("meaning", ratio=5)
    for name, kind, default, meaning in option_rows(row):
        table.add_row(name, Text(kind), default, Text(meaning))
    return table


@contextmanager
def _progress(console: Console) -> Iterator[Progress | None]:
    """A bar over the modules, where someone watches."""
    if not console.is_terminal or console.quiet:
        yield None
        return
    with Bars(console) as bars:
        started: list[str] = []

        def advance(module: str, total: int) -> None:
            if not started:
                started.append(module)
                bars.stage("merge", total)
            bars.advance(module)

        yield advance


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _note(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)


def _count(number: int) -> str:
    return f"{number} adapter{'s' if number != 1 else ''}"
