"""The values of an ablation: a plan of rows, the cells that it comes to, and what was measured of each.

    plan (YAML)  ->  cells  ->  one run of the federation for each distinct configuration and random seed
                            ->  outcomes of every cell and seed  ->  effects against the full method  ->  report

A *cell* is one variant of the full method: the plan's configuration with some settings changed, and the candidate of it that is
measured. Cells share whatever artifacts they can: those are addressed by what made them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from seedbed.common.drift import TextDrift
from seedbed.common.manifest import Record
from seedbed.server.evaluation.results import RouterUse
from seedbed.server.evaluation.suite import TaskResult

Metric = Literal["zero_shot_accuracy", "task_performance", "generalization_performance"]
"""`zero_shot_accuracy`: mean over held-out tasks. `task_performance`: mean over held-in tasks, and as a share of each task's
own expert alone (retention). `generalization_performance`: mean over held-out tasks, and divergence and perplexity on general
text."""
Action = Literal["keep", "remove", "replace"]


class Row(Record):
    """One part of the method that is taken away or changed."""

    label: str
    part: tuple[str, ...]
    """Paths of the configuration (`routing_tuning.kl_weight`), `candidate`, or options of the full candidate
    (`options.retention`). Several are changed together."""
    action: Action
    values: tuple[Any, ...] = ()
    """Of `replace`: one cell each."""
    metrics: tuple[Metric, ...] = ("zero_shot_accuracy",)


class Plan(Record):
    """An ablation plan, complete."""

    name: str
    about: str = ""
    """What it asks, in a sentence."""
    config: str
    """Preset or file that the full method is configured by."""
    changes: tuple[str, ...] = ()
    """`key.path=value` on top of it."""
    full: str
    """Name of the candidate that is the full method."""
    rows: tuple[Row, ...]


class Cell(Record):
    """One variant."""

    name: str
    """Unique in the plan and readable, such as `routing_tuning.kl_weight=0`; the full method is `full`."""
    row: str
    """Label of its row; empty for the full method."""
    value: str = ""
    """What stands in the place of the part, for axes and tables."""
    number: float | None = None
    """The same where it is a number, for curves."""
    candidate: str
    """Which candidate of the configuration is measured."""
    changes: tuple[str, ...] = ()
    """On top of the plan's own."""
    metrics: tuple[Metric, ...] = ("zero_shot_accuracy",)
    is_full: bool = False
    """The full method itself under another name, as one point of its row's curve: there is no effect to test."""


class SeedOutcome(Record):
    """What one cell gave with one random seed."""

    digest: str | None
    """Of the candidate; none is the base model, or what is computed from the scores of several (`oracle`, `experts`)."""
    of: tuple[str, ...] = ()
    """Digests of those several."""
    scores: tuple[TaskResult, ...]
    """With the outcome of every example; `held_in` is with respect to the experts."""
    seen_by_seed: tuple[str, ...] = ()
    """Tasks whose data the seed adapter was trained on."""
    own: dict[str, float] = Field(default_factory=dict)
    """Accuracy of each held-in task's own expert alone (of the same configuration and seed), where it was measured."""
    drift: TextDrift | None = None
    routing: RouterUse | None = None
    trainings: int = 0
    """Distinct trainings in the candidate's lineage."""
    seconds: float = 0.0
    """Of computing, in its lineage."""
    tokens: int = 0
    bytes_moved: int = 0


class CellOutcome(Record):
    """A cell with what was measured, by random seed."""

    cell: Cell
    seeds: dict[int, SeedOutcome] = Field(default_factory=dict)
    failures: dict[int, str] = Field(default_factory=dict)
    """Random seed -> why there is nothing."""
