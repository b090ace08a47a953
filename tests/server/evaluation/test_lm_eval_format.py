"""Scores in lm-eval's own layout, beside what lm-eval itself writes of the same model and task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import make_table

from seedbed.common.basemodel import load
from seedbed.common.config import BaseModelConfig
from seedbed.common.scoring import SeedbedLM
from seedbed.common.tasks import EvalTask, quiet_lm_eval, task_from_jsonl
from seedbed.server.evaluation.lm_eval_format import lm_eval_results, sanitized, write_lm_eval
from seedbed.server.evaluation.suite import TaskResult, evaluate


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> EvalTask:
    path = tmp_path_factory.mktemp("data") / "sums.test.jsonl"
    questions = [
        {"prompt": f"What is {n} + {n}?", "choices": [str(2 * n), str(2 * n + 1)], "label": n % 2} for n in range(1, 7)
    ]
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return task_from_jsonl("sums", path)


@pytest.fixture(scope="module")
def lm() -> SeedbedLM:
    return SeedbedLM(*load(BaseModelConfig(model="embedded"), "cpu"))


@pytest.fixture(scope="module")
def theirs(lm: SeedbedLM, task: EvalTask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-eval writes into a file."""
    directory = tmp_path_factory.mktemp("theirs")
    tracker = EvaluationTracker(output_path=str(directory))
    with quiet_lm_eval():
        found = simple_evaluate(model=lm, tasks=[task.task], limit=4, bootstrap_iters=100)
        assert found is not None
        samples = found.pop("samples")
        tracker.general_config_tracker.log_experiment_args("seedbed", "", "", "", None)
        tracker.save_results_aggregated(results=found, samples=samples)
    (path,) = directory.rglob("results_*.json")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


@pytest.fixture(scope="module")
def scores(lm: SeedbedLM, task: EvalTask) -> list[TaskResult]:
    return evaluate(lm, [task], limit=4)


@pytest.fixture(scope="module")
def ours(scores: list[TaskResult], task: EvalTask) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(lm_eval_results("tiny", scores, tasks=[task]), default=str))
    return found


def test_the_scores_have_lm_evals_names_and_values(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    mine, real = ours["results"]["sums"], theirs["results"]["sums"]
    assert set(mine) == set(real)
    for key in ("acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"):
        assert mine[key] == pytest.approx(real[key]), key


def test_what_stands_beside_the_scores_is_what_lm_eval_writes(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for key in ("group_subtasks", "n-shot", "higher_is_better", "n-samples", "versions"):
        assert ours[key] == theirs[key], key
    config = theirs["configs"]["sums"]
    kept = {
        key: value for key, value in config.items() if isinstance(value, bool | int | str) and "0x" not in str(value)
    }
    assert {"task", "num_fewshot", "output_type", "repeats"} <= set(kept)
    assert {key: ours["configs"]["sums"][key] for key in kept} == kept
    assert ours["configs"]["sums"]["metric_list"] == config["metric_list"]


def test_every_entry_is_one_that_lm_eval_has_too(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert set(ours) <= set(theirs)
    assert {"model", "model_args", "limit", "bootstrap_iters"} <= set(theirs["config"])
    assert {"results", "configs", "versions", "n-shot", "n-samples", "config", "model_name"} <= set(ours)


def test_lm_eval_draws_its_table_of_it(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    def row(document: dict[str, Any]) -> list[str]:
        (line,) = [line for line in make_table(document).splitlines() if "|acc " in line.replace("| acc", "|acc")]
        return [cell.strip() for cell in line.strip("|").split("|")]

    assert row(ours) == row(theirs)
    assert row(ours)[0] == "sums"


def test_a_task_that_is_not_at_hand_is_described_by_its_scores(
    scores: list[TaskResult], theirs: dict[str, Any]
) -> None:
    found = lm_eval_results("tiny", scores)
    assert found["results"] == lm_eval_results("tiny", scores)["results"]
    assert found["n-samples"] == {"sums": {"original": 4, "effective": 4}}
    assert found["configs"]["sums"]["metric_list"] == theirs["configs"]["sums"]["metric_list"]
    assert make_table(found)


def test_it_is_written_where_lm_eval_would(scores: list[TaskResult], task: EvalTask, tmp_path: Path) -> None:
    path = write_lm_eval(tmp_path, "smollm2/average:1", scores, tasks=[task], settings={"adapter": "d" * 64})
    assert path.parent == tmp_path / "smollm2__average__1"
    assert path.name.startswith("results_")
    document = json.loads(path.read_text(encoding="utf-8"))
    assert (document["model_name"], document["config"]["adapter"]) == ("smollm2/average:1", "d" * 64)
    assert document["date"] > 1e9
    from lm_eval.utils import get_results_filenames, sanitize_model_name

    assert sanitized("smollm2/average:1") == sanitize_model_name("smollm2/average:1")
    assert get_results_filenames([str(path)]) == [str(path)]
