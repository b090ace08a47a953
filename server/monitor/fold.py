"""How one event changes a status: a pure function for every kind of event, as rows of a table.

What an event's `detail` may hold is written beside each function; all of it is optional, and nothing in it is believed to
be of the right type, since participants report events too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from seedbed.common.events import Event
from seedbed.server.ledger import Entry
from seedbed.server.monitor import jobs
from seedbed.server.monitor.details import number, text, texts
from seedbed.server.monitor.state import (
    CONTRIBUTIONS,
    NODES,
    NOTES,
    ContributionView,
    NodeState,
    NodeView,
    Note,
    Stage,
    Status,
)

_Value = TypeVar("_Value")


def fold(status: Status, event: Event) -> Status:
    """The status after an event; an event of a kind that is not known is counted and changes nothing else.

    Takes time that is bounded, whatever has happened before. A job's acceptance and an adapter's arrival count once,
    however often they are told.
    """
    status = replace(status, time=max(status.time, event.time), began=status.began or event.time)
    change = _CHANGES.get(event.kind)
    if change is None:
        return replace(status, unknown=status.unknown + 1)
    if status.state == "waiting" and event.kind in _SIGNS_OF_WORK:
        status = replace(status, state="running")
    return change(_with_node(status, event), event)


def fold_all(status: Status, events: Iterable[Event]) -> Status:
    """The status after several events, in their order."""
    for event in events:
        status = fold(status, event)
    return status


def from_entry(entry: Entry) -> list[Event]:
    """What an entry of the ledger would have been as events; a run without an event log is watched by these."""
    detail: dict[str, Any] = dict(entry.detail)
    common = {"time": entry.time, "node": entry.node, "name": entry.name}
    if entry.event == "hello":
        names = [name.strip() for name in entry.name.split(",") if name.strip()]
        return [Event(kind="node", time=entry.time, node=name, detail={"state": "joined"}) for name in names]
    if entry.event == "accepted":
        told = {"digest": entry.digest, "seconds": entry.seconds, **detail}
        stage = entry.name.partition(":")[0] if ":" in entry.name else ""
        unit = Event(kind="advance", time=entry.time, name=entry.name, detail={"stage": stage})
        return [unit, Event(kind="accepted", **common, detail=told)]
    if entry.event == "quarantined":
        refused = entry.name == "hello"
        told = {"state": "refused", "reason": entry.reason} if refused else {"reason": entry.reason}
        return [Event(kind="node" if refused else "quarantined", **common, detail=told)]
    if entry.event in ("finished", "failed"):
        return [Event(kind=entry.event, **common, detail={"reason": entry.reason})]
    if entry.event in ("start", "resume"):
        return [Event(kind="stage", time=entry.time, detail={"state": entry.event, "federation": entry.name})]
    if entry.event in ("combined", "evaluated"):
        return [Event(kind="advance", time=entry.time, name=entry.name, detail={"stage": _LATE[entry.event]})]
    return []


_LATE = {"combined": "combine", "evaluated": "evaluate"}


# -- what a kind of event does ------------------------------------------------------------------------------------------


def _stage(status: Status, event: Event) -> Status:
    """`total`: units of work; `federation`: its name. A new stage after an end means that the run goes on."""
    status = replace(status, state="running", reason="", name=text(event.detail.get("federation")) or status.name)
    if not event.name:
        return status
    total = int(number(event.detail, "total") or 0)
    return replace(status, stage=Stage(text(event.name), total, 0, event.time, event.time))


def _advance(status: Status, event: Event) -> Status:
    """`stage`: where nobody has announced one. The unit is the event's name."""
    stage, named = status.stage, text(event.detail.get("stage"))
    if named and named != stage.name and not (stage.total and stage.done < stage.total):
        stage = Stage(named, 0, 0, event.time, event.time)
    return replace(status, stage=replace(stage, done=stage.done + 1, advanced=event.time))


def _note(status: Status, event: Event) -> Status:
    """`text`, or the event's name."""
    said = text(event.detail.get("text")) or text(event.name)
    return replace(status, notes=(*status.notes, Note(event.time, said))[-NOTES:]) if said else status


def _node(status: Status, event: Event) -> Status:
    """`state`: joined, gone or refused; `tasks`, `devices`: lists; `reason`."""
    view = status.nodes.get(text(event.node))
    if view is None:
        return status
    said = str(event.detail.get("state", "here"))
    state: NodeState = "gone" if said == "gone" else "refused" if said == "refused" else "here"
    view = replace(
        view,
        state=state,
        tasks=texts(event.detail.get("tasks")) or view.tasks,
        devices=texts(event.detail.get("devices")) or view.devices,
        reason=text(event.detail.get("reason")),
        job=view.job if state == "here" else "",
    )
    return replace(status, nodes={**status.nodes, view.name: view})


def _contributed(status: Status, event: Event) -> Status:
    """`digest`, `task`; the event's node is the participant, its name what the expert is called."""
    digest = text(event.detail.get("digest"))
    view = status.contributions.get(digest) or ContributionView(digest)
    view = replace(
        view,
        task=text(event.detail.get("task")) or view.task,
        name=text(event.name) or view.name,
        participant=text(event.node) or view.participant,
        time=event.time,
        withdrawn=event.kind == "withdrawn",
    )
    return replace(status, contributions=_bounded({**status.contributions, digest: view}, CONTRIBUTIONS))


def _transfer(status: Status, event: Event) -> Status:
    """`bytes`, `digest`; the name says whether it was submitted, and so came in, or fetched."""
    count, digest = int(number(event.detail, "bytes") or 0), text(event.detail.get("digest"))
    if event.name != "submitted":
        return replace(status, sent=status.sent + count)
    # An upload that was interrupted comes in parts.
    uploads = {**status.uploads, digest: status.uploads.get(digest, 0) + count}
    return replace(status, received=status.received + count, uploads=_bounded(uploads, CONTRIBUTIONS))


def _finished(status: Status, event: Event) -> Status:
    return replace(_idle(status), state="finished", reason="")


def _failed(status: Status, event: Event) -> Status:
    """`reason`."""
    return replace(_idle(status), state="failed", reason=text(event.detail.get("reason")))


_CHANGES: Mapping[str, Callable[[Status, Event], Status]] = {
    "stage": _stage,
    "advance": _advance,
    "note": _note,
    "node": _node,
    "job": jobs.job_event,
    "step": jobs.step_event,
    "accepted": jobs.accepted_event,
    "quarantined": jobs.quarantined_event,
    "contributed": _contributed,
    "withdrawn": _contributed,
    "transfer": _transfer,
    "finished": _finished,
    "failed": _failed,
}
_SIGNS_OF_WORK = ("advance", "job", "step", "accepted")
_OF_NODES = ("node", "job", "step", "accepted")
"""Kinds whose node is a participant's; that of the others may be whoever hands something in."""


# -- what they share ----------------------------------------------------------------------------------------------------


def _with_node(status: Status, event: Event) -> Status:
    """The node of an event has been seen."""
    name = text(event.node)
    known = status.nodes.get(name)
    if not name or (known is None and event.kind not in _OF_NODES) or event.detail.get("again"):
        return status
    node = known or NodeView(name)
    back = "here" if node.state == "gone" and event.kind in ("step", "accepted") else node.state
    node = replace(node, seen=max(node.seen, event.time), state=back)
    nodes = {**status.nodes, name: node}
    if len(nodes) > NODES:  # the one that has been silent for longest goes
        del nodes[min(nodes, key=lambda one: nodes[one].seen)]
    return replace(status, nodes=nodes)


def _idle(status: Status) -> Status:
    """After the end nobody works."""
    return replace(status, nodes={name: replace(node, job="") for name, node in status.nodes.items()})


def _bounded(values: dict[str, _Value], most: int) -> dict[str, _Value]:
    while len(values) > most:
        del values[next(iter(values))]
    return values
