"""Errors and intervals against numbers by hand, against scipy, and against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from seedbed.server.evaluation.statistics import holm, mean_over_tasks, paired_difference, standard_error


def test_standard_error_by_hand() -> None:
    # Half of 4 right: deviations ±1/2, s² = 4 · 1/4 / 3 = 1/3, error = sqrt(1/3 / 4).
    assert standard_error([1, 1, 0, 0]) == pytest.approx(math.sqrt(1 / 12))


def test_standard_error_equals_scipy() -> None:
    outcomes = np.random.default_rng(0).random(57)
    assert standard_error(outcomes) == pytest.approx(scipy.stats.sem(outcomes))


def test_unanimous_outcomes_have_no_error_and_a_single_one_the_largest() -> None:
    assert standard_error([1, 1, 1]) == 0.0
    assert standard_error([1]) == 0.5


def test_mean_over_tasks_counts_each_task_once() -> None:
    # Errors 0.3 and 0.4 add up to 0.5 in square; halved, 0.25.
    assert mean_over_tasks([0.2, 0.6], [0.3, 0.4]) == (pytest.approx(0.4), pytest.approx(0.25))


def test_a_difference_is_the_mean_of_the_tasks_differences() -> None:
    ours = {"a": [1, 1], "b": [1, 0, 0, 0]}
    theirs = {"a": [0, 0], "b": [0, 0, 1, 0]}
    difference = paired_difference(ours, theirs)
    assert difference.value == pytest.approx(0.5), "1 in a, 0 in b, however many examples each has"
    assert (difference.tasks, difference.n) == (2, 6)


def test_equal_candidates_differ_by_exactly_nothing() -> None:
    difference = paired_difference({"a": [1, 0, 1]}, {"a": [1, 0, 1]})
    assert (difference.value, difference.low, difference.high, difference.p) == (0.0, 0.0, 0.0, 1.0)
    assert not difference.is_clear


def test_pairing_makes_a_steady_gain_clear_that_unpaired_errors_would_hide() -> None:
    theirs = [1] * 50 + [0] * 50
    ours = [1] * 60 + [0] * 40
    difference = paired_difference({"a": ours}, {"a": theirs})
    assert difference.value == pytest.approx(0.1)
    assert difference.is_clear
    unpaired = math.hypot(standard_error(ours), standard_error(theirs))
    assert difference.value < 1.96 * unpaired


def test_only_common_tasks_count() -> None:
    assert paired_difference({"a": [1], "b": [0]}, {"a": [0], "c": [1]}).tasks == 1
    with pytest.raises(ValueError, match="no task in common"):
        paired_difference({"a": [1]}, {"b": [1]})


def test_unequal_numbers_of_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="task a has 2 outcomes of one candidate and 1"):
        paired_difference({"a": [1, 0]}, {"a": [1]})


def test_equal_seeds_give_equal_intervals() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = {"a": rng.integers(0, 2, 80)}, {"a": rng.integers(0, 2, 80)}
    assert paired_difference(ours, theirs, seed=5) == paired_difference(ours, theirs, seed=5)
    assert paired_difference(ours, theirs, seed=5) != paired_difference(ours, theirs, seed=6)


def test_swapping_the_candidates_mirrors_the_interval() -> None:
    rng = np.random.default_rng(2)
    ours, theirs = {"a": rng.integers(0, 2, 200)}, {"a": rng.integers(0, 2, 200)}
    there, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert there.value == -back.value
    assert there.low == pytest.approx(-back.high, abs=0.01)


def test_the_interval_equals_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.integers(0, 2, 120), rng.integers(0, 2, 120)
    found = paired_difference({"a": ours}, {"a": theirs})
    expected = scipy.stats.bootstrap(
        (ours - theirs,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.012)


def test_fractional_outcomes_are_resampled_too() -> None:
    rng = np.random.default_rng(5)
    ours, theirs = rng.random(100), rng.random(100)
    found = paired_difference({"a": ours}, {"a": theirs})
    error = scipy.stats.sem(ours - theirs)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(400):
        # Ours is right where theirs is, and on a tenth of the rest: a true difference of 0.05 in each of three tasks.
        theirs = {task: rng.random(150) < 0.5 for task in "abc"}
        ours = {task: right | (rng.random(150) < 0.1) for task, right in theirs.items()}
        difference = paired_difference(ours, theirs, resamples=1000, seed=int(rng.integers(1 << 30)))
        covered += difference.low <= 0.05 <= difference.high
    assert 0.91 <= covered / 400 <= 0.98


def test_without_a_difference_small_p_values_are_rare() -> None:
    rng = np.random.default_rng(7)
    p = [
        paired_difference({"a": rng.integers(0, 2, 200)}, {"a": rng.integers(0, 2, 200)}, resamples=1000, seed=run).p
        for run in range(300)
    ]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.03, 0.04: times 3, 2, 1 is 0.03, 0.06, 0.04, and never less than the one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
