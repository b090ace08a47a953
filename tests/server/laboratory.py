"""A made-up ablation whose effects are known: every cell is right on an example with a probability that is written here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from seedbed.common.drift import TextDrift
from seedbed.common.routing.diagnostics import LayerDiagnostics
from seedbed.server.ablation.values import Cell, CellOutcome, Plan, Row, SeedOutcome
from seedbed.server.evaluation.results import RouterUse
from seedbed.server.evaluation.statistics import standard_error
from seedbed.server.evaluation.suite import TaskResult

HELD_IN = {"sum": 80, "mood": 60, "join": 25}
HELD_OUT = {"odd": 160, "shape": 90, "trick": 40}
ALL = ("zero_shot_accuracy", "task_performance", "generalization_performance")
TRUE: dict[str, float] = {
    "full": 0.0,
    "seed.mode=none": 0.2,
    "candidate=uniform": 0.0,
    "candidate=learned": -0.02,
    "routing_tuning.kl_weight=0": 0.0,
    "options.retention=0.6": 0.08,
    "options.retention=0.8": 0.0,
    "options.retention=1.0": 0.03,
    "method=ties,of=experts": 0.1,
    "method=ties,of=tuned": 0.05,
    "method=dare,of=experts": 0.12,
    "method=dare,of=tuned": 0.02,
}
"""Cell -> how much accuracy it lacks, on every task and for every seed."""
PLAN = Plan(
    name="made-up",
    about="Whether the statistics find what was put in.",
    config="embedded",
    changes=("training.steps=50",),
    full="learned",
    rows=(
        Row(label="seed_expert", part=("seed.mode",), action="remove", metrics=ALL),
        Row(label="routing", part=("candidate",), action="replace", values=("uniform", "learned")),
        Row(label="kl_loss", part=("routing_tuning.kl_weight",), action="remove", metrics=ALL[1:]),
        Row(label="svd_retention", part=("options.retention",), action="replace", values=(0.6, 0.8, 1.0), metrics=ALL),
        Row(
            label="merge rule and experts",
            part=("method", "of"),
            action="replace",
            values=(("ties", "experts"), ("ties", "tuned"), ("dare", "experts"), ("dare", "tuned")),
        ),
    ),
)


def cells(plan: Plan = PLAN) -> list[Cell]:
    found = [Cell(name="full", row="", candidate=plan.full, metrics=ALL)]
    names = iter(list(TRUE)[1:])
    for row in plan.rows:
        for value in row.values or ("none",):
            parts = value if isinstance(value, tuple) else (value,)
            name = next(names)
            found.append(
                Cell(
                    name=name,
                    row=row.label,
                    value=", ".join(map(str, parts)),
                    number=value if isinstance(value, float) else None,
                    candidate=str(value) if row.label == "routing" else plan.full,
                    changes=(name,),
                    metrics=row.metrics,
                    is_full=name == "options.retention=0.8",
                )
            )
    return found


def score(task: str, outcomes: Sequence[float], held_in: bool) -> TaskResult:
    return TaskResult(
        task=task,
        metric="acc",
        value=math.fsum(outcomes) / len(outcomes),
        n=len(outcomes),
        stderr=standard_error(outcomes),
        held_in=held_in,
        chance=0.25,
        outcomes=tuple(outcomes),
    )


def drift(kl: float, loss: float = 1.5, texts: int = 30, random_seed: int = 0) -> TextDrift:
    """Texts of 5 to 64 tokens, of which each diverges by half of `kl` to one and a half times as much."""
    rng = np.random.default_rng(random_seed)
    counts = np.sort(rng.integers(5, 65, texts))
    kls, losses = kl * rng.uniform(0.5, 1.5, texts), loss * rng.uniform(0.8, 1.2, texts)
    return TextDrift(
        kl=float(kls @ counts / counts.sum()),
        perplexity=float(np.exp(losses @ counts / counts.sum())),
        update_norm=1.0,
        tokens=tuple(int(count) for count in counts),
        kls=tuple(map(float, kls)),
        losses=tuple(map(float, losses)),
    )


def routing() -> RouterUse:
    def layer(load: tuple[float, ...]) -> LayerDiagnostics:
        return LayerDiagnostics(
            tokens=10,
            entropy=0.3,
            relative_entropy=0.5,
            max_probability=max(load),
            load=load,
            likeliest=load,
            collapsed=False,
        )

    tasks = {"sum": layer((0.8, 0.1, 0.1)), "mood": layer((0.1, 0.7, 0.2))}
    layers = {"q_proj": layer((0.4, 0.4, 0.2)), "v_proj": layer((0.5, 0.3, 0.2))}
    return RouterUse(
        kind="learned", names=("sum", "mood", "join"), overall=layer((0.45, 0.35, 0.2)), tasks=tasks, layers=layers
    )


def outcomes(
    seeds: Sequence[int] = (0, 1, 2), *, spread: float = 0.03, random_seed: int = 0, true: Mapping[str, float] = TRUE
) -> list[CellOutcome]:
    """Of every cell: an example has its difficulty, a training run its luck (normal, of deviation `spread`).

    Two thirds of the examples fall out alike in all cells of a random seed, as they do for adapters that share most of
    their making; equal accuracies are then still equal in expectation.
    """
    rng = np.random.default_rng(random_seed)
    tasks = HELD_IN | HELD_OUT
    hard = {task: rng.uniform(0.45, 0.55, n) for task, n in tasks.items()}
    common = {seed: {task: rng.random(n) for task, n in tasks.items()} for seed in seeds}
    found = []
    for cell in cells():
        luck = {seed: rng.normal() * spread for seed in seeds}
        runs = {seed: _run(cell, hard, common[seed], luck[seed] - true[cell.name], rng) for seed in seeds}
        found.append(CellOutcome(cell=cell, seeds=runs))
    full = found[0].seeds
    return [one.model_copy(update={"seeds": full}) if one.cell.is_full else one for one in found]


def _run(
    cell: Cell,
    hard: Mapping[str, np.ndarray],
    common: Mapping[str, np.ndarray],
    shift: float,
    rng: np.random.Generator,
) -> SeedOutcome:
    scores = []
    for task, difficulty in hard.items():
        alike = rng.random(difficulty.size) < 2 / 3
        chance = np.where(alike, common[task], rng.random(difficulty.size))
        right = chance < difficulty + shift
        scores.append(score(task, [float(value) for value in right], task in HELD_IN))
    return SeedOutcome(
        digest=f"{rng.integers(1 << 62):064x}",
        scores=tuple(scores),
        seen_by_seed=tuple(HELD_IN),
        own=dict.fromkeys(HELD_IN, 0.8),
        drift=drift(0.3 if cell.name.startswith("routing_tuning") else 0.1, random_seed=3),
        routing=routing() if cell.candidate == "learned" and not cell.row else None,
        trainings=4,
        seconds=12.5,
        tokens=20_000,
        bytes_moved=1_000_000,
    )
