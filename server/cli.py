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
    from seedbed.common.config import load_config
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
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER_DIR...", help="PEFT directories.")],
    out: Annotated[Path, typer.Option(help="Directory of the merged adapter; must not exist.")],
    method: Annotated[str, typer.Option(help="average, factor_mean or svd.")] = "average",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the result, for svd.", show_default=False)] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="One weight for each adapter.", show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Combine PEFT adapters of one base model into one PEFT adapter."""
    from seedbed.server.merge_files import merge_directories

    manifest = merge_directories(adapters, method, out, rank, _weights(weights))
    if not quiet:
        Console().print(
            f"{method} of {len(adapters)} adapters: {out} (rank {manifest.rank}, {manifest.modules} modules)",
            highlight=False,
        )


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="embedded, smollm2, a directory, or a model id of the hub.")],
    tasks: Annotated[str, typer.Option(metavar="TASK_OR_JSONL,...", help="lm-eval tasks or JSON-lines files.")],
    adapter: Annotated[Path | None, typer.Option(help="PEFT directory to apply.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.", show_default=False)] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON.", show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure a model, with or without an adapter, on tasks."""
    from seedbed.server.evaluation.suite import evaluate_model, results_table, write_json

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks names no task", "Give task names or JSON-lines files, separated by commas.")
    results = evaluate_model(model, adapter, names, limit)
    if json_ is not None:
        write_json(json_, model, adapter, results)
    if not quiet or json_ is None:
        Console().print(results_table(results))


@app.command()
def report(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a finished run.")],
    quiet: Quiet = False,
) -> None:
    """Write report.md and report.html again from a run's results."""
    from seedbed.server.evaluation.report import render, summary_table

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


def _weights(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights {text!r} are not numbers separated by commas", "Example: --weights 1,1,2"
        ) from None


if __name__ == "__main__":
    main()
