"""A run directory as it grows: its ledger and its event log, read on from where the last look ended.

Nothing is locked and nothing written, so any number of readers may look at a run that other processes are at work in. A
last line that is not whole yet is left for the next look. A run of `seedbed simulate` has no event log and is seen through
its ledger; where there are both, the ledger tells what happened before the log began, and that nothing accepted is missed.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import yaml
from pydantic import ValidationError

from seedbed.common.errors import StorageError
from seedbed.common.events import EventLog
from seedbed.common.files import storing
from seedbed.server.ledger import Entry
from seedbed.server.monitor.fold import fold_all, from_entry
from seedbed.server.monitor.state import Status

EVENTS, LEDGER, CONFIG = "events.jsonl", "ledger.jsonl", "config.yaml"


class RunReader:
    """Follows one run; any number of threads may look.

    Args:
        root: the run directory.
        awaited: it may not be there yet; until it is, the federation waits.

    Raises:
        StorageError: if it is none.
    """

    def __init__(self, root: Path, *, awaited: bool = False) -> None:
        if not awaited and not any((root / name).exists() for name in (EVENTS, LEDGER, CONFIG)):
            what = "is not a run directory" if root.exists() else "does not exist"
            raise StorageError(f"{root} {what}", "Name the directory that --out named, or HOST:PORT of a coordinator.")
        self.root = root
        self.status = Status(name=root.resolve().name)
        self._named = False
        self._log = EventLog(root / EVENTS)
        self._offset = self._entries = 0
        self._log_began: float | None = None
        self._lock = threading.Lock()

    def look(self) -> Status:
        """The status now.

        Raises:
            StorageError: if a file cannot be read.
        """
        with self._lock:
            return self._look()

    def _look(self) -> Status:
        if not self._named and (name := _name(self.root)):
            self.status, self._named = replace(self.status, name=name), True
        entries = self._new_entries()  # before the events, which are then at least as new
        first = self._log_began is None
        events, self._offset = self._log.read_some(self._offset)
        if first and events:
            self._log_began = events[0].time
        late = [entry for entry in entries if self._log_began is not None and entry.time >= self._log_began]
        early = entries[: len(entries) - len(late)]
        self.status = fold_all(self.status, [event for entry in early for event in from_entry(entry)])
        while events:
            self.status = fold_all(self.status, events)
            events, self._offset = self._log.read_some(self._offset)
        accepted = [event for entry in late for event in from_entry(entry) if event.kind == "accepted"]
        self.status = fold_all(self.status, accepted)
        return self.status

    def _new_entries(self) -> list[Entry]:
        path = self.root / LEDGER
        if not path.exists():
            return []
        with storing("read", path), path.open("rb") as file:
            file.seek(self._entries)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._entries += len(whole)
        return [entry for line in whole.splitlines() if (entry := _entry(line)) is not None]


def _entry(line: bytes) -> Entry | None:
    try:
        return Entry.model_validate_json(line)
    except ValidationError:
        return None  # of another version, or damaged: whoever resumes from it says so


def _name(root: Path) -> str:
    try:
        found = yaml.safe_load((root / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return ""
    return str(found.get("name", "")) if isinstance(found, dict) else ""
