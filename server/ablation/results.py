"""`ablation.json`, the whole outcome of an ablation as one document, and `ablation_outcomes.json`, to recompute it from.

    schema        1
    name, about   of the plan
    answer        the result in plain sentences
    command       that made it
    plan          its base configuration, full method and rows
    cells         name -> what it is, its means and tasks over random seeds, cost, routing, digests, failures
    effects       full method minus cell, for each measure: difference, stderr, low, high, p, p_holm, …
    missing       comparisons that could not be made, with their reasons
    notes         what a reader must know
    base, lineage, config, versions   as in `results.json`

SCHEMA.md describes every field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from seedbed.common.drift import TextDrift
from seedbed.common.errors import DataError
from seedbed.common.files import atomic_write
from seedbed.common.manifest import BaseIdentity, Record
from seedbed.server.ablation.effects import MeanOf, Measure, Missing, Observations, Observed, PartEffect
from seedbed.server.ablation.values import Cell, Plan
from seedbed.server.evaluation.results import LineageNode, RouterUse, read_document

ABLATION = "ablation.json"
ABLATION_OUTCOMES = "ablation_outcomes.json"


class TaskMean(Record):
    """One cell on one task, over random seeds."""

    metric: str
    value: float
    stderr: float
    n: int
    held_in: bool
    seen_by_seed: bool
    """Whether the seed adapter was trained on it."""
    chance: float | None = None


class CellCost(Record):
    """What a cell cost, with everything in its lineage, over its random seeds; shared parts count in every cell."""

    trainings: int = 0
    seconds: float = 0.0
    tokens: int = 0
    bytes_moved: int = 0


class CellResult(Record):
    """One variant and how it does."""

    cell: Cell
    digests: dict[int, str | None] = Field(default_factory=dict)
    """Random seed -> digest of the candidate; null is the base model."""
    failures: dict[int, str] = Field(default_factory=dict)
    means: dict[Measure, MeanOf] = Field(default_factory=dict)
    """Over the cell's own tasks, whatever its metrics."""
    tasks: dict[str, TaskMean] = Field(default_factory=dict)
    cost: CellCost = CellCost()
    routing: RouterUse | None = None
    """Over all random seeds."""


class AblationResults(Record):
    """Everything that a report is written from."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    version: Literal[1] = Field(1, alias="schema")
    name: str
    answer: str
    command: str = ""
    plan: Plan
    cells: dict[str, CellResult]
    effects: tuple[PartEffect, ...] = ()
    missing: tuple[Missing, ...] = ()
    notes: tuple[str, ...] = ()
    base: BaseIdentity | None = None
    lineage: tuple[LineageNode, ...] = ()
    config: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)

    def of_measure(self, measure: Measure) -> list[PartEffect]:
        """Comparisons in the order of the cells."""
        return [effect for effect in self.effects if effect.measure == measure]

    def effect(self, cell: str, measure: Measure) -> PartEffect | None:
        return next((effect for effect in self.of_measure(measure) if effect.cell == cell), None)

    @property
    def seeds(self) -> list[int]:
        """All random seeds that anything was measured with."""
        return sorted({seed for cell in self.cells.values() for seed in cell.digests})


def save(directory: Path, results: AblationResults, observed: Observations) -> None:
    """Write `ablation.json` and `ablation_outcomes.json`.

    Raises:
        StorageError: if they cannot be written.
    """
    document = {cell: {str(seed): _packed(one) for seed, one in seeds.items()} for cell, seeds in observed.items()}
    # Without indentation: it is long, and read by programs.
    packed = json.dumps({"schema": 1, "cells": document}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    atomic_write(directory / ABLATION_OUTCOMES, (packed + "\n").encode())
    text = json.dumps(results.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(directory / ABLATION, (text + "\n").encode())


def load(directory: Path) -> AblationResults:
    """Read `ablation.json`.

    Raises:
        DataError: if it is missing, damaged or of another schema.
    """
    path = directory / ABLATION
    document = read_document(path, "ablation", _AGAIN)
    try:
        return AblationResults.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path} is not an ablation of this version: {where}: {first['msg']}", _AGAIN) from None


def load_outcomes(directory: Path) -> dict[str, dict[int, Observed]]:
    """Read `ablation_outcomes.json`: everything that effects are computed from.

    Raises:
        DataError: if it is missing, damaged or of another schema.
    """
    path = directory / ABLATION_OUTCOMES
    try:
        cells = read_document(path, "ablation", _AGAIN)["cells"]
        return {cell: {int(seed): _unpacked(packed) for seed, packed in seeds.items()} for cell, seeds in cells.items()}
    except (KeyError, ValueError, AttributeError, TypeError):
        raise DataError(f"{path} is not a file of outcomes", _AGAIN) from None


_AGAIN = "Evaluate the plan again with `seedbed ablate --resume`."


def _packed(observed: Observed) -> dict[str, Any]:
    return {
        "digest": observed.digest,
        "held_in": sorted(observed.held_in),
        "seen_by_seed": sorted(observed.seen),
        "own": dict(observed.own),
        "drift": None if observed.drift is None else observed.drift.model_dump(mode="json"),
        "tasks": {task: _digits(values) for task, values in observed.outcomes.items()},
    }


def _digits(values: Sequence[float]) -> str | list[float]:
    if all(value in (0.0, 1.0) for value in values):
        return "".join(str(int(value)) for value in values)
    return list(values)


def _unpacked(packed: Mapping[str, Any]) -> Observed:
    return Observed(
        outcomes={task: tuple(float(digit) for digit in digits) for task, digits in packed["tasks"].items()},
        held_in=frozenset(packed["held_in"]),
        seen=frozenset(packed["seen_by_seed"]),
        own={task: float(value) for task, value in packed["own"].items()},
        drift=None if packed["drift"] is None else TextDrift.model_validate(packed["drift"]),
        digest=packed["digest"],
    )
