"""Effects of parts: by numbers one can do in the head, against scipy, and in a plan whose effects are known."""

from __future__ import annotations

from collections.abc import Sequence

import laboratory
import numpy as np
import pytest
import scipy.stats

from seedbed.common.drift import TextDrift
from seedbed.server.ablation.effects import (
    MEASURES,
    Measure,
    Missing,
    Observed,
    PartEffect,
    effects,
    linearized,
    mean_of,
    observations,
)
from seedbed.server.ablation.values import Cell, CellOutcome
from seedbed.server.evaluation.statistics import holm

ALL = ("zero_shot_accuracy", "task_performance", "generalization_performance")


def cell(name: str, row: str = "row", **more: object) -> Cell:
    return Cell.model_validate(
        {"name": name, "row": "" if name == "full" else row, "candidate": "c", "metrics": ALL} | more
    )


def seen(tasks: dict[str, str], held_in: str = "", **more: object) -> Observed:
    """Tasks with their outcomes as digits; `held_in` names tasks by their letters."""
    outcomes = {task: tuple(map(float, digits)) for task, digits in tasks.items()}
    return Observed(outcomes=outcomes, held_in=frozenset(held_in), **more)  # type: ignore[arg-type]


def compared(full: Observed, other: Observed) -> tuple[dict[Measure, PartEffect], list[Missing]]:
    found, missing = effects([cell("full"), cell("x")], {"full": {0: full}, "x": {0: other}}, resamples=200)
    return {effect.measure: effect for effect in found}, missing


def test_each_measure_takes_its_own_tasks() -> None:
    full = seen({"a": "1110", "b": "11", "z": "1100"}, held_in="ab", own={"a": 1.0, "b": 0.5})
    other = seen({"a": "1010", "b": "01", "z": "1000"}, held_in="ab", own={"a": 1.0, "b": 0.5})
    found, missing = compared(full, other)
    assert (found["held_out"].full, found["held_out"].value, found["held_out"].difference) == (0.5, 0.25, 0.25)
    assert found["held_out"].tasks == ("z",)
    assert found["held_in"].difference == pytest.approx(0.375), "1/4 in a and 1/2 in b"
    assert found["retention"].full == pytest.approx(1.375), "3/4 of 1, and 1 of 1/2"
    assert found["retention"].difference == pytest.approx((0.25 + 1.0) / 2)
    assert [(one.measure, one.reason) for one in missing] == [
        (measure, "general text was not measured, or not the same text, in both") for measure in ("kl", "perplexity")
    ]


def test_a_task_that_the_seed_adapter_saw_is_not_zero_shot() -> None:
    tasks = {"y": "10", "z": "11"}
    found, _ = compared(seen(tasks), seen(tasks, seen=frozenset("y")))
    assert found["held_out"].tasks == ("z",)


def test_a_task_is_compared_only_where_both_count_it_alike_and_have_its_examples() -> None:
    full = seen({"a": "11", "b": "10", "z": "1111"}, held_in="ab")
    other = seen({"a": "01", "b": "10", "z": "111"}, held_in="a")
    found, missing = compared(full, other)
    assert found["held_in"].tasks == ("a",)
    assert "held_out" not in found
    assert Missing(cell="x", measure="held_out", reason="no task is zero-shot for both") in missing


def test_retention_is_of_each_seeds_own_expert_and_leaves_out_what_has_none() -> None:
    full = seen({"a": "10", "b": "11"}, held_in="ab", own={"a": 0.5, "b": 0.0})
    other = seen({"a": "10", "b": "11"}, held_in="ab", own={"a": 1.0})
    found, _ = compared(full, other)
    assert (found["retention"].tasks, found["retention"].difference) == (("a",), 0.5)


def test_linearized_texts_have_the_means_over_tokens() -> None:
    drift = TextDrift(kl=0.4, perplexity=2.0, tokens=(10, 30), kls=(1.0, 0.2), losses=(0.5, 0.9))
    assert linearized(drift, "kl").mean() == pytest.approx((10 * 1.0 + 30 * 0.2) / 40)
    assert linearized(drift, "perplexity").mean() == pytest.approx(np.exp((10 * 0.5 + 30 * 0.9) / 40))


def test_errors_on_general_text_are_those_of_resampled_texts() -> None:
    drift = laboratory.drift(0.2, texts=120)
    counts = np.array(drift.tokens, dtype=float)

    def over_tokens(values: Sequence[float], texts: np.ndarray) -> np.ndarray:
        return (np.array(values)[texts] * counts[texts]).sum(-1) / counts[texts].sum(-1)

    draws = np.random.default_rng(1).integers(0, 120, (4000, 120))
    for measure, expected in (
        ("kl", over_tokens(drift.kls, draws).std()),
        ("perplexity", np.exp(over_tokens(drift.losses, draws)).std()),
    ):
        measured = mean_of({0: seen({"a": "1"}, drift=drift)}, measure)  # type: ignore[arg-type]
        assert measured is not None
        assert measured.value == pytest.approx(drift.kl if measure == "kl" else drift.perplexity)
        assert measured.stderr == pytest.approx(expected, rel=0.06)


def test_other_texts_are_not_compared() -> None:
    one, other = laboratory.drift(0.1, random_seed=1), laboratory.drift(0.1, random_seed=2)
    _, missing = compared(seen({"a": "1"}, drift=one), seen({"a": "1"}, drift=other))
    assert {"kl", "perplexity"} <= {one.measure for one in missing}


def test_cells_are_compared_on_the_seeds_that_they_share_with_the_full_method() -> None:
    right, wrong = seen({"z": "11"}), seen({"z": "00"})
    observed = {"full": {0: right, 1: right}, "x": {1: wrong, 2: right}, "y": {2: right}}
    found, missing = effects([cell("full"), cell("x"), cell("y", "other")], observed, resamples=200)
    (effect,) = found
    assert (effect.cell, effect.seeds, effect.difference) == ("x", (1,), 1.0)
    reason = "no random seed has an outcome of it and of the full method"
    assert [one.reason for one in missing if one.cell == "y"] == [reason] * 5


def test_without_the_full_method_nothing_is_compared() -> None:
    found, missing = effects([cell("full"), cell("x")], {"full": {}, "x": {0: seen({"z": "1"})}})
    assert found == []
    assert {one.reason for one in missing} == {"the full method has no outcome"}


def test_a_rows_cells_are_compared_on_the_tasks_that_all_of_them_have() -> None:
    full = seen({"a": "11", "b": "11", "c": "11"}, held_in="abc")
    two, one = seen({"a": "10", "b": "00", "c": "00"}, held_in="ab"), seen({"a": "00", "b": "00"}, held_in="a")
    cells = [cell("full"), cell("two"), cell("one"), cell("else", "elsewhere")]
    found, _ = effects(cells, {"full": {0: full}, "two": {0: two}, "one": {0: one}, "else": {0: two}}, resamples=200)
    tasks = {effect.cell: effect.tasks for effect in found if effect.measure == "held_in"}
    assert tasks == {"two": ("a",), "one": ("a",), "else": ("a", "b")}, "another row is not touched"


def test_the_full_method_under_another_name_is_no_comparison() -> None:
    full, other = seen({"z": "1100"}, digest="d"), seen({"z": "1000"}, digest="e")
    cells = [cell("full"), cell("same"), cell("marked", is_full=True), cell("x")]
    observed = {"full": {0: full}, "same": {0: full}, "marked": {0: full}, "x": {0: other}}
    found, _ = effects(cells, observed, resamples=200)
    assert [effect.same for effect in found] == [True, True, False]
    assert [effect.p_holm for effect in found] == [1.0, 1.0, found[-1].p], "one comparison needs no correction"


def test_the_correction_counts_the_comparisons_of_one_measure() -> None:
    outcomes = laboratory.outcomes()
    found, _ = effects([one.cell for one in outcomes], observations(outcomes), resamples=1000)
    for measure in MEASURES:
        group = [effect for effect in found if effect.measure == measure and not effect.same]
        assert [effect.p_holm for effect in group] == holm([effect.p for effect in group])
    assert len([effect for effect in found if effect.measure == "held_out" and not effect.same]) == 10


def test_the_order_of_rows_cells_and_seeds_changes_no_number() -> None:
    outcomes = laboratory.outcomes()
    moved = [
        outcome.model_copy(update={"seeds": {seed: outcome.seeds[seed] for seed in (2, 0, 1)}})
        for outcome in reversed(outcomes)
    ]

    def by_name(ones: Sequence[CellOutcome]) -> dict[tuple[str, str], PartEffect]:
        found, _ = effects([one.cell for one in ones], observations(ones), resamples=500)
        return {(effect.cell, effect.measure): effect for effect in found}

    assert by_name(moved) == by_name(outcomes)


def test_other_names_of_the_seeds_change_no_number() -> None:
    outcomes = laboratory.outcomes()
    renamed = [one.model_copy(update={"seeds": {9 - seed: run for seed, run in one.seeds.items()}}) for one in outcomes]

    def numbers(ones: Sequence[CellOutcome]) -> list[dict[str, object]]:
        found, _ = effects([one.cell for one in ones], observations(ones), resamples=500)
        return [effect.model_dump(exclude={"seeds"}) for effect in found]

    assert numbers(renamed) == numbers(outcomes)


def test_a_plan_with_known_effects_is_estimated_right() -> None:
    """Bias and coverage of every cell's effect, over 100 whole plans of three random seeds."""
    plans = [laboratory.outcomes(spread=0.06, random_seed=run) for run in range(100)]
    found: dict[str, list[PartEffect]] = {}
    for run, outcomes in enumerate(plans):
        kept = [
            outcome.model_copy(update={"cell": outcome.cell.model_copy(update={"metrics": ALL[:1]})})
            for outcome in outcomes
        ]
        for effect in effects([one.cell for one in kept], observations(kept), seed=run, resamples=400)[0]:
            if not effect.same:
                found.setdefault(effect.cell, []).append(effect)
    covered = []
    for name, group in found.items():
        true = laboratory.TRUE[name]
        values = [effect.difference for effect in group]
        assert np.mean(values) == pytest.approx(true, abs=3.5 * scipy.stats.sem(values)), name
        covered += [effect.low <= true <= effect.high for effect in group]
    assert len(covered) == 1000
    assert 0.93 <= np.mean(covered) <= 0.975


def test_noise_that_the_correction_lets_through_is_rare() -> None:
    """Plans of ten comparisons without any effect: at least one stands in at most one plan of twenty."""
    nothing = dict.fromkeys(laboratory.TRUE, 0.0)
    wrong = 0
    for run in range(60):
        outcomes = laboratory.outcomes(random_seed=run, true=nothing)
        kept = [one.model_copy(update={"cell": one.cell.model_copy(update={"metrics": ALL[:1]})}) for one in outcomes]
        found, _ = effects([one.cell for one in kept], observations(kept), seed=run, resamples=2000)
        wrong += any(effect.is_clear for effect in found)
    assert wrong <= 6
