"""Measure one candidate on a suite of tasks, through lm-eval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from seedbed.common.config import BaseModelConfig
from seedbed.common.errors import DataError
from seedbed.common.files import atomic_write
from seedbed.common.manifest import Record
from seedbed.common.tasks import DEFAULT_PROMPT, EvalTask, quiet_lm_eval, resolve_tasks
from seedbed.server.evaluation.statistics import standard_error

if TYPE_CHECKING:
    from rich.table import Table

    from seedbed.common.adapter import Adapter
    from seedbed.common.manifest import BaseIdentity
    from seedbed.common.routing import Mixture
    from seedbed.common.scoring import Progress, SeedbedLM

_PREFERRED = ("acc", "exact_match", "acc_norm")
_BATCH_TOKENS = 8192


class Score(Record):
    """How one candidate does on one task."""

    task: str
    metric: str
    """`acc` where the task has it: share of questions whose right choice is the likeliest."""
    value: float
    n: int
    stderr: float
    held_in: bool
    chance: float | None = None
    """Expected accuracy of guessing; none where the task has no choices."""
    acc_norm: float | None = None
    """Accuracy with likelihoods divided by the choices' lengths."""


class TaskResult(Score):
    """A score with what it was computed from."""

    outcomes: tuple[float, ...] = Field(repr=False)
    """The metric of each example, 1 for right and 0 for wrong, in the order of the test file."""


def evaluate(
    lm: SeedbedLM, tasks: Sequence[EvalTask], *, limit: int | None = None, on_progress: Progress | None = None
) -> list[TaskResult]:
    """Score the model that `lm` holds, under the adapter that is set, on every task.

    Args:
        limit: use at most so many examples of a task, the first ones.
        on_progress: told how many requests (choices) of all tasks are scored, and of how many.

    Raises:
        DataError: if a choice cannot be scored, or a task has no metric of single examples.
    """
    from lm_eval.evaluator import evaluate as lm_eval_evaluate

    if not tasks:
        return []
    before = lm.progress
    lm.progress = on_progress or before
    try:
        with quiet_lm_eval():
            found = lm_eval_evaluate(
                lm=lm,
                task_dict={"tasks": {name: part for task in tasks for name, part in task.parts.items()}},
                limit=limit,
                bootstrap_iters=0,
            )
    finally:
        lm.progress = before
    return [_result(task, [found["samples"][name] for name in task.parts]) for task in tasks]


def _result(task: EvalTask, parts: Sequence[list[dict[str, Any]]]) -> TaskResult:
    """One score; of a group over all its examples, so that a part weighs as much as it has examples."""
    samples = [sample for part in parts for sample in part if sample["filter"] == part[0]["filter"]]
    metric = _metric(task, samples[0])
    outcomes = tuple(float(sample[metric]) for sample in samples)
    normalized = [float(sample["acc_norm"]) for sample in samples if "acc_norm" in sample]
    return TaskResult(
        task=task.name,
        metric=metric,
        value=sum(outcomes) / len(outcomes),
        n=len(outcomes),
        stderr=standard_error(outcomes),
        held_in=task.held_in,
        chance=_chance(task.task, samples),
        acc_norm=sum(normalized) / len(normalized) if normalized else None,
        outcomes=outcomes,
    )


def _metric(task: EvalTask, sample: dict[str, Any]) -> str:
    numeric = [metric for metric in sample["metrics"] if isinstance(sample[metric], int | float)]
    for metric in (task.metric, *_PREFERRED, *numeric):
        if metric in numeric:
            return str(metric)
    raise DataError(
        f"task '{task.name}' has no metric of single examples", "Choose a task with accuracy or exact match."
    )


def _chance(task: Any, samples: list[dict[str, Any]]) -> float | None:
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    return sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)


def evaluate_model(
    model: str,
    adapter: Path | None,
    tasks: Sequence[str],
    limit: int | None = None,
    prompt: str = DEFAULT_PROMPT,
    *,
    on_progress: Progress | None = None,
) -> tuple[list[TaskResult], list[EvalTask]]:
    """Measure a base model, with or without an adapter, on tasks by name or file.

    Args:
        model: `embedded`, `smollm2`, a directory, or a model id of the hub.
        adapter: a PEFT directory, or the directory of a mixture of experts.
        tasks: see `resolve_tasks`.

    Returns:
        the scores, and the tasks that they are of.

    Raises:
        SeedbedError: if the model, the adapter or a task cannot be read, or the adapter is of another base model.
    """
    from seedbed.common.basemodel import identify, load, resolve
    from seedbed.common.scoring import SeedbedLM

    config = BaseModelConfig(model=model)
    # What is cheap to refuse comes first.
    directory = resolve(config)
    update = _wearable(adapter, identify(directory, model)) if adapter is not None else None
    found = resolve_tasks(tasks, prompt)
    lm = SeedbedLM(*load(config), batch_tokens=_BATCH_TOKENS)
    lm.set_adapter(update)
    return evaluate(lm, found, limit=limit, on_progress=on_progress), found


def _wearable(directory: Path, base: BaseIdentity) -> Adapter | Mixture:
    from seedbed.common.routing.mixture_file import read_mixture
    from seedbed.common.routing.router_file import ROUTER_TENSORS
    from seedbed.common.storage import read_adapter

    if (directory / ROUTER_TENSORS).exists():
        return read_mixture(directory, base=base)[0]
    return read_adapter(directory, base=base)[0]


def results_table(results: Sequence[TaskResult]) -> Table:
    """Scores as a table for a terminal."""
    from rich.table import Table

    table = Table()
    for column in ("task", "metric", "value", "± stderr", "chance", "n"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for result in results:
        chance = "" if result.chance is None else f"{result.chance:.3f}"
        table.add_row(result.task, result.metric, f"{result.value:.3f}", f"{result.stderr:.3f}", chance, str(result.n))
    return table


def write_json(path: Path, model: str, adapter: Path | None, results: Sequence[TaskResult]) -> None:
    """Write scores and per-example outcomes of `evaluate_model`.

    Raises:
        StorageError: if the file cannot be written.
    """
    document = {
        "schema": 1,
        "model": model,
        "adapter": None if adapter is None else str(adapter),
        "tasks": {result.task: result.model_dump(mode="json", exclude={"task"}) for result in results},
    }
    atomic_write(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
