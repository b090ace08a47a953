"""Differences over random seeds: by hand, against scipy and statsmodels, and against what their intervals promise."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import statsmodels.formula.api as smf
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

from seedbed.server.evaluation.statistics import (
    SeededDifference,
    holm,
    paired_difference,
    seeded_difference,
    seeded_mean,
    standard_error,
)

Arrays = dict[str, np.ndarray]


def test_a_mean_counts_each_task_once_whatever_its_examples() -> None:
    value, spread = seeded_mean({"a": [[1, 1], [1, 1]], "b": [[0, 0, 0, 0], [1, 0, 0, 0]]})
    # a: 1; b: 1/8. The seeds' means over tasks are 1/2 and 5/8: s² = 2 · (1/16)² = 1/128, halved.
    assert value == pytest.approx(9 / 16)
    assert spread.seeds == pytest.approx(1 / 256)
    assert spread.seed_count == 2


def test_with_one_seed_the_error_is_that_of_independent_tasks() -> None:
    value, spread = seeded_mean({"a": [[1, 1, 0, 0]], "b": [[1, 0, 0, 0]]})
    errors = [standard_error([1, 1, 0, 0]), standard_error([1, 0, 0, 0])]
    assert value == pytest.approx(0.375)
    assert (spread.seeds, spread.stderr) == (0.0, pytest.approx(math.hypot(*errors) / 2))


def test_the_variance_is_that_of_a_two_way_analysis_of_variance() -> None:
    # For x_si = μ + a_s + b_i + e_si the grand mean's variance is (MS_seed + MS_example - MS_residual) / (S n).
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(4, 1)) + 2 * rng.normal(size=(1, 15)) + rng.normal(size=(4, 15))
    frame = pd.DataFrame([(s, i, grid[s, i]) for s in range(4) for i in range(15)], columns=["seed", "example", "x"])
    squares = anova_lm(smf.ols("x ~ C(seed) + C(example)", frame).fit())["mean_sq"]
    expected = (squares["C(seed)"] + squares["C(example)"] - squares["Residual"]) / grid.size
    value, spread = seeded_mean({"only": grid})
    assert value == pytest.approx(grid.mean())
    assert spread.seeds + spread.examples == pytest.approx(expected)
    assert spread.alone == pytest.approx(squares["C(example)"] / grid.size)
    assert spread.seeds == pytest.approx(squares["C(seed)"] / grid.size)


def test_where_only_seeds_differ_it_is_scipys_paired_t_test() -> None:
    ours, theirs = np.array([0.62, 0.55, 0.71, 0.6]), np.array([0.5, 0.52, 0.6, 0.57])
    found = seeded_difference({"a": np.tile(ours[:, None], 9)}, {"a": np.tile(theirs[:, None], 9)})
    expected = scipy.stats.ttest_rel(ours, theirs)
    low, high = expected.confidence_interval()
    assert (found.value, found.stderr) == pytest.approx(((ours - theirs).mean(), scipy.stats.sem(ours - theirs)))
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-4)
    assert found.p == pytest.approx(expected.pvalue, abs=3e-4)


def test_with_one_seed_the_interval_is_scipys_bootstrap_with_the_deviation_over_n_minus_1() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.integers(0, 2, 40), rng.integers(0, 2, 40)
    found = seeded_difference({"a": [ours]}, {"a": [theirs]})
    bootstrap = scipy.stats.bootstrap(
        (ours - theirs,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(4)
    )
    expected, value = bootstrap.confidence_interval, (ours - theirs).mean()
    wider = math.sqrt(40 / 39)
    ends = [value + wider * (end - value) for end in (expected.low, expected.high)]
    assert (found.low, found.high) == pytest.approx(ends, abs=0.026), "to one example's 1/40"
    assert found.stderr == pytest.approx(scipy.stats.sem(ours - theirs))
    assert found.stderr == pytest.approx(wider * bootstrap.standard_error, rel=0.03)


@pytest.mark.parametrize("n", [5, 40])
def test_few_or_many_different_values_are_resampled_as_scipy_does(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n) ** 3
    found = seeded_difference({"a": [values]}, {"a": [np.zeros(n)]})
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    wider = math.sqrt(n / (n - 1))
    ends = [values.mean() + wider * (end - values.mean()) for end in (expected.low, expected.high)]
    assert (found.low, found.high) == pytest.approx(ends, abs=0.03 * (expected.high - expected.low))


def test_seeds_that_all_say_the_same_leave_the_examples_error() -> None:
    rng = np.random.default_rng(5)
    ours, theirs = rng.integers(0, 2, 90), rng.integers(0, 2, 90)
    once = seeded_difference({"a": [ours]}, {"a": [theirs]})
    thrice = seeded_difference({"a": [ours] * 3}, {"a": [theirs] * 3})
    plain = paired_difference({"a": ours}, {"a": theirs})
    assert thrice.stderr == pytest.approx(once.stderr)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high), abs=1e-9)
    assert (once.low, once.high) == pytest.approx((plain.low, plain.high), abs=0.012)
    assert (once.seeds, thrice.seeds, thrice.n) == (1, 3, 90)


def test_equal_outcomes_differ_by_exactly_nothing() -> None:
    same = {"a": np.array([[1, 0, 1], [0, 0, 1]])}
    found = seeded_difference(same, same)
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_what_does_not_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="no task in common"):
        seeded_difference({"a": [[1]]}, {"b": [[1]]})
    with pytest.raises(ValueError, match="task a has 2 outcomes of one candidate and 3"):
        seeded_difference({"a": [[1, 0]]}, {"a": [[1, 0, 1]]})
    with pytest.raises(ValueError, match="different numbers of random seeds"):
        seeded_mean({"a": [[1], [0]], "b": [[1]]})


def test_a_single_example_is_as_uncertain_as_it_can_be() -> None:
    found = seeded_difference({"a": [[1.0]]}, {"a": [[0.0]]})
    assert found.stderr == 0.5
    assert (found.low, found.high) == pytest.approx((0.02, 1.98), abs=0.05)


def test_the_order_of_seeds_and_tasks_changes_no_bit() -> None:
    rng = np.random.default_rng(8)
    ours: Arrays = {task: rng.random((4, n)) for task, n in (("a", 30), ("b", 7), ("c", 11))}
    theirs: Arrays = {task: rng.random(array.shape) for task, array in ours.items()}
    order = [2, 0, 3, 1]
    moved = [{task: array[order] for task, array in reversed(one.items())} for one in (ours, theirs)]
    assert seeded_difference(*moved) == seeded_difference(ours, theirs)
    assert seeded_mean(moved[0]) == seeded_mean(ours)


TASKS = {"large": 150, "middle": 60, "small": 20}


def simulated(rng: np.random.Generator, seeds: int, effect: float, luck: float) -> tuple[Arrays, Arrays]:
    """Right or wrong of two candidates: examples are hard, training runs lucky, and half of the examples fall out alike."""
    hard = {task: rng.uniform(0.35, 0.65, n) for task, n in TASKS.items()}
    shifts = luck * rng.standard_normal((2, seeds, 1)) + np.array([effect, 0.0])[:, None, None]
    ours, theirs = {}, {}
    for task, difficulty in hard.items():
        common = rng.random((seeds, difficulty.size))
        for into, shift in ((ours, shifts[0]), (theirs, shifts[1])):
            alike = rng.random(common.shape) < 0.5
            into[task] = np.where(alike, common, rng.random(common.shape)) < difficulty + shift
    return ours, theirs


def differences(seeds: int, effect: float, luck: float, runs: int = 300) -> list[SeededDifference]:
    rng = np.random.default_rng(seeds)
    return [
        seeded_difference(*simulated(rng, seeds, effect, luck), seed=run, resamples=1000) for run in range(runs)
    ]  # fmt: skip


@pytest.mark.parametrize(("seeds", "luck"), [(1, 0.0), (2, 0.06), (3, 0.06), (3, 0.15), (5, 0.06)])
def test_intervals_cover_the_true_effect_as_often_as_they_say(seeds: int, luck: float) -> None:
    found = differences(seeds, 0.1, luck, runs=800)
    covered = np.mean([one.low <= 0.1 <= one.high for one in found])
    assert 0.93 <= covered <= 0.975, "95 %, give or take three standard errors"
    values = [one.value for one in found]
    assert np.mean(values) == pytest.approx(0.1, abs=3 * scipy.stats.sem(values)), "no bias"


@pytest.mark.parametrize("seeds", [2, 3])
def test_where_training_runs_hardly_differ_few_seeds_are_on_the_safe_side(seeds: int) -> None:
    covered = np.mean([one.low <= 0.1 <= one.high for one in differences(seeds, 0.1, 0.01)])
    assert covered >= 0.95


def test_seeds_that_agree_by_luck_are_believed_no_more_than_the_examples() -> None:
    # Both seeds find one more of 20 right, of different examples: no spread between seeds, much between examples.
    ours, theirs = np.zeros((2, 20)), np.zeros((2, 20))
    ours[0, :5], theirs[0, 5:9] = 1, 1
    ours[1, 9:14], theirs[1, 14:18] = 1, 1
    found = seeded_difference({"a": ours}, {"a": theirs})
    assert found.value == pytest.approx(0.05)
    assert found.stderr == pytest.approx(scipy.stats.sem((ours - theirs).mean(axis=0)))
    assert found.low < 0 < found.high
    assert found.p > 0.4


def test_standard_errors_are_the_deviation_of_the_estimates() -> None:
    found = differences(3, 0.1, 0.05)
    rms = math.sqrt(np.mean([one.stderr**2 for one in found]))
    assert rms == pytest.approx(np.std([one.value for one in found]), rel=0.12)


@pytest.mark.parametrize(("seeds", "luck"), [(1, 0.0), (3, 0.05)])
def test_without_an_effect_small_p_values_are_rare(seeds: int, luck: float) -> None:
    p = np.array([one.p for one in differences(seeds, 0.0, luck)])
    assert np.mean(p < 0.05) <= 0.08
    assert np.mean(p < 0.5) == pytest.approx(0.5, abs=0.1)


def test_resampling_three_seeds_would_be_far_too_sure() -> None:
    """What is avoided: the plain percentile bootstrap over seeds and examples."""
    rng = np.random.default_rng(9)
    covered = 0
    for _ in range(300):
        ours, theirs = simulated(rng, 3, 0.1, 0.06)
        by_seed = np.mean([ours[task].mean(1) - theirs[task].mean(1) for task in TASKS], axis=0)
        draws = by_seed[rng.integers(0, 3, (1000, 3))].mean(axis=1)
        low, high = np.percentile(draws, [2.5, 97.5])
        covered += low <= 0.1 <= high
    assert covered / 300 < 0.85


def test_holm_equals_statsmodels() -> None:
    p = np.random.default_rng(10).random(40) ** 3
    assert holm(list(p)) == pytest.approx(list(multipletests(p, method="holm")[1]))
    ties = [0.01, 0.01, 0.04, 0.04]
    assert holm(ties) == pytest.approx(list(multipletests(ties, method="holm")[1]))
