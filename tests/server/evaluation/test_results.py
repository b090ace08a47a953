"""Results on disk: what is written is read back, and what is not a result is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seedbed.common.errors import DataError
from seedbed.common.routing.diagnostics import LayerDiagnostics
from seedbed.server.evaluation import results as files
from seedbed.server.evaluation.compare import Measured, build_results
from seedbed.server.evaluation.suite import TaskResult


def measured(name: str, outcomes: tuple[float, ...]) -> Measured:
    value = sum(outcomes) / len(outcomes)
    score = TaskResult(
        task="t", metric="acc", value=value, n=len(outcomes), stderr=0.1, held_in=False, outcomes=outcomes
    )
    return Measured(name, [score], digest="ab" * 32, rank=8, parameters=100)


def test_results_and_outcomes_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [measured("base", (1.0, 0.0, 0.0)), measured("average", (1.0, 0.5, 0.0))]
    results, outcomes = build_results("test", rows)
    files.save(tmp_path, results, outcomes)
    assert files.load(tmp_path) == results
    assert files.load_outcomes(tmp_path) == {name: dict(tasks) for name, tasks in outcomes.items()}


def test_right_and_wrong_are_written_as_digits(tmp_path: Path) -> None:
    rows = [measured("base", (1.0, 0.0, 0.0)), measured("average", (1.0, 0.5, 0.0))]
    files.save(tmp_path, *build_results("test", rows))
    document = json.loads((tmp_path / "outcomes.json").read_text(encoding="utf-8"))
    assert document == {"schema": 1, "outcomes": {"base": {"t": "100"}, "average": {"t": [1.0, 0.5, 0.0]}}}


def test_results_hold_no_outcomes_and_name_their_schema_first(tmp_path: Path) -> None:
    files.save(tmp_path, *build_results("test", [measured("base", (1.0, 0.0))]))
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert next(iter(json.loads(text))) == "schema"
    assert "outcomes" not in text


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    rows = [measured("base", (1.0, 0.0, 0.0, 1.0)), measured("average", (1.0, 1.0, 0.0, 0.0))]
    for folder in ("one", "two"):
        files.save(tmp_path / folder, *build_results("test", rows))
    assert (tmp_path / "one/results.json").read_bytes() == (tmp_path / "two/results.json").read_bytes()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not valid JSON"),
        ("[]", "schema None"),
        ('{"schema": 2}', "schema 2, expected 1"),
        ('{"schema": 1, "name": "x"}', "answer: Field required"),
        ('{"schema": 1, "name": "x", "answer": "", "candidates": {}, "new": 1}', "new: Extra inputs"),
    ],
)
def test_what_is_not_a_result_is_refused_with_the_reason(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=told):
        files.load(tmp_path)


def test_a_directory_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results\.json cannot be read: No such file") as refused:
        files.load(tmp_path)
    assert "--resume" in refused.value.hint


def test_damaged_outcomes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outcomes.json").write_text('{"schema": 1, "outcomes": {"base": {"t": "1x0"}}}', encoding="utf-8")
    with pytest.raises(DataError, match="not a file of outcomes"):
        files.load_outcomes(tmp_path)


def test_chance_is_the_mean_over_the_tasks_of_a_scope_and_unknown_if_one_is() -> None:
    def guess(task: str, chance: float | None, held_in: bool) -> TaskResult:
        outcomes = (1.0, 0.0)
        return TaskResult(
            task=task, metric="acc", value=0.5, n=2, stderr=0.5, held_in=held_in, chance=chance, outcomes=outcomes
        )

    rows = [Measured("base", [guess("a", 0.25, False), guess("b", 0.5, False), guess("c", 0.2, True)])]
    results, _ = build_results("test", rows)
    assert (results.chance("held_out"), results.chance("held_in")) == (0.375, 0.2)
    assert results.chance("all") == pytest.approx(0.95 / 3)
    unknown, _ = build_results("test", [Measured("base", [guess("a", 0.25, False), guess("b", None, False)])])
    assert unknown.chance("held_out") is None
    assert unknown.chance("held_in") is None, "there is no such task"


def test_every_field_is_described_in_the_schema_document() -> None:
    document = (Path(__file__).parents[3] / "server/evaluation/SCHEMA.md").read_text(encoding="utf-8")
    models = (files.CandidateResult, files.Effect, files.Score, files.Cost, files.LineageNode, files.Estimate)
    models += (files.GeneralText, files.RouterUse, LayerDiagnostics)
    fields = {name for model in models for name in model.model_fields}
    fields |= {field.alias or name for name, field in files.Results.model_fields.items()}
    assert {name for name in fields if f"`{name}`" not in document} == set()
