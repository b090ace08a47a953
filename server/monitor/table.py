"""`seedbed status`: one table of who does what, readable at 80 columns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from seedbed.server.monitor.document import to_json
from seedbed.server.monitor.estimate import remaining_seconds
from seedbed.server.monitor.state import JobState, JobView, NodeView, Status
from seedbed.server.monitor.words import ago, duration, loss, progress, sparkline, speed, steps, transferred

TROUBLES = 5
"""Reasons of failures that are shown; the JSON holds all."""
COLOURS = {
    "waiting": "dim",
    "open": "dim",
    "idle": "dim",
    "running": "cyan",
    "done": "green",
    "finished": "green",
    "quarantined": "red",
    "failed": "red",
    "refused": "red",
    "gone": "yellow",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A participant with one of its jobs, or a job that nobody has taken."""

    node: str
    state: str
    job: JobView | None
    seen: float = 0.0
    done: int = 0
    reason: str = ""


def show_status(look: Callable[[], Status], console: Console, *, as_json: bool = False) -> Status:
    """The verb `status`: print what `look` sees, once.

    Args:
        look: see `reader.RunReader.look` and `remote.remote`.
        as_json: print the document of `status.json` instead of a table.

    Raises:
        SeedbedError: whatever `look` raises.
    """
    status = look()
    if as_json:
        console.out(json.dumps(to_json(status), indent=2), highlight=False)
    else:
        console.print(status_table(status))
    return status


def status_table(status: Status, now: float | None = None) -> Table:
    """One row for every participant, and for every open job that nobody has taken.

    Args:
        now: Unix time, the clock's unless given.
    """
    now = time.time() if now is None else now
    table = people(rows(status), now)
    table.title, table.caption = _title(status, now), _caption(status)
    table.title_justify = table.caption_justify = "left"
    return table


def people(found: Iterable[Row], now: float, *, curve: int = 0) -> Table:
    """A table of `rows`, with loss curves of so many characters."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    # What a column must not lose is no_wrap; names are cut instead (see `cut`).
    table.add_column("Participant", max_width=26)
    table.add_column("State", no_wrap=True)
    table.add_column("Job")
    if curve:
        table.add_column("Loss curve", style="cyan", no_wrap=True, width=curve)
    for name in ("Steps", "Loss", "Tok/s", "Seen"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        table.add_row(*_cells(row, now, curve))
    return table


def rows(status: Status) -> list[Row]:
    """What the table holds, those who work first; equal states keep the order in which they came."""
    of_nodes = [_row(status, node) for node in status.nodes.values()]
    named = set(status.nodes)
    others = [Row(job.node, job.state, job, reason=job.reason) for job in status.jobs.values() if job.node not in named]
    shown = of_nodes + [row for row in others if row.state != "done"]
    order = {"running": 0, "quarantined": 1, "refused": 1, "gone": 1}
    return sorted(shown, key=lambda row: order.get(row.state, 2))


def _row(status: Status, node: NodeView) -> Row:
    job = status.jobs.get(node.job)
    if job is None:
        own = [one for one in status.jobs.values() if one.node == node.name]
        job = max(own, key=lambda one: (one.state == "open", one.ended or one.began), default=None)
    state: str = node.state
    if state == "here":
        state = job.state if job is not None and job.state in ("quarantined", "open") else "idle"
        state = "running" if node.job else state
    reason = node.reason or (job.reason if job is not None and state == "quarantined" else "")
    return Row(node.name, state, job, node.seen, node.done, reason)


def _cells(row: Row, now: float, curve: int) -> list[Text]:
    job = row.job
    what = job.name if job is not None else row.reason
    if row.done and row.state == "idle":
        what = f"{row.done} done"
    drawn = [sparkline([value for _, value in job.curve.points], curve) if job is not None else ""] if curve else []
    numbers = (steps(job), loss(job.curve.last), speed(job)) if job is not None else ("", "", "")
    seen = ago(max(0.0, now - row.seen)) if row.seen else ""
    state = Text(row.state, style=COLOURS.get(row.state, ""))
    return [cut(row.node or "(nobody)"), state, cut(what), *map(Text, (*drawn, *numbers, seen))]


def cut(text: str, style: str = "") -> Text:
    """A text that ends in dots where there is no room for all of it."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _title(status: Status, now: float) -> Text:
    title = Text(status.name or "federation", style="bold")
    title.append("  ")
    title.append(status.state, style=f"not bold {COLOURS.get(status.state, '')}")
    if not status.ended:
        title.append(f"  {progress(status)}, this stage left: {duration(remaining_seconds(status, now))}", "not bold")
    return title


def _caption(status: Status) -> Text:
    states: tuple[JobState, ...] = ("running", "open", "done", "quarantined")
    counts = [f"{count} {state}" for state in states if (count := status.count(state))]
    parts = [f"jobs: {', '.join(counts) or 'none yet'}", f"adapters: {transferred(status)}"]
    if status.contributed:
        parts.append(f"{status.contributed} contributed")
    caption = Text("; ".join(parts), style="not italic dim")
    for line in troubles(status)[:TROUBLES]:
        caption.append(f"\n{line}", style="not dim red")
    return caption


def troubles(status: Status) -> list[str]:
    """What went wrong, the newest first: of the federation, then of jobs and participants."""
    jobs = sorted((job for job in status.jobs.values() if job.state == "quarantined"), key=lambda job: -job.ended)
    told = [f"{job.name} of {job.node or 'nobody'}: {job.reason}" for job in jobs]
    refused = [f"{node.name} was refused: {node.reason}" for node in status.nodes.values() if node.state == "refused"]
    return [status.reason] * bool(status.reason) + refused[::-1] + told
