"""What a person sees of a run while it goes on: a protocol, silence, plain lines, and progress bars."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


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


class Silent:
    """For `--quiet` and for tests."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self, what: str = "") -> None: ...

    def note(self, text: str) -> None: ...


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
        self.console.print(text, highlight=False)


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
        self.progress.console.print(text, highlight=False)
