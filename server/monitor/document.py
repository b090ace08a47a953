"""A status as a JSON value and back: what `status.json` holds, for the page, for scripts, and for a watcher elsewhere.

    format, name, state, reason, began, time, now            times in Unix seconds
    eta                                                      seconds until the stage is done, or null
    stage {name, total, done, began, advanced}
    received, sent                                           bytes of adapters, seen from the coordinator
    nodes [...], jobs [...], arrivals [...], contributions [...], notes [...]    fields as in `state`
    counts {open, running, done, quarantined}                of jobs, with the `dropped` that are not in the list
    arrived, dropped, unknown

A job has `curve`, a list of [step, loss], and `loss`, `pace`, `tokens_per_second`; curves are sent of at most `CURVES` jobs,
those that train now and those that ended last.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from typing import Any, TypeVar, cast, get_args

from pydantic import TypeAdapter, ValidationError

from seedbed.common.errors import EnvironmentFailure
from seedbed.server.monitor.details import text
from seedbed.server.monitor.estimate import remaining_seconds
from seedbed.server.monitor.state import (
    ARRIVALS,
    CONTRIBUTIONS,
    CURVE,
    JOBS,
    NODES,
    NOTES,
    Arrival,
    ContributionView,
    Curve,
    JobState,
    JobView,
    NodeView,
    Note,
    Stage,
    Status,
)

FORMAT = 1
CURVES = 60
_Value = TypeVar("_Value")


def to_json(status: Status, now: float | None = None) -> dict[str, Any]:
    """A status as a value that `json.dumps` takes.

    Args:
        now: Unix time of the look; the clock's unless given.
    """
    now = time.time() if now is None else now
    drawn = {job.name for job in with_curves(status)}
    return {
        "format": FORMAT,
        **{name: getattr(status, name) for name in ("name", "state", "reason", "began", "time")},
        "now": now,
        "eta": remaining_seconds(status, now),
        "stage": asdict(status.stage),
        **{name: getattr(status, name) for name in ("received", "sent", "arrived", "dropped", "unknown")},
        "counts": {state: status.count(state) for state in get_args(JobState)},
        "nodes": [asdict(node) for node in status.nodes.values()],
        "jobs": [_job(job, with_curve=job.name in drawn) for job in status.jobs.values()],
        "arrivals": [asdict(arrival) for arrival in status.arrivals],
        "contributions": [asdict(one) for one in status.contributions.values()],
        "notes": [asdict(note) for note in status.notes],
    }


def from_json(value: object) -> Status:
    """The status that a coordinator elsewhere told; every text in it is cleaned again.

    Raises:
        EnvironmentFailure: if it is not understood.
    """
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise EnvironmentFailure(
            "what the coordinator answers is not a status that this version understands",
            "Use the same version of Seedbed as the coordinator.",
        )
    try:
        return _status(value)
    except (ValidationError, TypeError, ValueError, AttributeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise EnvironmentFailure(
            f"the coordinator's status is not understood: {reason}", "Use the same version of Seedbed as it."
        ) from None


def with_curves(status: Status) -> list[JobView]:
    """Jobs whose curves are worth a look: those that train, then those that ended last."""
    having = [job for job in status.jobs.values() if job.curve.newest is not None]
    return sorted(having, key=lambda job: (job.state != "running", -job.ended))[:CURVES]


def _job(job: JobView, *, with_curve: bool) -> dict[str, Any]:
    flat = {one.name: getattr(job, one.name) for one in fields(job) if one.name != "curve"}
    points = [list(point) for point in job.curve.points] if with_curve else []
    derived = {"loss": job.curve.last, "pace": job.pace, "tokens_per_second": job.tokens_per_second}
    return {**flat, **derived, "curve": points}


def _status(value: Mapping[str, Any]) -> Status:
    plain = {one.name: value[one.name] for one in fields(Status) if one.name in value}
    lists: dict[str, Any] = {
        "stage": _read(Stage, value.get("stage", {})),
        "nodes": {node.name: node for node in _all(NodeView, value, "nodes", NODES)},
        "jobs": {job.name: job for job in _jobs(value)},
        "arrivals": tuple(_all(Arrival, value, "arrivals", ARRIVALS)),
        "contributions": {one.digest: one for one in _all(ContributionView, value, "contributions", CONTRIBUTIONS)},
        "notes": tuple(_all(Note, value, "notes", NOTES)),
    }
    scalars = {key: _clean(entry) for key, entry in plain.items() if key not in lists}
    return _validated(Status, {**scalars, **lists})


def _jobs(value: Mapping[str, Any]) -> list[JobView]:
    found = []
    for entry in list(value.get("jobs", []))[:JOBS]:
        points = tuple((int(step), float(loss)) for step, loss in entry.get("curve", [])[: CURVE + 1])
        loss = entry.get("loss")
        newest = points[-1] if points else (int(entry.get("step", 0)), float(loss)) if loss is not None else None
        found.append(_read(JobView, {**entry, "curve": Curve(points, newest)}))
    return found


def _all(kind: type[_Value], value: Mapping[str, Any], key: str, most: int) -> list[_Value]:
    return [_read(kind, entry) for entry in list(value.get(key, []))[-most:]]


def _read(kind: type[_Value], entry: Mapping[str, Any]) -> _Value:
    """A value of its known fields: those of a newer version are passed over."""
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    return _validated(kind, {key: _clean(part) for key, part in entry.items() if key in known})


def _validated(kind: type[_Value], values: dict[str, Any]) -> _Value:
    value: _Value = _adapter(cast("Any", kind)).validate_python(values)
    return value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _clean(value: object) -> object:
    if isinstance(value, str):
        return text(value)
    return [_clean(one) for one in value] if isinstance(value, list) else value
