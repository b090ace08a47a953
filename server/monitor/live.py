"""`seedbed watch`: a federation as it goes on, redrawn in a terminal, told in lines elsewhere, until it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from seedbed.common.errors import EnvironmentFailure
from seedbed.server.monitor.changes import changes
from seedbed.server.monitor.estimate import remaining_seconds
from seedbed.server.monitor.state import Arrival, Status
from seedbed.server.monitor.table import COLOURS, cut, people, rows, troubles
from seedbed.server.monitor.words import ago, duration, progress, size, transferred

_BESIDE = 16
"""Lines of the picture that are not participants."""
_CURVE = 18


def watch(
    look: Callable[[], Status],
    console: Console,
    *,
    every: float = 1.0,
    patience: float = 300.0,
    stop: threading.Event | None = None,
) -> Status:
    """The verb `watch`: show what `look` sees until the federation ends, or the user leaves with Ctrl-C.

    Args:
        look: see `reader.RunReader.look` and `remote.remote`.
        every: seconds between two looks.
        patience: seconds without an answer, as while a coordinator is started again, before it is an error.
        stop: set by another thread to leave.

    Returns:
        the last that was seen.

    Raises:
        SeedbedError: whatever the first look raises, and later ones for longer than `patience`.
    """
    seen = _Patient(look, patience)
    stop = stop or threading.Event()
    status = seen.look()
    try:
        if console.is_terminal:
            return _redraw(seen, status, console, every, stop)
        return _tell(seen, status, console, every, stop)
    except KeyboardInterrupt:
        return seen.status


class _Patient:
    """A look that may fail for a while."""

    def __init__(self, look: Callable[[], Status], patience: float) -> None:
        self._look, self._patience = look, patience
        self._answered: float | None = None
        self.status = Status()
        self.silence = ""

    def look(self) -> Status:
        try:
            self.status, self.silence = self._look(), ""
            self._answered = time.monotonic()
        except EnvironmentFailure as error:
            if self._answered is None or time.monotonic() - self._answered > self._patience:
                raise
            self.silence = f"no answer for {duration(time.monotonic() - self._answered)}: {error.message}"
        return self.status


def _redraw(seen: _Patient, status: Status, console: Console, every: float, stop: threading.Event) -> Status:
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            # The picture must fit: what does not would push the terminal's lines away at every redraw.
            lines = max(3, console.height - _BESIDE)
            live.update(picture(status, lines=lines, silence=seen.silence), refresh=True)
            if status.ended or stop.wait(every):
                return status
            status = seen.look()


def _tell(seen: _Patient, status: Status, console: Console, every: float, stop: threading.Event) -> Status:
    before = Status()
    while True:
        for line in changes(before, status):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if status.ended or stop.wait(every):
            return status
        before, silent = status, seen.silence
        status = seen.look()
        if seen.silence and not silent:
            console.print(seen.silence, markup=False, highlight=False, soft_wrap=True)


def picture(status: Status, *, lines: int = 20, now: float | None = None, silence: str = "") -> RenderableType:
    """Everything at one moment.

    Args:
        lines: participants that are shown at most; those who work come first.
        now: Unix time, the clock's unless given.
        silence: why nothing new is known.
    """
    now = time.time() if now is None else now
    parts: list[RenderableType] = [_head(status, now), _stage(status), _people(status, lines, now)]
    if status.arrivals:
        parts.append(_arrivals(status, now))
    parts += [cut(line, "red") for line in troubles(status)[:3]]
    parts += [cut(note.text, "dim") for note in status.notes[-2:]]
    if silence:
        parts.append(Text(silence, style="yellow"))
    return Group(*parts)


def _head(status: Status, now: float) -> Text:
    head = Text(status.name or "federation", style="bold")
    head.append(f"  {status.state}", style=f"not bold {COLOURS.get(status.state, '')}")
    ran = (status.time if status.ended else now) - status.began if status.began else 0.0
    told = [f"for {duration(ran)}", transferred(status), f"{status.arrived} arrived"]
    told.append(f"{status.contributed} contributed")
    head.append("  " + ", ".join(told), style="not bold dim")
    return head


def _stage(status: Status) -> RenderableType:
    left = "" if status.ended else f"  left in this stage: {duration(remaining_seconds(status))}"
    text = Text(f"{progress(status)}{left}")
    total, done = status.stage.total, status.stage.done
    if not total:
        return text
    line = Table.grid(padding=(0, 1))
    line.add_row(Bar(total, 0, min(done, total), width=24, color="green", bgcolor="grey37"), text)
    return line


def _people(status: Status, lines: int, now: float) -> RenderableType:
    found = rows(status)
    table = people(found[:lines], now, curve=_CURVE)
    return Group(table, Text(f"and {len(found) - lines} more", style="dim")) if len(found) > lines else table


def _arrivals(status: Status, now: float) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    for arrival in status.arrivals[:-4:-1]:
        table.add_row(*(cut(text, "dim") for text in _arrival(arrival, now)))
    return table


def _arrival(arrival: Arrival, now: float) -> list[str]:
    measured = [f"norm {arrival.norm:.3g}"] if arrival.norm is not None else []
    measured += [f"cosine {arrival.cosine:.2f}"] if arrival.cosine is not None else []
    when = f"{ago(max(0.0, now - arrival.time))} ago"
    weight = size(arrival.size) if arrival.size else ""
    return ["arrived", arrival.name, arrival.digest[:12], weight, ", ".join(measured), when]
