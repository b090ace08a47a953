"""What is new between two looks, as lines for a log."""

from __future__ import annotations

from collections.abc import Iterator

from seedbed.server.monitor.state import JobView, Status
from seedbed.server.monitor.words import duration, loss, progress, size, steps

_TENTHS = 10


def changes(before: Status, after: Status) -> list[str]:
    """One line for everything that a person who reads a log wants to know; nothing where nothing happened."""
    lines = [*_federation(before, after), *_nodes(before, after)]
    for name, job in after.jobs.items():
        lines += _job(before.jobs.get(name), job)
    lines += _arrivals(before, after)
    lines += _contributions(before, after)
    new = [note for note in after.notes if note not in before.notes]
    lines += [note.text for note in new]
    return [*lines, *_end(before, after)]


def _federation(before: Status, after: Status) -> Iterator[str]:
    if after.stage != before.stage and after.stage.name:
        yield progress(after)


def _nodes(before: Status, after: Status) -> Iterator[str]:
    for name, node in after.nodes.items():
        old = before.nodes.get(name)
        if old is None or old.state != node.state:
            tasks = f" with {', '.join(node.tasks)}" if node.tasks and node.state == "here" else ""
            said = {"here": "joined" if old is None else "is back", "gone": "is gone", "refused": "was refused"}
            yield f"{name} {said[node.state]}{tasks}{': ' + node.reason if node.reason else ''}"


def _job(old: JobView | None, job: JobView) -> Iterator[str]:
    state = old.state if old is not None else ""
    if job.state == "quarantined" and (old is None or (state, old.ended) != (job.state, job.ended)):
        yield f"{job.name} of {job.node or 'nobody'} is not used: {job.reason}"
    elif job.state == "running" and state != "running":
        yield f"{job.name} is trained by {job.node}"
    elif job.state == "open" and state == "running":
        yield f"{job.name} is open again{': ' + job.reason if job.reason else ''}"
    if job.state == "running" and job.steps and _tenth(job) > (_tenth(old) if old is not None else 0):
        yield f"{job.name} {steps(job)}, loss {loss(job.curve.last) or 'unknown'}"


def _tenth(job: JobView) -> int:
    return _TENTHS * job.step // job.steps if job.steps else 0


def _arrivals(before: Status, after: Status) -> Iterator[str]:
    new = after.arrived - before.arrived
    for arrival in after.arrivals[-new:] if new > 0 else ():
        weight = f", {size(arrival.size)}" if arrival.size else ""
        job = after.jobs.get(arrival.name)
        took = f" in {duration(job.seconds)}" if job is not None and job.seconds else ""
        yield f"{arrival.name} of {arrival.node} has arrived{took}: {arrival.digest[:12]}{weight}"


def _contributions(before: Status, after: Status) -> Iterator[str]:
    for digest, one in after.contributions.items():
        old = before.contributions.get(digest)
        if old is None or old.withdrawn != one.withdrawn:
            what = "withdrawn" if one.withdrawn else "contributed"
            yield f"{one.participant or 'somebody'} has {what} {one.name or one.task} ({digest[:12]}) for {one.task}"


def _end(before: Status, after: Status) -> Iterator[str]:
    if after.state != before.state and after.ended:
        yield f"{after.name or 'the federation'} has {after.state}{': ' + after.reason if after.reason else ''}"
