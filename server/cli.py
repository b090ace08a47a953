"""The command line: a table of verbs. Heavy imports happen inside the verb, so `--help` answers at once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from seedbed.common.errors import ConfigError, SeedbedError, StorageError

if TYPE_CHECKING:
    from seedbed.server.observer import Observer

app = typer.Typer(
    name="seedbed",
    help="Collaborative fine-tuning of language models from a shared seed adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
model_app = typer.Typer(help="Base models that Seedbed knows by name.", no_args_is_help=True)
app.add_typer(model_app, name="model")

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only, no progress.")]


@app.command()
def simulate(
    source: Annotated[
        str, typer.Argument(metavar="[PRESET|CONFIG.yaml]", help="A preset (embedded, smollm2, llama-3-8b) or a file.")
    ] = "embedded",
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/NAME unless given.", show_default=False)] = None,
    data: Annotated[
        Path | None, typer.Option(help="Directory with NAME.train.jsonl and NAME.test.jsonl.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one setting; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run; nothing finished is done again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan: jobs, sizes, bytes, steps.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run a whole federation on this machine: seed, experts, combination, evaluation, report."""
    from seedbed.client.app import app as client_app
    from seedbed.common.config_file import load_config
    from seedbed.server.conductor import describe, run_simulation

    overrides = list(set_ or [])
    if data is not None:
        overrides.append(f"tasks.data={data.resolve()}")
    config = load_config(source, overrides)
    if dry_run:
        Console().print(describe(config))
        return
    root = out or Path("runs") / config.name
    command = " ".join(["seedbed", *sys.argv[1:]])
    with _observer(quiet) as observe:
        results = run_simulation(config, root, client_app, observe, resume=resume, command=command)
    from seedbed.server.evaluation.report import summary_table

    Console().print(summary_table(results))
    Console().print(results.answer, highlight=False)
    Console().print(f"Report: {root / 'report.html'}", highlight=False)


@app.command()
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


@app.command()
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


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="embedded, smollm2, a directory, or a model id of the hub.")],
    tasks: Annotated[str, typer.Option(metavar="TASK_OR_JSONL,...", help="lm-eval tasks or JSON-lines files.")],
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT directory, or a mixture's, to apply.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.", show_default=False)] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON.", show_default=False)
    ] = None,
    lm_eval: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write MODEL/results_DATE.json in lm-eval's own format.", show_default=False),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure a model, with or without an adapter, on tasks."""
    from seedbed.server.evaluation.lm_eval_format import write_lm_eval
    from seedbed.server.evaluation.suite import evaluate_model, results_table, write_json

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks names no task", "Give task names or JSON-lines files, separated by commas.")
    results = evaluate_model(model, adapter, names, limit)
    if json_ is not None:
        write_json(json_, model, adapter, results)
    if lm_eval is not None:
        settings = {"model_args": "" if adapter is None else f"adapter={adapter}", "limit": limit}
        Console().print(str(write_lm_eval(lm_eval, model, results, settings=settings)), highlight=False, soft_wrap=True)
    if not quiet or (json_ is None and lm_eval is None):
        Console().print(results_table(results))


@app.command()
def ablate(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A plan (seeded-lora, i-lora, controls) or a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/NAME unless given.", show_default=False)] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET|CONFIG.yaml", help="The full method's, instead of the plan's.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Directory with NAME.train.jsonl and NAME.test.jsonl.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change the full method; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat everything random with so many random seeds.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run; nothing finished is done again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells, their trainings, what is cached, the time.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Find out which part of a method earns its gain: effects of removing or replacing parts, with their confidence.

    PLAN is seeded-lora, i-lora or controls, or a YAML file.
    """
    from seedbed.server.ablation.plan import load_plan

    changes = list(set_ or [])
    if data is not None:
        changes.append(f"tasks.data={data.resolve()}")
    found = load_plan(plan, changes, config)
    root = out or Path("runs") / found.name
    if dry_run:
        from seedbed.server.ablation.forecast import forecast
        from seedbed.server.ablation.forecast_tables import tables

        Console().print(tables(forecast(found, range(seeds), root)))
        return
    from seedbed.client.app import app as client_app
    from seedbed.server.ablation.report import summary, write_ablation
    from seedbed.server.ablation.run import run_ablation

    command = " ".join(["seedbed", *sys.argv[1:]])
    with _observer(quiet) as observe:
        ablation = run_ablation(found, root, client_app, observe, seeds=range(seeds), resume=resume)
    results = write_ablation(found, ablation.outcomes, root, command, ablation.circumstances)
    Console().print(summary(results))
    Console().print(f"Report: {root / 'report.html'}", highlight=False)


@app.command()
def report(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a finished run.")],
    quiet: Quiet = False,
) -> None:
    """Write report.md and report.html again from a run's results, or an ablation's."""
    from seedbed.server.ablation.results import ABLATION
    from seedbed.server.evaluation.report import render, summary_table

    if (run_directory / ABLATION).exists():
        from seedbed.server.ablation.report import render as render_ablation
        from seedbed.server.ablation.report import summary

        ablation = render_ablation(run_directory)
        Console(quiet=quiet).print(summary(ablation))
        Console(quiet=quiet).print(f"Report: {run_directory / 'report.html'}", highlight=False)
        return
    results = render(run_directory)
    if not quiet:
        Console().print(summary_table(results))
        Console().print(results.answer, highlight=False)
        Console().print(f"Report: {run_directory / 'report.html'}", highlight=False)


@model_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2")],
    quiet: Quiet = False,
) -> None:
    """Obtain a base model once, verified, into the cache."""
    from seedbed.common.errors import nearest
    from seedbed.common.smollm2 import fetch as fetch_smollm2

    if name != "smollm2":
        raise ConfigError(f"there is no model '{name}' to fetch", nearest(name, ["smollm2"]))
    console = Console(stderr=True, quiet=quiet)
    directory = fetch_smollm2(lambda text: console.print(text, highlight=False))
    Console().print(str(directory), highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; every refusal is one sentence and a next step, with the exit code of its kind."""
    try:
        app(standalone_mode=True)
    except SeedbedError as error:
        _fail(error.message, error.hint, error.exit_code)
    except OSError as error:
        translated = StorageError(
            f"{error.filename or 'a file'}: {error.strerror or error}", "See the path and the space left."
        )
        _fail(translated.message, translated.hint, translated.exit_code)
    except KeyboardInterrupt:
        _fail("Interrupted.", "", 130)


def _fail(message: str, hint: str, code: int) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"error: {message}", markup=False, style="bold red" if console.is_terminal else None)
    if hint:
        console.print(hint, markup=False)
    sys.exit(code)


@contextlib.contextmanager
def _observer(quiet: bool) -> Iterator[Observer]:
    from seedbed.server.observer import Bars, Lines, Silent

    console = Console(stderr=True)
    if quiet:
        yield Silent()
    elif console.is_terminal and not os.environ.get("CI"):
        with Bars(console) as bars:
            yield bars
    else:
        yield Lines(console)


if __name__ == "__main__":
    main()
