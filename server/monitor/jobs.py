"""What the events of a job change: it is asked, takes steps, and ends accepted or quarantined."""

from __future__ import annotations

from dataclasses import replace

from seedbed.common.events import Event
from seedbed.server.monitor.details import number, text
from seedbed.server.monitor.state import ARRIVALS, JOBS, Arrival, JobView, Status


def job_event(status: Status, event: Event) -> Status:
    """`state`: open, running or failed (this attempt); `steps`, `attempt`, `reason`."""
    job = _job_of(status, event)
    if job.state == "done":
        return status
    said = str(event.detail.get("state", "open"))
    attempt = number(event.detail, "attempt", "attempts")
    started = said == "running" and job.state != "running"
    job = replace(
        job,
        state="running" if said == "running" else "open",
        steps=int(number(event.detail, "steps") or job.steps),
        attempts=int(attempt) if attempt is not None else job.attempts + started,
        reason=text(event.detail.get("reason")) or job.reason,
        began=event.time if started else job.began,
    )
    return _with_job(status, job, works=job.state == "running")


def step_event(status: Status, event: Event) -> Status:
    """`step`, `steps`, `loss`, `tokens` and `seconds` since the training began."""
    job = _job_of(status, event)
    if job.state == "done" or (job.state == "quarantined" and event.time <= job.ended):
        return status  # it was on its way when the result came
    step, loss = int(number(event.detail, "step") or 0), number(event.detail, "loss", negative=True)
    seconds = number(event.detail, "seconds") or job.seconds
    job = replace(
        job,
        state="running",
        step=step,
        steps=int(number(event.detail, "steps") or job.steps),
        curve=job.curve.add(step, loss) if loss is not None else job.curve,
        tokens=number(event.detail, "tokens") or job.tokens,
        seconds=seconds,
        trained=seconds,
        attempts=job.attempts or 1,
        began=job.began or event.time,
    )
    return _with_job(status, job, works=True)


def accepted_event(status: Status, event: Event) -> Status:
    """`digest`; `seconds` of the whole job; `bytes`, `norm`, `cosine`; `steps`, `loss`, `tokens` of a finished training."""
    job, digest = _job_of(status, event), text(event.detail.get("digest"))
    if job.state in ("done", "quarantined") and job.digest and job.digest == digest:
        return _measured(status, event, digest)
    steps = int(number(event.detail, "steps") or job.steps)
    seconds, loss = number(event.detail, "seconds") or job.seconds, number(event.detail, "loss", negative=True)
    job = replace(
        job,
        state="done",
        step=steps or job.step,
        steps=steps,
        curve=job.curve.add(steps, loss) if loss is not None and not job.curve.kept else job.curve,
        tokens=number(event.detail, "tokens") or (job.tokens / job.step * steps if job.step else job.tokens),
        seconds=seconds,
        trained=_trained(job, steps, seconds),
        attempts=job.attempts or 1,
        reason="",
        digest=digest,
        ended=event.time,
    )
    size = int(number(event.detail, "bytes", "size") or status.uploads.get(digest, 0))
    norm, cosine = number(event.detail, "norm"), number(event.detail, "cosine", negative=True)
    arrival = Arrival(event.time, job.node, job.name, digest, size, norm, cosine)
    status = replace(status, arrivals=(*status.arrivals, arrival)[-ARRIVALS:], arrived=status.arrived + 1)
    return _with_job(status, job, works=False)


def _trained(job: JobView, steps: int, seconds: float) -> float:
    """Seconds for all steps at the pace that was seen; where none was seen, those of the whole job."""
    return job.trained / job.step * steps if job.step and job.trained else seconds


def _measured(status: Status, event: Event, digest: str) -> Status:
    """An arrival that is known, told again: with what was measured of it, perhaps."""
    size, norm = number(event.detail, "bytes", "size"), number(event.detail, "norm")
    cosine = number(event.detail, "cosine", negative=True)
    if size is None and norm is None and cosine is None:
        return status
    arrivals = tuple(
        replace(
            one,
            size=int(size or one.size),
            norm=one.norm if norm is None else norm,
            cosine=one.cosine if cosine is None else cosine,
        )
        if (one.digest, one.name) == (digest, text(event.name))
        else one
        for one in status.arrivals
    )
    return replace(status, arrivals=arrivals)


def quarantined_event(status: Status, event: Event) -> Status:
    """`reason`."""
    job = _job_of(status, event)
    if job.state == "done" and event.time < job.ended:
        return status  # of an earlier attempt; what comes later shuts out what had been accepted
    job = replace(
        job,
        state="quarantined",
        reason=text(event.detail.get("reason")),
        attempts=job.attempts or 1,
        ended=event.time,
    )
    return _with_job(status, job, works=False)


def _job_of(status: Status, event: Event) -> JobView:
    """The job that an event is about, with whoever is at it now."""
    name, node = text(event.name), text(event.node)
    job = status.jobs.get(name) or JobView(name, stage=status.stage.name)
    return replace(job, node=node or job.node)


def _with_job(status: Status, job: JobView, *, works: bool) -> Status:
    """The status with a job as it is now, and its node's state."""
    before = status.jobs.get(job.name)
    jobs = {**status.jobs, job.name: job}
    dropped = status.dropped
    if len(jobs) > JOBS:
        # The oldest that is over goes, or the oldest at all.
        ended = (name for name, view in jobs.items() if view.state in ("done", "quarantined"))
        del jobs[next(ended, next(iter(jobs)))]
        dropped += 1
    nodes = dict(status.nodes)
    node = nodes.get(job.node)
    if node is not None:
        newly = job.state == "done" and (before is None or before.state != "done")
        current = job.name if works else "" if node.job == job.name else node.job
        nodes[job.node] = replace(node, job=current, done=node.done + newly)
    if before is not None and before.node != job.node and before.node in nodes and nodes[before.node].job == job.name:
        nodes[before.node] = replace(nodes[before.node], job="")
    return replace(status, jobs=jobs, nodes=nodes, dropped=dropped)
