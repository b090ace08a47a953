"""Measuring a model on tasks, from files to scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.basemodel import load
from seedbed.common.config import BaseModelConfig
from seedbed.common.errors import AdapterMismatchError, ConfigError
from seedbed.common.examples import Example
from seedbed.common.manifest import BaseIdentity
from seedbed.common.scoring import SeedbedLM
from seedbed.common.storage import write_adapter
from seedbed.common.tasks import EvalTask, task_from_examples
from seedbed.server.evaluation.suite import evaluate, evaluate_model, results_table, write_json


@pytest.fixture(scope="module")
def lm() -> SeedbedLM:
    return SeedbedLM(*load(BaseModelConfig(model="embedded"), "cpu"))


def questions(labels: Sequence[int]) -> list[Example]:
    return [Example(f"What is {n} + {n}?", (str(2 * n), str(2 * n + 1)), label) for n, label in enumerate(labels, 1)]


def write(path: Path, examples: Sequence[Example]) -> Path:
    records = [{"prompt": e.prompt, "choices": list(e.choices), "label": e.label} for e in examples]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_scores_agree_with_likelihoods_looked_at_directly(lm: SeedbedLM) -> None:
    examples = questions([0, 1, 0, 1, 1, 0])
    (result,) = evaluate(lm, [task_from_examples("sums", examples, "Q: {prompt}\nA:", held_in=True)])
    right = []
    for example in examples:
        pairs = [(example.context("Q: {prompt}\nA:"), example.continuation(choice)) for choice in example.choices]
        likelihoods = [value for value, _ in lm.score(pairs)]
        right.append(float(likelihoods.index(max(likelihoods)) == example.label))
    assert result.outcomes == tuple(right)
    assert result.value == sum(right) / 6
    assert (result.task, result.metric, result.n, result.held_in, result.chance) == ("sums", "acc", 6, True, 0.5)
    assert result.acc_norm is not None


def test_complementary_labels_give_complementary_accuracies(lm: SeedbedLM) -> None:
    labels = [0, 1, 1, 0, 1]
    tasks = [task_from_examples("a", questions(labels)), task_from_examples("b", questions([1 - n for n in labels]))]
    first, second = evaluate(lm, tasks)
    assert first.value + second.value == pytest.approx(1.0)
    assert first.stderr == pytest.approx(second.stderr)


def test_chance_is_one_over_the_number_of_choices_on_average(lm: SeedbedLM) -> None:
    examples = [Example("a", ("x", "y")), Example("b", ("x", "y", "z", "w"))]
    (result,) = evaluate(lm, [task_from_examples("t", examples)])
    assert result.chance == pytest.approx(0.375)


def test_a_limit_takes_the_first_examples_and_tasks_can_be_used_again(lm: SeedbedLM) -> None:
    task = task_from_examples("sums", questions([0, 1, 0, 1, 1, 0]))
    (whole,) = evaluate(lm, [task])
    (part,) = evaluate(lm, [task], limit=4)
    (again,) = evaluate(lm, [task])
    assert part.outcomes == whole.outcomes[:4]
    assert again == whole


def test_an_adapter_changes_the_outcome_and_taking_it_off_restores_it(lm: SeedbedLM) -> None:
    task = task_from_examples("sums", questions([0, 1] * 10))
    (base,) = evaluate(lm, [task])
    modules: dict[str, LoraFactors] = {}
    generator = torch.Generator().manual_seed(0)
    for name, module in lm.model.named_modules():
        if name.endswith("o_proj"):
            A, B = torch.randn(2, module.in_features, generator=generator), torch.randn(module.out_features, 2)
            modules[name] = LoraFactors(A, B, 5.0)
    lm.set_adapter(Adapter(modules))
    (broken,) = evaluate(lm, [task])
    lm.set_adapter(None)
    (restored,) = evaluate(lm, [task])
    assert broken.outcomes != base.outcomes
    assert restored == base


def test_progress_counts_every_choice_of_every_task_and_nothing_is_printed(
    lm: SeedbedLM, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[int, int]] = []
    tasks = [task_from_examples(name, questions([0, 1])) for name in "ab"]
    evaluate(lm, tasks, on_progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (8, 8)
    assert lm.progress is None
    assert "".join(capfd.readouterr()) == ""


def test_no_tasks_give_no_scores(lm: SeedbedLM) -> None:
    assert evaluate(lm, []) == []


def test_evaluating_a_model_from_files_and_writing_it_as_json(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.test.jsonl", questions([0, 1, 0, 1]))
    results, tasks = evaluate_model("embedded", None, [str(path)], 3)
    assert [len(task.task.eval_docs) for task in tasks] == [4]
    write_json(tmp_path / "out.json", "embedded", None, results)
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert document["model"] == "embedded"
    assert document["tasks"]["sums"]["n"] == 3
    assert document["tasks"]["sums"]["value"] == pytest.approx(sum(document["tasks"]["sums"]["outcomes"]) / 3)
    assert results_table(results).row_count == 1


def a_module(lm: SeedbedLM) -> tuple[str, Any]:
    return next((name, module) for name, module in lm.model.named_modules() if name.endswith("q_proj"))


def test_an_adapter_of_another_base_model_is_refused(lm: SeedbedLM, tmp_path: Path) -> None:
    name, module = a_module(lm)
    adapter = Adapter({name: LoraFactors(torch.ones(1, module.in_features), torch.ones(module.out_features, 1), 1.0)})
    write_adapter(tmp_path / "adapter", adapter, kind="expert", base=BaseIdentity(name="other", digest="f" * 64))
    path = write(tmp_path / "sums.test.jsonl", questions([0]))
    with pytest.raises(AdapterMismatchError, match="other"):
        evaluate_model("embedded", tmp_path / "adapter", [str(path)])


def test_a_task_named_twice_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.test.jsonl", questions([0]))
    with pytest.raises(ConfigError, match="named 'sums'"):
        evaluate_model("embedded", None, [str(path), str(path)])


def test_a_group_counts_as_one_task_over_all_its_examples(lm: SeedbedLM) -> None:
    large, small = task_from_examples("large", questions([0, 1, 0])), task_from_examples("small", questions([1]))
    apart = evaluate(lm, [large, small])
    (together,) = evaluate(lm, [EvalTask("both", {**large.parts, **small.parts})])
    assert (together.task, together.n) == ("both", 4)
    assert together.outcomes == apart[0].outcomes + apart[1].outcomes
    assert together.value == (3 * apart[0].value + apart[1].value) / 4


def test_a_task_may_name_the_metric_that_counts(lm: SeedbedLM) -> None:
    examples = [Example("Say", ("a", "a very much longer answer than that", "no"), n % 3) for n in range(6)]
    task = task_from_examples("t", examples)
    (plain,) = evaluate(lm, [task])
    (normalized,) = evaluate(lm, [EvalTask("t", task.parts, metric="acc_norm")])
    assert (plain.metric, normalized.metric) == ("acc", "acc_norm")
    assert normalized.value == plain.acc_norm
