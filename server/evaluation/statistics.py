"""Errors and intervals of accuracies. Pure functions over arrays.

Tasks count as fixed and examples as drawn: an interval says what other examples of the same tasks would have given,
not what other tasks would. The paired bootstrap follows Efron & Tibshirani (1993), chapter 16; pairing by example
removes the examples' difficulty, which both candidates share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000


def standard_error(outcomes: ArrayLike) -> float:
    """Standard error of the mean of outcomes, ``s / sqrt(n)`` with the sample deviation s; as lm-eval computes it.

    Of a single outcome nothing is known: it gets 0.5, the largest that a proportion can have.
    """
    values = np.asarray(outcomes, dtype=np.float64)
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else 0.5


def mean_over_tasks(values: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Unweighted mean of independent accuracies, each task counting once, and its standard error ``sqrt(Σ e²) / T``."""
    return math.fsum(values) / len(values), math.sqrt(math.fsum(error**2 for error in errors)) / len(values)


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher one mean accuracy is than another, with a 95 % interval and a two-sided p-value."""

    value: float
    low: float
    high: float
    p: float
    tasks: int
    n: int
    """Paired examples, over all tasks."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_difference(
    ours: Mapping[str, ArrayLike], theirs: Mapping[str, ArrayLike], *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """Difference of mean accuracy (over the tasks that both have) by a paired bootstrap, stratified by task.

    Args:
        ours: outcomes by task, in the order of the task's examples.
        theirs: outcomes of the candidate that is compared with.
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        ValueError: if they share no task, or a shared task has another number of examples.
    """
    tasks = sorted(set(ours) & set(theirs))
    if not tasks:
        raise ValueError("the two candidates were measured on no task in common")
    differences = [_paired(task, ours[task], theirs[task]) for task in tasks]
    value = float(np.mean([difference.mean() for difference in differences]))
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(difference, resamples, rng) for difference in differences], axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    n = sum(difference.size for difference in differences)
    return Difference(value, float(low), float(high), _p_value(means), len(tasks), n)


def _paired(task: str, ours: ArrayLike, theirs: ArrayLike) -> NDArray[np.float64]:
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"task {task} has {a.size} outcomes of one candidate and {b.size} of the other")
    return a - b


def _resampled_means(differences: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    # Drawing n of n with replacement draws multinomial counts of the distinct values (-1, 0, 1 for right and wrong):
    # the same distribution as resampling indices, with no array of resamples × n.
    values, counts = np.unique(differences, return_counts=True)
    drawn = rng.multinomial(differences.size, counts / differences.size, size=resamples)
    means: NDArray[np.float64] = drawn @ values / differences.size
    return means


def _p_value(means: NDArray[np.float64]) -> float:
    """Two-sided, by inverting the percentile interval; never 0, as resamples are finite (Davison & Hinkley, 1997)."""
    tail = min(int(np.sum(means <= 0)), int(np.sum(means >= 0)))
    return min(1.0, 2 * (tail + 1) / (means.size + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for so many comparisons (Holm, 1979): each is below 0.05 only if the family-wise error is."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = running
    return adjusted
