"""What is seen of a run while it goes on: a protocol, silence, plain lines, progress bars, and a record for other processes."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from seedbed.common.errors import SeedbedError, StorageError
from seedbed.common.events import Event, EventLog


class Observer(Protocol):
    """Told what happens; never decides anything."""

    def stage(self, name: str, total: int) -> None:
        """A stage begins that has `total` units of work."""
        ...

    def advance(self, what: str = "") -> None:
        """One unit of the stage is done; `what` names it."""
        ...

    def note(self, text: str) -> None:
        """Something that a person should read."""
        ...

    def tell(self, event: Event) -> None:
        """Something of a node or a job, for those who watch closely."""
        ...


class Silent:
    """For `--quiet` and for tests."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self, what: str = "") -> None: ...

    def note(self, text: str) -> None: ...

    def tell(self, event: Event) -> None: ...


class Within:
    """Of small runs inside a larger one, which has announced a stage of its own: passes on notes, and the units of one stage.

    Args:
        observe: who is told.
        counted: name of the small runs' stage whose units are units of the large one's.
    """

    def __init__(self, observe: Observer, counted: str = "") -> None:
        self.observe = observe
        self.counted = counted
        self._current = ""

    def stage(self, name: str, total: int) -> None:
        self._current = name

    def advance(self, what: str = "") -> None:
        if self._current == self.counted:
            self.observe.advance(what)

    def note(self, text: str) -> None:
        self.observe.note(text)

    def tell(self, event: Event) -> None:
        self.observe.tell(event)


class Lines:
    """For logs: one line when a stage begins and ends, and every note."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.name = ""
        self.done = self.total = 0

    def stage(self, name: str, total: int) -> None:
        self.name, self.done, self.total = name, 0, total
        self.console.print(f"{name}: {total} to do" if total else f"{name}: nothing to do", highlight=False)

    def advance(self, what: str = "") -> None:
        self.done += 1
        self.console.print(f"{self.name}: {self.done}/{self.total} {what}".rstrip(), highlight=False)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def tell(self, event: Event) -> None: ...


class Bars:
    """For terminals: one bar for each stage. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}", style="dim"),
        )
        self.progress = Progress(*columns, console=console)
        self.current: TaskID | None = None
        self.lock = threading.Lock()

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def stage(self, name: str, total: int) -> None:
        with self.lock:
            if self.current is not None:
                self.progress.update(self.current, what="")
                self.progress.stop_task(self.current)
            self.current = self.progress.add_task(name, total=total or 1, completed=0 if total else 1, what="")

    def advance(self, what: str = "") -> None:
        with self.lock:
            if self.current is not None:
                self.progress.update(self.current, advance=1, what=what)

    def note(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def tell(self, event: Event) -> None: ...


class Recorder:
    """For other processes: everything becomes an event of the run's ``events.jsonl``.

    Args:
        log: of the run.
        also: another observer who is told the same.
    """

    def __init__(self, log: EventLog, also: Observer | None = None) -> None:
        self.log = log
        self.also = also or Silent()

    def stage(self, name: str, total: int) -> None:
        self.also.stage(name, total)
        self._append(Event(kind="stage", name=name, detail={"total": total}))

    def advance(self, what: str = "") -> None:
        self.also.advance(what)
        self._append(Event(kind="advance", name=what))

    def note(self, text: str) -> None:
        self.also.note(text)
        self._append(Event(kind="note", detail={"text": text}))

    def tell(self, event: Event) -> None:
        self.also.tell(event)
        self._append(event)

    def finished(self) -> None:
        """The run has come to its report."""
        self._append(Event(kind="finished"))

    def failed(self, error: SeedbedError) -> None:
        """The run has stopped, and why, so that whoever follows it can say so and end with the same exit code."""
        detail = {"reason": error.message, "hint": error.hint, "exit_code": error.exit_code}
        self._append(Event(kind="failed", name=type(error).__name__, detail=detail))

    def _append(self, event: Event) -> None:
        try:
            self.log.append(event)
        except StorageError as error:  # what is watched must not stop what is done
            self.also.note(error.message)


def replay(event: Event, observe: Observer) -> None:
    """Tell an observer in this process what a `Recorder` in another one was told."""
    if event.kind == "stage":
        observe.stage(event.name, int(event.detail.get("total", 0)))
    elif event.kind == "advance":
        observe.advance(event.name)
    elif event.kind == "note":
        observe.note(str(event.detail.get("text", "")))
    else:
        observe.tell(event)
