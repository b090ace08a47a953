"""Scores as lm-eval writes them, so that tools that read its results can read ours.

    path = write_lm_eval(directory, "smollm2+average", results)      directory/smollm2+average/results_DATE.json

The layout is that of lm-eval 0.4.13 (`lm_eval.evaluator.evaluate`, `EvaluationTracker.save_results_aggregated`): `results` by
task with `METRIC,FILTER` and `METRIC_stderr,FILTER`, and beside it `configs`, `versions`, `n-shot`, `higher_is_better`,
`n-samples`, `group_subtasks`, `config` and the name of the model. What is not known, such as the version of a task that is
not at hand, is `N/A`, as lm-eval has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from seedbed.common.files import atomic_write
from seedbed.common.tasks import EvalTask
from seedbed.common.versions import software_versions
from seedbed.server.evaluation.statistics import standard_error
from seedbed.server.evaluation.suite import TaskResult

_FILTER = "none"
_UNKNOWN = "N/A"
_LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")


def lm_eval_results(
    model: str,
    results: Sequence[TaskResult],
    *,
    tasks: Sequence[EvalTask] = (),
    settings: Mapping[str, Any] | None = None,
    date: float | None = None,
) -> dict[str, Any]:
    """The document of one model.

    Args:
        model: its name.
        results: of every task.
        tasks: what was measured, from which configurations, versions and numbers of shots are taken; a task that is not
            there is taken to be multiple choice without examples in its prompt.
        settings: further entries of `config`, such as the adapter's digest.
        date: seconds since the epoch; none leaves the entry out.
    """
    known = {task.name: task.task for task in tasks}
    configs = {result.task: _config(result, known.get(result.task)) for result in results}
    document: dict[str, Any] = {
        "results": {result.task: _scores(result) for result in results},
        "group_subtasks": {},
        "configs": configs,
        "versions": {result.task: _version(known.get(result.task)) for result in results},
        "n-shot": {name: config["num_fewshot"] for name, config in configs.items()},
        "higher_is_better": {
            result.task: {metric: metric not in _LOWER_IS_BETTER for metric in _metrics(result)} for result in results
        },
        "n-samples": {
            result.task: {"original": _original(result, known.get(result.task)), "effective": result.n}
            for result in results
        },
        "config": {"model": "seedbed", "model_args": "", "limit": None, "bootstrap_iters": 0, **(settings or {})},
        "lm_eval_version": software_versions().get("lm-eval", ""),
        "model_source": "seedbed",
        "model_name": model,
        "model_name_sanitized": sanitized(model),
    }
    return document if date is None else {**document, "date": date}


def write_lm_eval(
    directory: Path,
    model: str,
    results: Sequence[TaskResult],
    *,
    tasks: Sequence[EvalTask] = (),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the document where lm-eval would: `MODEL/results_DATE.json` in the directory.

    Raises:
        StorageError: if it cannot be written.
    """
    now = datetime.now()
    document = lm_eval_results(model, results, tasks=tasks, settings=settings, date=now.timestamp())
    path = directory / sanitized(model) / f"results_{now.isoformat().replace(':', '-')}.json"
    atomic_write(path, (json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n").encode())
    return path


def sanitized(model: str) -> str:
    """The name as a directory: lm-eval's replacement of signs that file systems refuse."""
    return re.sub(r'["<>:/|\\?*\[\]]+', "__", model)


def _metrics(result: TaskResult) -> list[str]:
    both = result.acc_norm is not None and result.metric != "acc_norm"
    return [result.metric, "acc_norm"] if both else [result.metric]


def _scores(result: TaskResult) -> dict[str, Any]:
    found: dict[str, Any] = {"name": result.task, "alias": result.task, "sample_len": result.n}
    found[f"{result.metric},{_FILTER}"] = result.value
    found[f"{result.metric}_stderr,{_FILTER}"] = result.stderr
    if "acc_norm" in _metrics(result)[1:]:
        found[f"acc_norm,{_FILTER}"] = result.acc_norm
        right = round((result.acc_norm or 0.0) * result.n)  # each example is right or wrong, so the mean says all
        found[f"acc_norm_stderr,{_FILTER}"] = standard_error([1.0] * right + [0.0] * (result.n - right))
    return found


def _config(result: TaskResult, task: Any) -> dict[str, Any]:
    if task is not None:
        config = dict(task.dump_config())
        # Tasks of files carry their documents in their configuration: those are data.
        config.pop("custom_dataset", None)
        return {"num_fewshot": 0, **config}
    metrics = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": metric not in _LOWER_IS_BETTER}
        for metric in _metrics(result)
    ]
    kind = {} if result.chance is None else {"output_type": "multiple_choice"}
    return {"task": result.task, "num_fewshot": 0, "metric_list": metrics, **kind, "repeats": 1}


def _version(task: Any) -> Any:
    return _UNKNOWN if task is None else getattr(task, "VERSION", _UNKNOWN)


def _original(result: TaskResult, task: Any) -> int:
    return result.n if task is None else len(task.eval_docs)
