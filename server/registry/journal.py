"""An append-only file of one JSON object a line, on the disk before anything else is said, written by this process alone."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from seedbed.common.files import storing
from seedbed.common.manifest import Record


class Journal:
    """Lines that outlive the process. What a crash cut short is dropped when the file is opened again.

    Raises:
        StorageError: if the file cannot be read or mended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        with storing("read", path):
            if path.exists() and (torn := len(data := path.read_bytes()) - (data.rfind(b"\n") + 1)):
                os.truncate(path, len(data) - torn)

    def lines(self) -> list[bytes]:
        """All whole lines, oldest first."""
        with storing("read", self.path):
            return self.path.read_bytes().splitlines() if self.path.exists() else []

    def append(self, record: Record) -> None:
        """Add a line and wait until the disk has it.

        Raises:
            StorageError: if the file system refuses; nothing was added then.
        """
        with self._lock, storing("write", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    file.write(record.model_dump_json().encode() + b"\n")
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, end)
                    raise
