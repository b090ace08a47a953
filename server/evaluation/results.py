"""`results.json`, the whole outcome of a run as one document, and `outcomes.json`, from which anyone can recompute it.

    schema        1
    name          of the federation
    answer        the result in plain sentences
    command       that made it
    base          name and digest of the base model
    candidates    name -> what it is (kind, label, digest, rank, parameters, parents),
                  tasks: task -> metric, value, n, stderr, held_in, chance, acc_norm,
                  mean: held_in, held_out, all -> value, stderr, tasks (none where a task is missing),
                  general: kl, kl_stderr, perplexity, update_norm, texts, tokens on general text,
                  routing: what a mixture's router did, overall, by task and by layer
    effects       differences of mean accuracy: candidate, reference, scope, difference, low, high, p, p_holm, n, tasks
    diagnostics   name -> number, such as factor_gap_seeded
    lineage       adapters with digest, name, kind and the digests of their parents
    costs         of each training job: name, node, seconds, steps, examples, tokens
    config        the federation file, complete with defaults
    versions      of the software

SCHEMA.md describes every field. `outcomes.json` holds candidate -> task -> a string of 0 and 1, one for each example
in the order of the test file (a list of numbers where a metric has other values).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from seedbed.common.errors import DataError
from seedbed.common.files import atomic_write
from seedbed.common.manifest import BaseIdentity, Record
from seedbed.common.routing.diagnostics import LayerDiagnostics
from seedbed.server.evaluation.suite import Score

RESULTS = "results.json"
OUTCOMES = "outcomes.json"
Scope = Literal["held_in", "held_out", "all"]
Kind = Literal["base", "seed", "expert", "merge", "mixture", "joint", "reference"]
Outcomes = Mapping[str, Mapping[str, tuple[float, ...]]]
"""Candidate -> task -> the metric of each example."""


class Estimate(Record):
    """A mean over tasks, each task counting once, with its standard error."""

    value: float
    stderr: float
    tasks: int


class Means(Record):
    held_in: Estimate | None = None
    held_out: Estimate | None = None
    all: Estimate | None = None


class GeneralText(Record):
    """What a candidate does on text that has nothing to do with the tasks."""

    kl: float
    """Mean divergence ``KL(p_base ‖ p_candidate)`` of a token, in nats: how far it is from the base model."""
    kl_stderr: float
    """Over texts."""
    perplexity: float
    update_norm: float | None = None
    """``‖s B A x‖₂``, mean over tokens and modules; none for mixtures and for the base."""
    texts: int
    tokens: int


class RouterUse(Record):
    """What the router of a mixture did while the tasks were scored."""

    kind: str
    names: tuple[str, ...]
    """Of the experts, in the order of each `load`."""
    overall: LayerDiagnostics
    tasks: dict[str, LayerDiagnostics]
    """Over all layers, by task."""
    layers: dict[str, LayerDiagnostics]
    """Over all tasks, by layer."""


class CandidateResult(Record):
    """What one candidate is and how it does."""

    label: str
    """What people call it."""
    kind: Kind
    """`merge` is one adapter made of several, `mixture` several under a router; `reference` is computed from the experts'
    scores and is no model."""
    own_task: str | None = None
    """Of an expert."""
    digest: str | None = None
    rank: int | None = None
    parameters: int | None = None
    parents: tuple[str, ...] = ()
    tasks: dict[str, Score]
    mean: Means
    """None for a scope of which the candidate lacks a task that others have."""
    general: GeneralText | None = None
    routing: RouterUse | None = None
    """Of a mixture."""


class Effect(Record):
    """How much higher the candidate's mean accuracy is than the reference's; see `statistics.paired_difference`."""

    candidate: str
    reference: str
    scope: Scope
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    """Adjusted for all comparisons of this scope."""
    n: int
    tasks: int

    @property
    def is_clear(self) -> bool:
        return self.low > 0 or self.high < 0


class LineageNode(Record):
    digest: str
    name: str
    kind: str
    parents: tuple[str, ...] = ()


class Cost(Record):
    """What one training job took."""

    name: str
    node: str = ""
    seconds: float = 0.0
    steps: int = 0
    examples: int = 0
    tokens: int = 0


class Results(Record):
    """Everything that a report is written from."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    version: Literal[1] = Field(1, alias="schema")
    name: str
    answer: str
    command: str = ""
    base: BaseIdentity | None = None
    candidates: dict[str, CandidateResult]
    effects: tuple[Effect, ...] = ()
    diagnostics: dict[str, float] = Field(default_factory=dict)
    lineage: tuple[LineageNode, ...] = ()
    costs: tuple[Cost, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader must know, such as participants that were left out."""
    config: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)

    def effect(self, candidate: str, reference: str, scope: Scope) -> Effect | None:
        """The difference of that pair in that scope, where it was computed."""
        for effect in self.effects:
            if (effect.candidate, effect.reference, effect.scope) == (candidate, reference, scope):
                return effect
        return None

    def chance(self, scope: Scope) -> float | None:
        """Mean accuracy of guessing over the tasks of a scope; none where it is unknown for one of them."""
        known = {name: score.chance for entry in self.candidates.values() for name, score in entry.tasks.items()}
        inside = {"held_in": (True,), "held_out": (False,), "all": (True, False)}[scope]
        chances = [known[name] for name, held_in in self.tasks.items() if held_in in inside]
        numbers = [chance for chance in chances if chance is not None]
        return sum(numbers) / len(numbers) if numbers and len(numbers) == len(chances) else None

    @property
    def tasks(self) -> dict[str, bool]:
        """Task -> whether it is held in; held-in tasks first, each part in the order of its first candidate."""
        found: dict[str, bool] = {}
        for candidate in self.candidates.values():
            for name, score in candidate.tasks.items():
                found.setdefault(name, score.held_in)
        return dict(sorted(found.items(), key=lambda item: not item[1]))


def save(directory: Path, results: Results, outcomes: Outcomes) -> None:
    """Write `results.json` and `outcomes.json`.

    Raises:
        StorageError: if they cannot be written.
    """
    atomic_write(directory / OUTCOMES, _dump({"schema": 1, "outcomes": _packed(outcomes)}))
    atomic_write(directory / RESULTS, _dump(results.model_dump(mode="json", by_alias=True)))


def load(directory: Path) -> Results:
    """Read `results.json`.

    Raises:
        DataError: if it is missing, damaged or of another schema.
    """
    path = directory / RESULTS
    document = read_document(path, "run", _AGAIN)
    try:
        return Results.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path} is not a result of this version: {where}: {first['msg']}", _AGAIN) from None


def load_outcomes(directory: Path) -> dict[str, dict[str, tuple[float, ...]]]:
    """Read `outcomes.json`.

    Raises:
        DataError: if it is missing, damaged or of another schema.
    """
    path = directory / OUTCOMES
    try:
        return {
            candidate: {task: tuple(float(digit) for digit in digits) for task, digits in tasks.items()}
            for candidate, tasks in read_document(path, "run", _AGAIN)["outcomes"].items()
        }
    except (KeyError, ValueError, AttributeError, TypeError):
        raise DataError(f"{path} is not a file of outcomes", _AGAIN) from None


_AGAIN = "Evaluate the run again with `seedbed simulate --resume`."


def read_document(path: Path, kind: str, again: str) -> Any:
    """A JSON document of schema 1.

    Args:
        kind: what directory it belongs to (`run`), for messages.
        again: what to do where it is damaged.

    Raises:
        DataError: if it is missing, damaged or of another schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}",
            f"Name the directory of a finished {kind}, or finish it with --resume.",
        ) from None
    except ValueError:
        raise DataError(f"{path} is not valid JSON", again) from None
    version = document.get("schema") if isinstance(document, dict) else None
    if version != 1:
        raise DataError(f"{path} has schema {version!r}, expected 1", "Use the version of seedbed that wrote it.")
    return document


def _packed(outcomes: Outcomes) -> dict[str, dict[str, str | list[float]]]:
    return {candidate: {task: _pack(values) for task, values in tasks.items()} for candidate, tasks in outcomes.items()}


def _pack(values: tuple[float, ...]) -> str | list[float]:
    if all(value in (0.0, 1.0) for value in values):
        return "".join(str(int(value)) for value in values)
    return list(values)


def _dump(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
