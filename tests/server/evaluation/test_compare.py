"""From scores to comparisons and to the answer in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest

from seedbed.server.evaluation.compare import Measured, build_results
from seedbed.server.evaluation.results import Results
from seedbed.server.evaluation.statistics import standard_error
from seedbed.server.evaluation.suite import TaskResult


def score(task: str, right: int, n: int, *, held_in: bool) -> TaskResult:
    """`right` of `n` examples, the first ones, are right."""
    outcomes = (1.0,) * right + (0.0,) * (n - right)
    return TaskResult(
        task=task,
        metric="acc",
        value=right / n,
        n=n,
        stderr=standard_error(outcomes),
        held_in=held_in,
        chance=0.25,
        acc_norm=right / n,
        outcomes=outcomes,
    )


def measured(name: str, held_in: Sequence[int], held_out: Sequence[int], n: int = 100) -> Measured:
    scores = [score(f"in{place}", right, n, held_in=True) for place, right in enumerate(held_in)]
    return Measured(
        name, [*scores, *(score(f"out{place}", right, n, held_in=False) for place, right in enumerate(held_out))]
    )


def compare(rows: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> Results:
    return build_results("test", [measured(name, *row) for name, row in rows.items()])[0]


CLEAR: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "base": ([30, 30], [40, 40]),
    "seed": ([50, 50], [45, 45]),
    "expert:in0": ([90, 30], [40, 42]),
    "expert:in1": ([40, 80], [44, 40]),
    "average": ([70, 70], [50, 70]),
    "unseeded": ([50, 50], [45, 55]),
    "joint": ([80, 80], [60, 70]),
}


def test_means_count_each_task_once_and_keep_held_in_apart() -> None:
    average = compare(CLEAR).candidates["average"].mean
    assert average.held_out is not None
    assert average.held_in is not None
    assert average.all is not None
    assert (average.held_in.value, average.held_out.value, average.all.value) == pytest.approx((0.70, 0.60, 0.65))
    assert (average.held_in.tasks, average.all.tasks) == (2, 4)


def test_differences_are_candidate_minus_reference_with_their_sign() -> None:
    results = compare(CLEAR)
    above, below = results.effect("average", "base", "held_out"), results.effect("average", "joint", "held_out")
    assert above is not None
    assert below is not None
    assert above.difference == pytest.approx(0.20)
    assert 0.1 < above.low < 0.2 < above.high < 0.3
    assert below.difference == pytest.approx(-0.05)
    assert below.high < 0


def test_every_model_is_compared_with_the_base() -> None:
    results = compare(CLEAR)
    for name in ("seed", "average", "unseeded", "joint"):
        assert results.effect(name, "base", "held_in") is not None
    assert results.effect("expert:in0", "base", "held_in") is None


def test_every_held_in_task_with_its_own_expert_is_a_reference() -> None:
    own = compare(CLEAR).candidates["experts:own"]
    assert own.kind == "reference"
    assert {task: found.value for task, found in own.tasks.items()} == {"in0": 0.9, "in1": 0.8}
    assert own.mean.held_out is None


def test_the_mean_of_the_experts_is_a_reference_on_every_task() -> None:
    mean = compare(CLEAR).candidates["experts:mean"]
    assert mean.tasks["in0"].value == pytest.approx(0.65)
    assert mean.tasks["out1"].value == pytest.approx(0.41)


def test_experts_that_were_measured_on_their_own_task_only_have_no_means() -> None:
    rows = [measured("base", [30, 30], [40])]
    rows += [Measured(f"expert:in{place}", [score(f"in{place}", 90, 100, held_in=True)]) for place in (0, 1)]
    results = build_results("test", rows)[0]
    assert results.candidates["expert:in0"].mean.held_in is None
    assert "experts:mean" not in results.candidates
    assert results.candidates["experts:own"].mean.held_in is not None


def test_the_answer_names_the_best_merge_and_what_it_is_better_than() -> None:
    text = compare(CLEAR).answer
    assert text.startswith("On the 2 held-out tasks, which no expert was trained on,")
    first = text.split(". ")[0]
    assert "best combined model is the seeded average: 60.0 % accuracy on average, 20.0 points above the base" in text
    assert "above the base model (95 % interval +" in first, "the first sentence says how much, and how sure that is"
    assert "15.0 points above the seed alone" in text
    assert "10.0 points above the average of unseeded experts" in text
    assert "5.0 points below joint training on all data" in text
    assert "chance" not in text


def test_the_answer_admits_that_an_interval_includes_zero() -> None:
    text = compare({"base": ([50], [50]), "average": ([50], [51])}).answer
    assert "1.0 points above the base model (95 % interval 0.0 to +3.0, which includes zero)." in text
    assert text.endswith("A difference whose interval includes zero may be chance.")


def test_the_answer_does_not_hide_a_loss() -> None:
    text = compare({"base": ([50], [60]), "average": ([50], [40])}).answer
    assert "20.0 points below the base model" in text


def test_where_another_merge_is_best_the_seeded_average_is_still_compared_with_the_unseeded() -> None:
    text = compare({"base": ([5], [40]), "average": ([5], [50]), "unseeded": ([5], [70])}).answer
    assert "best combined model is the unseeded average" in text
    assert "The seeded average is 20.0 points below the average of unseeded experts" in text


def test_without_held_out_tasks_the_answer_is_about_the_held_in_ones() -> None:
    text = compare({"base": ([40], []), "average": ([60], [])}).answer
    assert text.startswith("On the 1 held-in task the best combined model is the seeded average: 60.0 % accuracy, 20")


def test_without_merges_the_best_other_model_is_named() -> None:
    assert "the best model is the joint training" in compare({"base": ([4], [4]), "joint": ([9], [9])}).answer


def test_without_any_whole_candidate_there_is_no_best() -> None:
    rows = [Measured("expert:in0", [score("in0", 5, 10, held_in=True)])]
    assert build_results("test", rows)[0].answer.startswith("No candidate was measured on every task")


def test_p_values_are_adjusted_for_all_comparisons_of_a_scope() -> None:
    results = compare(CLEAR)
    for effect in results.effects:
        assert effect.p <= effect.p_holm <= 1
    count = sum(effect.scope == "held_out" for effect in results.effects)
    smallest = min(effect.p for effect in results.effects if effect.scope == "held_out")
    assert min(e.p_holm for e in results.effects if e.scope == "held_out") == pytest.approx(count * smallest)


def test_outcomes_are_those_of_the_measured_candidates_only() -> None:
    _, outcomes = build_results("test", [measured(name, *row) for name, row in CLEAR.items()])
    assert set(outcomes) == set(CLEAR)
    assert sum(outcomes["average"]["out1"]) == 70


def test_numbers_in_the_answer_never_show_a_negative_zero() -> None:
    text = compare({"base": ([50], [50]), "average": ([50], [50])}).answer
    assert "level with the base model (95 % interval 0.0 to 0.0)" in text
    assert not re.search(r"[−-]0\.0", text)
