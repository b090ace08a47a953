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
_FEW_VALUES = 16
_DRAWN_AT_ONCE = 1 << 20


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


@dataclass(frozen=True, slots=True)
class Spread:
    """Variance of a mean over tasks, examples and random seeds, by where it comes from."""

    seeds: float
    """Of the seeds' means, with whatever examples do differently from seed to seed; ``seed_count - 1`` degrees of freedom."""
    examples: float
    """Of the examples, beyond that: what all seeds share. With one seed, all that there is."""
    alone: float
    """Of the examples, had no other seeds been possible: the mean's variance is never less."""
    seed_count: int

    @property
    def stderr(self) -> float:
        return math.sqrt(max(self.seeds + self.examples, self.alone))


@dataclass(frozen=True, slots=True)
class SeededDifference(Difference):
    """A difference over several random seeds; its interval speaks of other examples and of other training runs."""

    stderr: float
    seeds: int


def seeded_mean(values: Mapping[str, ArrayLike]) -> tuple[float, Spread]:
    """Mean over tasks (each once), examples and seeds, and how sure it is.

    With examples crossed with seeds, ``x_si = μ + a_s + b_i + e_si`` in each task, the mean's variance is
    ``σ_a²/S + σ_b²/n + σ_e²/(S n)``. The seeds' means have a variance over S of ``σ_a²/S + σ_e²/(S n)``, the examples' over
    n of ``σ_b²/n + σ_e²/(S n)``; what they count twice is estimated from the residuals and taken off the second (two-way
    analysis of variance; Searle, Casella & McCulloch, *Variance Components*, 1992). Tasks are fixed strata.

    Args:
        values: by task, ``[seeds, examples]``; every task has the same seeds in the same order.

    Raises:
        ValueError: if there is no task, a task has no example, or tasks have different numbers of seeds.
    """
    arrays = list(_by_seed(values).values())
    count = arrays[0].shape[0]
    examples = [_example_variance(array.mean(axis=0)) / len(arrays) ** 2 for array in arrays]
    value = float(np.mean([array.mean() for array in arrays]))
    if count == 1:
        return value, Spread(0.0, math.fsum(examples), math.fsum(examples), 1)
    seeds = float(np.mean([array.mean(axis=1) for array in arrays], axis=0).var(ddof=1) / count)
    twice = math.fsum(_residual_variance(array) / len(arrays) ** 2 for array in arrays)
    alone = math.fsum(examples)
    return value, Spread(seeds, max(0.0, alone - twice), alone, count)


def seeded_difference(
    ours: Mapping[str, ArrayLike], theirs: Mapping[str, ArrayLike], *, seed: int = 0, resamples: int = RESAMPLES
) -> SeededDifference:
    """Difference of means, paired by task, random seed and example: a bootstrap over examples, a t distribution over seeds.

    Three seeds cannot be resampled: their percentile bootstrap covers the truth in about 75 cases of 100 where it says 95.
    So the difference's distribution is the sum of what resampled examples do (stratified by task, scaled to the part of the
    variance that is theirs) and of the seeds' standard error times a Student t of S - 1 degrees of freedom: the
    Behrens-Fisher distribution (Fisher, 1935), whose intervals are not too narrow whichever part is the larger. Two or three
    seeds may agree by luck, though, more than so many examples allow; so the interval reaches at least as far, and p is at
    least as large, as from the examples alone. With one seed that is all: `paired_difference`, with deviations over n - 1.

    Args:
        ours: by task, ``[seeds, examples]``.
        theirs: the same tasks, seeds and examples.
        seed: of the resampling.

    Raises:
        ValueError: if they share no task, or a shared task has another number of seeds or examples.
    """
    tasks = sorted(set(ours) & set(theirs))
    if not tasks:
        raise ValueError("the two candidates were measured on no task in common")
    differences = _by_seed({task: _paired(task, ours[task], theirs[task]) for task in tasks})
    value, spread = seeded_mean(differences)
    rng = np.random.default_rng(seed)
    noise = _example_noise(differences, resamples, rng)
    share = spread.examples / spread.alone if spread.alone else 0.0
    both = math.sqrt(share) * noise + _seed_noise(spread, resamples, rng)
    draws = [_without_dust(value + around) for around in (noise, both)]
    ends = [np.percentile(one, [2.5, 97.5]) for one in draws]
    return SeededDifference(
        value=value,
        low=float(min(low for low, _ in ends)),
        high=float(max(high for _, high in ends)),
        p=max(map(_p_value, draws)),
        tasks=len(tasks),
        n=sum(array.shape[1] for array in differences.values()),
        stderr=spread.stderr,
        seeds=spread.seed_count,
    )


def _by_seed(values: Mapping[str, ArrayLike]) -> dict[str, NDArray[np.float64]]:
    """Arrays ``[seeds, examples]`` with the seeds in an order of their own: naming them otherwise changes no bit of a sum."""
    arrays = {task: np.atleast_2d(np.asarray(values[task], dtype=np.float64)) for task in sorted(values)}
    if not arrays or any(array.size == 0 for array in arrays.values()):
        raise ValueError("there is no task, or a task without examples")
    if len({array.shape[0] for array in arrays.values()}) > 1:
        raise ValueError("the tasks were measured with different numbers of random seeds")
    order = np.lexsort(np.concatenate(list(arrays.values()), axis=1).T)
    return {task: array[order] for task, array in arrays.items()}


def _example_variance(means: NDArray[np.float64]) -> float:
    return standard_error(means) ** 2


def _residual_variance(array: NDArray[np.float64]) -> float:
    """``σ_e² / (S n)`` of one task ``[S, n]``; 0 for a single example, whose residual nobody sees."""
    seeds, examples = array.shape
    if examples == 1:
        return 0.0
    residuals = array - array.mean(axis=0) - array.mean(axis=1, keepdims=True) + array.mean()
    return float((residuals**2).sum() / ((seeds - 1) * (examples - 1)) / array.size)


def _without_dust(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Zero where rounding has left something beside it, so that ties with zero count as such."""
    return np.where(np.abs(draws) < 1e-12, 0.0, draws)


def _example_noise(
    differences: Mapping[str, NDArray[np.float64]], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """What resampled examples move the mean over seeds and tasks by, of variance `Spread.alone`."""
    means = [array.mean(axis=0) for array in differences.values()]
    noise: NDArray[np.float64] = np.mean([_centred(mean, resamples, rng) for mean in means], axis=0)
    return noise


def _centred(means: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    if means.size == 1:
        return standard_error(means) * rng.standard_normal(resamples)
    # Resampling n of n has the deviation over n; ours is over n - 1, as everywhere.
    wider = math.sqrt(means.size / (means.size - 1))
    few = np.unique(means).size <= _FEW_VALUES
    drawn = (_resampled_means if few else _redrawn_means)(means, resamples, rng)
    centred: NDArray[np.float64] = wider * (drawn - means.mean())
    return centred


def _redrawn_means(values: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """As `_resampled_means`, faster where most values are different: their places are drawn, some resamples at a time."""
    size = max(1, _DRAWN_AT_ONCE // values.size)
    starts = range(0, resamples, size)
    return np.concatenate(
        [
            values[rng.integers(0, values.size, (min(size, resamples - start), values.size))].mean(axis=1)
            for start in starts
        ]
    )


def _seed_noise(spread: Spread, resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    if spread.seed_count == 1:
        return np.zeros(resamples)
    from scipy.special import stdtrit

    # Equally likely values in random order rather than random values: the far tails of a t with one or two degrees of
    # freedom then do not depend on luck.
    quantiles = stdtrit(spread.seed_count - 1, (np.arange(resamples) + 0.5) / resamples)
    noise: NDArray[np.float64] = math.sqrt(spread.seeds) * rng.permutation(quantiles)
    return noise
