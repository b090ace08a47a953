"""What a training tells while it goes on: every event into a file of its own, and its steps to the registry, if there is one.

    work/<recipe>/job.json          JobNote: which job it is and how it stands
    work/<recipe>/progress.jsonl    the events of `client.worker`, one a line

Whoever sits at the participant's machine reads these files (`client.join.sight`); whoever watches the federation reads what
the registry is told. That a step could not be reported never hurts a training.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from seedbed.common.errors import StorageError
from seedbed.common.events import Event
from seedbed.common.files import atomic_write
from seedbed.common.jobs import Job, Node
from seedbed.common.manifest import Record
from seedbed.common.registry import RegistryAccess

JOB_FILE, PROGRESS_FILE = "job.json", "progress.jsonl"
_TOLD = ("step", "steps", "loss", "lr", "tokens", "seconds")
_FROM_DATA = ("loss", "tokens")
_EVERY_SECONDS = 1.0
_FAREWELL_SECONDS = 3.0

OnEvent = Callable[[dict[str, Any]], None]


class JobNote(Record):
    """How a job stands on this participant."""

    name: str
    kind: str
    recipe: str
    state: Literal["training", "handing in", "done", "failed"]
    time: float
    """Unix time of this state, in seconds."""
    process: int
    """Id of the process that does it."""
    error: str = ""


def note_job(work: Path, job: Job, state: Literal["training", "handing in", "done", "failed"], error: str = "") -> None:
    """Say how a job stands, for those who watch; that it cannot be said is no reason to fail."""
    note = JobNote(
        name=job.name, kind=job.kind, recipe=job.recipe, state=state, time=time.time(), process=os.getpid(), error=error
    )
    with contextlib.suppress(StorageError):
        atomic_write(work / JOB_FILE, note.model_dump_json().encode())


@contextlib.contextmanager
def recording(work: Path, job: Job, node: Node, *, go_on: bool = False) -> Iterator[OnEvent]:
    """Record a training while the body runs.

    Args:
        go_on: append to the record of an earlier try, whose checkpoint the training goes on from.

    Yields:
        what is to be called with each event of `client.worker`.
    """
    reporter = Reporter(node.registry, node.name, job.name) if node.registry is not None else None
    with (work / PROGRESS_FILE).open("a" if go_on else "w", encoding="utf-8") as file:

        def on_event(event: dict[str, Any]) -> None:
            file.write(json.dumps(event) + "\n")
            file.flush()
            if reporter is not None and event.get("event") == "step":
                # Of a private training nothing leaves that is computed from the data.
                hidden = _FROM_DATA if node.privacy is not None else ()
                reporter.tell({key: value for key, value in event.items() if key not in hidden})

        try:
            yield on_event
        finally:
            if reporter is not None:
                reporter.close()


class Reporter:
    """Tells the registry of the latest step, at most once a second, from a thread of its own; older ones are left out."""

    def __init__(self, access: RegistryAccess, node: str, name: str) -> None:
        self._access, self._node, self._name = access, node, name
        self._latest: dict[str, Any] | None = None
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def tell(self, event: dict[str, Any]) -> None:
        """Take note of a step; returns at once."""
        with self._changed:
            self._latest = {key: event[key] for key in _TOLD if key in event}
            self._changed.notify()

    def close(self) -> None:
        """Tell the last step, if that is quickly done."""
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join(_FAREWELL_SECONDS)

    def _run(self) -> None:
        from seedbed.client.registry import RegistryClient

        with contextlib.suppress(Exception):  # whatever it is: the training goes on
            client = RegistryClient(self._access, deadline=5.0, patience=0.0)
            with contextlib.closing(client):
                while (detail := self._next()) is not None:
                    with contextlib.suppress(Exception):
                        client.report(Event(kind="step", node=self._node, name=self._name, detail=detail))
                    with self._changed:
                        self._changed.wait_for(lambda: self._over, _EVERY_SECONDS)

    def _next(self) -> dict[str, Any] | None:
        """The latest step that has not been told; none when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._latest is not None or self._over)
            found, self._latest = self._latest, None
            return found
