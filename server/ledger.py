"""The record that a run resumes from: one JSON object a line, appended and synced, never rewritten.

A line is believed when it is whole; a line cut short by a crash is dropped when the ledger is opened again. What the ledger
says was accepted is in the store, since the store's rename comes first.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from seedbed.common.errors import ResumeError, StorageError
from seedbed.common.jobs import JobResult
from seedbed.common.manifest import Record

Event = Literal[
    "start",
    "resume",
    "hello",
    "accepted",
    "quarantined",
    "closed",
    "combined",
    "evaluated",
    "finished",
    "failed",
]


class Entry(Record):
    """One thing that happened. `key` is a recipe or another hash, `name` is for people."""

    event: Event
    name: str = ""
    key: str = ""
    digest: str = ""
    node: str = ""
    reason: str = ""
    seconds: float = 0.0
    detail: dict[str, Any] = {}
    time: float = 0.0


class Ledger:
    """Append-only history of one run.

    Raises:
        StorageError: if the file cannot be written.
        ResumeError: if a line before the last is not a valid entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        if path.exists():
            self._read()

    def append(self, entry: Entry) -> None:
        """Write one entry and wait until the disk has it."""
        stamped = entry.model_copy(update={"time": time.time()})
        try:
            self._write(stamped.model_dump_json(exclude_defaults=True).encode() + b"\n")
        except OSError as error:
            raise StorageError(
                f"the ledger {self.path} cannot be written: {error.strerror}", "Free some space."
            ) from None
        self.entries.append(stamped)

    def accept(self, result: JobResult, detail: dict[str, Any]) -> None:
        """Record that a job's result passed every check."""
        self.append(
            Entry(
                event="accepted",
                name=result.name,
                key=result.recipe,
                digest=result.digest,
                node=result.node,
                seconds=result.seconds,
                detail=detail,
            )
        )

    def quarantine(self, node: str, name: str, reason: str) -> None:
        """Record why a participant's answer is not used."""
        self.append(Entry(event="quarantined", node=node, name=name, reason=reason))

    def accepted(self, key: str, event: Event = "accepted") -> Entry | None:
        """The entry that accepted a recipe, if any."""
        return next((entry for entry in self.of(event) if entry.key == key), None)

    def of(self, *events: Event) -> Iterator[Entry]:
        """Entries of some kinds, oldest first."""
        return (entry for entry in self.entries if entry.event in events)

    @property
    def contributed(self) -> list[str] | None:
        """What had been contributed when the run last finished; None where it has not."""
        finished = list(self.of("finished"))
        return [str(one) for one in finished[-1].detail.get("contributed", [])] if finished else None

    def _write(self, line: bytes) -> None:
        """All of a line or nothing: what a full disk has torn would spoil the next line, too."""
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            end = os.fstat(handle).st_size
            try:
                while line:
                    line = line[os.write(handle, line) :]
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole, newline, rest = data.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self.entries.append(Entry.model_validate(json.loads(line)))
            except (ValueError, ValidationError):
                raise ResumeError(
                    f"the ledger {self.path} is damaged at line {number}", "Restore it from a copy, or start a new run."
                ) from None
        if rest:  # a crash in the middle of a write: what was not synced was not accepted
            os.truncate(self.path, len(whole) + len(newline))
