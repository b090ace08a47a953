"""A status in Prometheus' text exposition format (version 0.0.4).

Labels hold names of participants, jobs and stages; their number is bounded as a status is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import get_args

from seedbed.server.monitor.estimate import remaining_seconds
from seedbed.server.monitor.state import FederationState, JobState, NodeState, Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[Mapping[str, str], float]


def exposition(status: Status, now: float | None = None) -> str:
    """All metrics of a status; one that is not known now (a loss, the time left) is left out.

    Args:
        now: Unix time, the clock's unless given.
    """
    now = time.time() if now is None else now
    nodes = [node.state for node in status.nodes.values()]
    running = [job for job in status.jobs.values() if job.state == "running"]
    labels = {job.name: {"job": job.name, "node": job.node} for job in running}
    left = remaining_seconds(status, now)
    stage = {"stage": status.stage.name}
    families: list[tuple[str, str, str, Iterable[Sample]]] = [
        (
            *("seedbed_federation_state", "gauge", "1 for the state that the federation is in."),
            [({"federation": status.name, "state": s}, s == status.state) for s in get_args(FederationState)],
        ),
        ("seedbed_stage_units", "gauge", "Units of work of the open stage.", [(stage, status.stage.total)]),
        ("seedbed_stage_units_done", "gauge", "Units of it that are done.", [(stage, status.stage.done)]),
        (
            *("seedbed_nodes", "gauge", "Participants by state."),
            [({"state": state}, nodes.count(state)) for state in get_args(NodeState)],
        ),
        (
            *("seedbed_jobs", "gauge", "Training jobs by state."),
            [({"state": state}, status.count(state)) for state in get_args(JobState)],
        ),
        ("seedbed_job_step", "gauge", "Step of a running job.", [(labels[j.name], j.step) for j in running]),
        ("seedbed_job_steps", "gauge", "Steps that it has.", [(labels[j.name], j.steps) for j in running if j.steps]),
        (
            *("seedbed_job_loss", "gauge", "Newest training loss of a running job."),
            [(labels[j.name], loss) for j in running if (loss := j.curve.last) is not None],
        ),
        (
            *("seedbed_job_tokens_per_second", "gauge", "Speed of a running job."),
            [(labels[j.name], rate) for j in running if (rate := j.tokens_per_second) is not None],
        ),
        ("seedbed_received_bytes_total", "counter", "Bytes of adapters that came in.", [({}, status.received)]),
        ("seedbed_sent_bytes_total", "counter", "Bytes of adapters that went out.", [({}, status.sent)]),
        ("seedbed_arrivals_total", "counter", "Adapters that were accepted.", [({}, status.arrived)]),
        (
            *("seedbed_contributions", "gauge", "Contributed experts that are not withdrawn."),
            [({}, status.contributed)],
        ),
        (
            *("seedbed_stage_remaining_seconds", "gauge", "Estimate until the open stage is done."),
            [({}, left)] if left is not None else [],
        ),
        ("seedbed_last_event_timestamp_seconds", "gauge", "Unix time of the newest event.", [({}, status.time)]),
    ]
    return "".join(_family(*family) for family in families)


def _family(name: str, kind: str, told: str, samples: Iterable[Sample]) -> str:
    lines = [f"{name}{_labels(labels)} {float(value):.15g}\n" for labels, value in samples]
    return f"# HELP {name} {told}\n# TYPE {name} {kind}\n{''.join(lines)}" if lines else ""


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{_escape(value)}"' for key, value in labels.items()) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
