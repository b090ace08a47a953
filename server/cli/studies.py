"""Verbs that run and measure: simulate, evaluate, ablate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from seedbed.common.errors import ConfigError, TrainingError
from seedbed.server.cli.console import command_line, observer
from seedbed.server.cli.options import Data, LmEval, Out, Quiet, Resume, Set, overrides


def simulate(
    source: Annotated[
        str, typer.Argument(metavar="[PRESET|CONFIG.yaml]", help="A preset (embedded, smollm2, llama-3-8b) or a file.")
    ] = "embedded",
    out: Out = None,
    data: Data = None,
    set_: Set = None,
    resume: Resume = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan: jobs, sizes, bytes, steps.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run a whole federation on this machine: seed, experts, combination, evaluation, report."""
    from seedbed.client.app import app as client_app
    from seedbed.common.config_file import load_config
    from seedbed.server.conductor import describe, run_simulation

    config = load_config(source, overrides(set_, data))
    if dry_run:
        Console().print(describe(config))
        return
    root = out or Path("runs") / config.name
    with observer(quiet) as observe:
        results = run_simulation(config, root, client_app, observe, resume=resume, command=command_line())
    from seedbed.server.evaluation.report import summary_table

    Console().print(summary_table(results))
    Console().print(results.answer, highlight=False)
    Console().print(f"Report: {root / 'report.html'}", highlight=False)


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
    lm_eval: LmEval = None,
    quiet: Quiet = False,
) -> None:
    """Measure a model, with or without an adapter, on tasks."""
    from seedbed.server.evaluation.lm_eval_format import write_lm_eval
    from seedbed.server.evaluation.suite import evaluate_model, results_table, write_json

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks names no task", "Give task names or JSON-lines files, separated by commas.")
    results, measured = evaluate_model(model, adapter, names, limit)
    if json_ is not None:
        write_json(json_, model, adapter, results)
    if lm_eval is not None:
        settings = {"model_args": "" if adapter is None else f"adapter={adapter}", "limit": limit}
        path = write_lm_eval(lm_eval, model, results, tasks=measured, settings=settings)
        Console().print(str(path), highlight=False, soft_wrap=True)
    if not quiet or (json_ is None and lm_eval is None):
        Console().print(results_table(results))


def ablate(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A plan that is shipped, or a YAML file.")],
    out: Out = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET|CONFIG.yaml", help="The full method's, instead of the plan's.", show_default=False
        ),
    ] = None,
    data: Data = None,
    set_: Set = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat everything random with so many random seeds.")] = 1,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells, their trainings, what is cached, the time.")
    ] = False,
    lm_eval: LmEval = None,
    quiet: Quiet = False,
) -> None:
    """Find out which part of a method earns its gain: effects of removing or replacing parts, with their confidence.

    PLAN is seeded-lora, i-lora, controls or seeded-lora-smollm2, or a YAML file.
    """
    from seedbed.server.ablation.cells import base_config
    from seedbed.server.ablation.plan import load_plan

    found = load_plan(plan, overrides(set_, data), config)
    first = base_config(found).run.random_seed
    random_seeds = range(first, first + seeds)
    root = out or Path("runs") / found.name
    if dry_run:
        from seedbed.server.ablation.forecast import forecast
        from seedbed.server.ablation.forecast_tables import tables

        Console().print(tables(forecast(found, random_seeds, root)))
        return
    from seedbed.client.app import app as client_app
    from seedbed.server.ablation.report import summary, write_ablation
    from seedbed.server.ablation.run import run_ablation
    from seedbed.server.ablation.tables import failures
    from seedbed.server.evaluation.lm_eval_format import write_lm_eval

    with observer(quiet) as observe:
        ablation = run_ablation(found, root, client_app, observe, seeds=random_seeds, resume=resume)
    results = write_ablation(found, ablation.outcomes, root, command_line(), ablation.circumstances)
    if lm_eval is not None:
        for outcome in ablation.outcomes:
            for seed, one in outcome.seeds.items():
                settings = {"model_args": f"adapter={one.digest}" if one.digest else "", "seed": seed}
                name = f"{outcome.cell.name}.seed-{seed}"
                write_lm_eval(lm_eval, name, one.scores, tasks=ablation.tasks, settings=settings)
    Console().print(summary(results))
    Console().print(f"Report: {root / 'report.html'}", highlight=False)
    if failed := failures(results):
        raise TrainingError(
            f"{len(failed)} of {seeds * len(results.cells)} runs of cells failed; the report compares the others",
            "Mend what is said above, and continue with --resume.",
        )


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
