"""Verbs on adapter files: merge, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from seedbed.server.cli.options import Quiet


def merge(
    adapters: Annotated[
        list[Path] | None, typer.Argument(metavar="ADAPTER_DIR...", help="PEFT directories.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to make; must not exist.", show_default=False)] = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="See --list; average unless given.", show_default=False)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the result; short for --opt rank.", show_default=False)
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...", help="One for each adapter; with --with, for each late one.", show_default=False
        ),
    ] = None,
    opt: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the method; repeatable.")
    ] = None,
    seed: Annotated[
        Path | None, typer.Option(help="Seed adapter, for task_scale and include_seed.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (that of the inputs), float32, bfloat16 or float16.")] = "auto",
    fold: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Write this base model with the result in its weights.", show_default=False),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="EXPERT", help="Take an expert (directory or digest) out of an average; repeatable."),
    ] = None,
    with_: Annotated[
        list[Path] | None, typer.Option("--with", metavar="DIR", help="Add an adapter to an average; repeatable.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the methods, or with --method one's options.")] = False,
    quiet: Quiet = False,
) -> None:
    """Combine PEFT adapters of one base model into one PEFT adapter, or into a model (--fold).

    An average can be changed later: seedbed merge AVERAGE --without EXPERT --with DIR --out NEW.
    """
    from seedbed.server.adapters.merge_verb import MergeRequest, methods_table
    from seedbed.server.adapters.merge_verb import merge as run_merge

    if list_:
        Console().print(methods_table(method))
        return
    request = MergeRequest(
        adapters=adapters or [],
        out=out,
        method=method,
        rank=rank,
        weights=weights,
        options=opt or [],
        seed=seed,
        dtype=dtype,
        fold=fold,
        without=without or [],
        added=with_ or [],
    )
    run_merge(request, Console(quiet=quiet), Console(stderr=True, quiet=quiet))


def inspect(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER_DIR...", help="PEFT directories.")],
    module: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Only these modules (part of a name, or with * and ?), each in a row."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a picture: .png, .svg or .pdf.", show_default=False)
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.", show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Show what adapters are: lineage, spectra, angles, conflicts of sign. Changes nothing.

    Effective rank: exp of the entropy of the singular values' shares. Stable rank: sum of their squares over the largest's.
    """
    import json

    from seedbed.common.files import atomic_write
    from seedbed.server.adapters.inspection import inspect_adapters
    from seedbed.server.adapters.inspection_plot import require_suffix, write_plot
    from seedbed.server.adapters.inspection_tables import as_json, tables

    if plot is not None:
        require_suffix(plot)
    found = inspect_adapters(adapters, module)
    if not quiet:
        Console().print(tables(found, by_module=module is not None))
    if json_ is not None:
        atomic_write(json_, (json.dumps(as_json(found), indent=2) + "\n").encode())
    if plot is not None:
        write_plot(plot, found)
        Console(quiet=quiet).print(f"Picture: {plot}", markup=False, highlight=False, soft_wrap=True)
