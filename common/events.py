"""What happens in a federation, as it happens: an append-only file that several processes write and anyone may follow.

Events are there to be watched, not to be resumed from (the ledger is): they are not flushed to the disk one by one, and a
line that a dying process tore is passed over.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from seedbed.common.files import storing
from seedbed.common.manifest import Record

EventKind = Literal[
    "stage",
    "advance",
    "note",
    "node",
    "job",
    "step",
    "accepted",
    "quarantined",
    "contributed",
    "withdrawn",
    "transfer",
    "finished",
    "failed",
]
_PORTION = 1 << 20
"""Bytes of the file that are looked at in one go."""


class Event(Record):
    """Something that happened.

    A training's step has kind ``step``, the job's name, and in `detail` its step, steps, loss, lr, tokens and seconds.
    """

    kind: EventKind
    time: float = Field(default_factory=time.time)
    """Unix time, in seconds."""
    node: str = ""
    name: str = ""
    detail: dict[str, Any] = {}


class EventLog:
    """The events of one run, in a file of one JSON object a line.

    Any number of processes may append at the same time (each line is one write to a file opened with O_APPEND) while
    others read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Event) -> None:
        """Add an event at the end.

        Raises:
            StorageError: if the file system refuses.
        """
        line = event.model_dump_json().encode() + b"\n"
        with storing("write", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                # What another process tore must not take this event with it.
                os.write(handle, b"\n" + line if _torn(handle) else line)
            finally:
                os.close(handle)

    def read(self, offset: int = 0) -> tuple[list[Event], int]:
        """All events from a byte offset on.

        Returns:
            the events, and the offset to go on from: behind the last whole line. Damaged lines are left out.

        Raises:
            StorageError: if the file is there and cannot be read.
        """
        events: list[Event] = []
        while True:
            more, following = self.read_some(offset)
            events += more
            if following == offset:
                return events, offset
            offset = following

    def read_some(self, offset: int = 0) -> tuple[list[Event], int]:
        """As `read`, at most about a megabyte; the offset stays where it is when there is no more."""
        numbered, end = self.read_numbered(offset)
        return [event for event, _ in numbered], end

    def read_numbered(self, offset: int = 0) -> tuple[list[tuple[Event, int]], int]:
        """As `read_some`, each event with the offset that follows it."""
        if offset < 0 or not self.path.exists() or offset > self.path.stat().st_size:
            return [], max(0, offset)
        found, size = [], _PORTION
        with storing("read", self.path), self.path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
            while b"\n" not in data and len(data) == size:  # a line longer than a portion
                data += file.read(size)
                size *= 2
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            offset += len(line)
            if (event := _parsed(line)) is not None:
                found.append((event, offset))
        return found, offset


def _torn(handle: int) -> bool:
    size = os.fstat(handle).st_size
    return size > 0 and os.pread(handle, 1, size - 1) != b"\n"


def _parsed(line: bytes) -> Event | None:
    if not line.strip():
        return None
    try:
        return Event.model_validate_json(line)
    except ValidationError:
        return None
