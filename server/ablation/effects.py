"""What each part of a method earned: the full method minus every cell, paired by task, example and random seed.

Every measure becomes numbers ``[seeds, examples]`` for each task, whose mean is the measure:

    held_out     outcomes of zero-shot tasks: neither an expert nor the seed adapter was trained on them
    held_in      outcomes of the experts' own tasks
    retention    the same, over the accuracy of the task's own expert alone (of that seed), which counts as given
    kl           divergence from the base model on general text, one number for each text
    perplexity   on general text; like kl a ratio of sums over tokens, linearized (delta method)

A row is measured on the tasks that all its cells and the full method have, so that its cells can be compared with each
other too; a cell on the seeds that it and the full method have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from seedbed.common.drift import TextDrift
from seedbed.common.manifest import Record
from seedbed.server.ablation.values import Cell, CellOutcome, Metric, SeedOutcome
from seedbed.server.evaluation.statistics import RESAMPLES, holm, seeded_difference, seeded_mean

FULL = "full"
Measure = Literal["held_out", "held_in", "retention", "kl", "perplexity"]
MEASURES: tuple[Measure, ...] = ("held_out", "held_in", "retention", "kl", "perplexity")
OF_METRIC: dict[Metric, tuple[Measure, ...]] = {
    "zero_shot_accuracy": ("held_out",),
    "task_performance": ("held_in", "retention"),
    "generalization_performance": ("held_out", "kl", "perplexity"),
}
LOWER_IS_BETTER: frozenset[Measure] = frozenset({"kl", "perplexity"})
_NOTHING: dict[Measure, str] = {
    "held_out": "no task is zero-shot for both",
    "held_in": "no task is held in for both",
    "retention": "no held-in task has its own expert's accuracy in both",
    "kl": "general text was not measured, or not the same text, in both",
    "perplexity": "general text was not measured, or not the same text, in both",
}
Values = dict[str, NDArray[np.float64]]
Stratum = tuple[str, str]
"""A task, and what its examples must have in common: their number, or the texts' lengths."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What effects are computed from, of one cell and one random seed."""

    outcomes: Mapping[str, Sequence[float]]
    held_in: frozenset[str]
    seen: frozenset[str] = frozenset()
    """Tasks that the seed adapter was trained on."""
    own: Mapping[str, float] = field(default_factory=dict)
    drift: TextDrift | None = None
    digest: str | None = None

    @classmethod
    def of(cls, outcome: SeedOutcome) -> Observed:
        return cls(
            outcomes={score.task: score.outcomes for score in outcome.scores},
            held_in=frozenset(score.task for score in outcome.scores if score.held_in),
            seen=frozenset(outcome.seen_by_seed),
            own=outcome.own,
            drift=outcome.drift if outcome.drift is None or _is_finite(outcome.drift) else None,
            digest=outcome.digest,
        )

    def strata(self, measure: Measure) -> set[Stratum]:
        """What there is of a measure."""
        if measure in LOWER_IS_BETTER:
            return set() if self.drift is None else {("text", repr(self.drift.tokens))}
        return {(task, str(len(self.outcomes[task]))) for task in self.tasks(measure)}

    def tasks(self, measure: Measure) -> set[str]:
        if measure == "held_out":
            return {task for task in self.outcomes if task not in self.held_in | self.seen}
        inside = set(self.outcomes) & self.held_in
        return inside if measure == "held_in" else {task for task in inside if self.own.get(task, 0.0) > 0}

    def numbers(self, measure: Measure, task: str) -> NDArray[np.float64]:
        """One number for each example, whose mean is the measure."""
        if measure in LOWER_IS_BETTER:
            assert self.drift is not None
            return linearized(self.drift, measure)
        values = np.asarray(self.outcomes[task], dtype=np.float64)
        return values / self.own[task] if measure == "retention" else values


def _is_finite(drift: TextDrift) -> bool:
    # A model that says nothing at all of some token has an infinite divergence, which has no mean.
    return all(map(math.isfinite, (*drift.kls, *drift.losses, drift.perplexity)))


Observations = Mapping[str, Mapping[int, Observed]]
"""Cell -> random seed -> what was measured."""


def observations(outcomes: Iterable[CellOutcome]) -> dict[str, dict[int, Observed]]:
    return {
        outcome.cell.name: {seed: Observed.of(outcome.seeds[seed]) for seed in sorted(outcome.seeds)}
        for outcome in outcomes
    }


def linearized(drift: TextDrift, measure: Measure) -> NDArray[np.float64]:
    """Numbers of texts whose mean is the mean over tokens (or its exponential), and whose deviations are its influences.

    With weights ``w_i = c_i / mean(c)`` of the texts' token counts, ``z_i = m + w_i (x_i - m)``: the ratio estimator's
    first-order expansion (Cochran, *Sampling Techniques*, 1977, chapter 6).
    """
    counts = np.asarray(drift.tokens, dtype=np.float64)
    weights = counts / counts.mean()
    values = np.asarray(drift.kls if measure == "kl" else drift.losses, dtype=np.float64)
    mean = float((weights * values).mean())
    deviations: NDArray[np.float64] = weights * (values - mean)
    return mean + deviations if measure == "kl" else math.exp(mean) * (1 + deviations)


class PartEffect(Record):
    """How much higher a measure is of the full method than of one cell."""

    cell: str
    row: str
    measure: Measure
    full: float
    """Of the full method, on the same tasks and seeds."""
    full_stderr: float
    value: float
    """Of the cell."""
    value_stderr: float
    difference: float
    """Full minus cell: what the part earned (of `kl` and `perplexity`, what it cost)."""
    stderr: float
    low: float
    high: float
    p: float
    p_holm: float
    """Adjusted for all comparisons of this measure in the plan."""
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    n: int
    """Examples, over all tasks, each with every seed."""
    same: bool = False
    """The cell is the full method itself (equal digests), and nothing was compared."""

    @property
    def is_clear(self) -> bool:
        """Whether it stands after Holm's correction."""
        return not self.same and self.p_holm < 0.05

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Missing(Record):
    """A comparison that could not be made."""

    cell: str
    measure: Measure
    reason: str


class MeanOf(Record):
    """A measure of one cell, over its own tasks."""

    value: float
    stderr: float
    """Over examples and, with several of them, over random seeds."""
    by_seed: dict[int, float]
    tasks: int
    n: int


def mean_of(seeds: Mapping[int, Observed], measure: Measure) -> MeanOf | None:
    """Mean over the tasks that all seeds have; none without any."""
    strata = _common(one.strata(measure) for one in seeds.values())
    if not strata:
        return None
    values = _stacked(seeds, sorted(seeds), measure, strata)
    value, spread = seeded_mean(values)
    by_seed = np.mean([array.mean(axis=1) for array in values.values()], axis=0)
    return MeanOf(
        value=value,
        stderr=spread.stderr,
        by_seed={seed: float(mean) for seed, mean in zip(sorted(seeds), by_seed, strict=True)},
        tasks=len(values),
        n=sum(array.shape[1] for array in values.values()),
    )


def effects(
    cells: Sequence[Cell], observed: Observations, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[list[PartEffect], list[Missing]]:
    """All comparisons that the rows' metrics ask for, in the order of the cells, and those that could not be made.

    Neither the order of cells nor that of seeds changes a number.

    Args:
        cells: with the full method, which is named `full`.
        seed: of the bootstrap.
    """
    found: list[PartEffect] = []
    missing: list[Missing] = []
    for cell in cells:
        for measure in measures_of(cell):
            strata = _row_strata(cell, cells, observed, measure)
            if isinstance(strata, str):
                missing.append(Missing(cell=cell.name, measure=measure, reason=strata))
            else:
                found.append(_effect(cell, observed, measure, strata, seed, resamples))
    adjusted = {measure: _adjusted(found, measure) for measure in MEASURES}
    return [effect.model_copy(update={"p_holm": adjusted[effect.measure][effect.cell]}) for effect in found], missing


def measures_of(cell: Cell) -> list[Measure]:
    """In the order of `MEASURES`; none for the full method, which is compared with nothing."""
    wanted = {measure for metric in cell.metrics for measure in OF_METRIC[metric]}
    return [measure for measure in MEASURES if measure in wanted and cell.name != FULL]


def shared_seeds(cell: str, observed: Observations) -> list[int]:
    """Random seeds that the cell and the full method both have."""
    return sorted(set(observed.get(cell, {})) & set(observed.get(FULL, {})))


def _adjusted(found: Sequence[PartEffect], measure: Measure) -> dict[str, float]:
    compared = [effect for effect in found if effect.measure == measure and not effect.same]
    p_values = holm([effect.p for effect in compared])
    equal = {effect.cell: 1.0 for effect in found if effect.measure == measure and effect.same}
    return equal | {effect.cell: p for effect, p in zip(compared, p_values, strict=True)}


def _row_strata(cell: Cell, cells: Sequence[Cell], observed: Observations, measure: Measure) -> set[Stratum] | str:
    """What this cell, the full method and the row's other cells have in common, or why there is nothing."""
    seeds = shared_seeds(cell.name, observed)
    if not observed.get(FULL):
        return "the full method has no outcome"
    if not seeds:
        return "no random seed has an outcome of it and of the full method"
    own = _pair_strata(cell.name, observed, measure)
    if not own:
        return _NOTHING[measure]
    siblings = [one.name for one in cells if one.row == cell.row and measure in measures_of(one)]
    others = [strata for name in siblings if (strata := _pair_strata(name, observed, measure))]
    return _common([own, *others]) or own


def _pair_strata(cell: str, observed: Observations, measure: Measure) -> set[Stratum]:
    seeds = shared_seeds(cell, observed)
    return _common(observed[name][seed].strata(measure) for name in (cell, FULL) for seed in seeds)


def _common(sets: Iterable[set[Stratum]]) -> set[Stratum]:
    found = list(sets)
    return set.intersection(*found) if found else set()


def _stacked(
    seeds: Mapping[int, Observed], chosen: Sequence[int], measure: Measure, strata: Iterable[Stratum]
) -> Values:
    return {
        task: np.stack([seeds[seed].numbers(measure, task) for seed in chosen]) for task, _ in sorted(strata)
    }  # fmt: skip


def _effect(
    cell: Cell, observed: Observations, measure: Measure, strata: set[Stratum], seed: int, resamples: int
) -> PartEffect:
    seeds = shared_seeds(cell.name, observed)
    ours, theirs = (_stacked(observed[name], seeds, measure, strata) for name in (FULL, cell.name))
    difference = seeded_difference(ours, theirs, seed=seed, resamples=resamples)
    (full, full_spread), (value, spread) = seeded_mean(ours), seeded_mean(theirs)
    return PartEffect(
        cell=cell.name,
        row=cell.row,
        measure=measure,
        full=full,
        full_stderr=full_spread.stderr,
        value=value,
        value_stderr=spread.stderr,
        difference=difference.value,
        stderr=difference.stderr,
        low=difference.low,
        high=difference.high,
        p=difference.p,
        p_holm=difference.p,
        seeds=tuple(seeds),
        tasks=tuple(sorted(ours)),
        n=difference.n,
        same=cell.is_full or all(_equal(observed[FULL][one], observed[cell.name][one]) for one in seeds),
    )


def _equal(ours: Observed, theirs: Observed) -> bool:
    return ours.digest is not None and ours == theirs
