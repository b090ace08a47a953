"""How long the open stage still takes: from the steps that are left and the seconds that steps have taken.

A job that has reported goes on at its own pace; one that has not takes its node's pace, or the median of all. A node does
its jobs one after another and nodes work side by side, so the stage lasts as long as the busiest node:

    eta = max over nodes ( sum over its open jobs (steps - step) · seconds per step )

An open job that nobody has taken yet counts as a node of its own. Without a pace, or while the steps of a job are not
known (then the median of the stage's jobs is taken), the answer is None: unknown. A stage without training jobs, such as an
evaluation, goes on as it has gone: units left times seconds per unit. Later stages are not part of the estimate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from seedbed.server.monitor.state import JobView, Status


def remaining_seconds(status: Status, now: float | None = None) -> float | None:
    """Seconds until the open stage is done, or None where nobody can know.

    Args:
        now: Unix time; what has gone by since the newest event is taken off, at most half of the estimate: what nobody has
            told of yet may not be done.
    """
    if status.ended or not status.stage.name:
        return None
    jobs = [job for job in status.jobs.values() if job.state in ("open", "running")]
    current = [job for job in jobs if job.stage == status.stage.name]
    left = _of_jobs(current, status) if current else _of_units(status)
    if left is None or now is None:
        return left
    return max(left / 2, left - max(0.0, now - status.time))


def _of_jobs(waiting: list[JobView], status: Status) -> float | None:
    known = [job for job in status.jobs.values() if job.stage == status.stage.name]
    paces = _paces(known) or _paces(status.jobs.values())
    steps = [job.steps for job in known if job.steps]
    if not paces or not steps:
        return None
    usual, typical = median(pace for values in paces.values() for pace in values), median(steps)
    busy: dict[str, float] = defaultdict(float)
    for job in waiting:
        pace = job.pace or median(paces.get(job.node, [usual]))
        key = f"node {job.node}" if job.node else f"job {job.name}"
        busy[key] += max(0.0, (job.steps or typical) - job.step) * pace
    return max(busy.values())


def _of_units(status: Status) -> float | None:
    stage = status.stage
    if not stage.total:
        return None
    if stage.done >= stage.total:
        return 0.0
    elapsed = stage.advanced - stage.began
    return elapsed / stage.done * (stage.total - stage.done) if stage.done and elapsed > 0 else None


def _paces(jobs: Iterable[JobView]) -> dict[str, list[float]]:
    """Seconds per step that were seen, by node."""
    found: dict[str, list[float]] = defaultdict(list)
    for job in jobs:
        if job.pace is not None:
            found[job.node].append(job.pace)
    return found
