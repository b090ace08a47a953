"""What a person sees of a participant: connected or not, which job, which step, which loss.

Plain lines, and on a terminal one more line at the bottom that changes. Lines of a training's steps are few in a log and as
they come at the bottom of a terminal.
"""

from __future__ import annotations

import json
import queue
import re
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError
from rich.console import Console
from rich.status import Status

from seedbed.client.progress import JOB_FILE, PROGRESS_FILE, JobNote

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_CONNECTED = re.compile(r"SuperNode ID: (\d+)|Connection successful")
_AWAY = re.compile(r"Connection attempt failed|Failed to initialize the connection")
_COMPLAINT = re.compile(r"\[code: \d+\]|\w+(Error|Exception)\b|SSL/TLS")
"""What Flower prints of why it ends."""
_EVERY_SECONDS = 15.0
"""Between two lines about the steps of one training."""
_TAIL_BYTES = 20_000
_SILENT_SECONDS = 15.0
"""A coordinator may be busy for so long before it is said that it does not answer."""


class Sight:
    """Reads what the SuperNode prints and what the jobs write, and says what is new.

    Args:
        work: the node's directory of jobs.
        where: what the coordinator is called.
    """

    def __init__(self, console: Console, work: Path, where: str) -> None:
        self.connected = False
        self._console, self._work, self._where = console, work, where
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._seen: dict[str, tuple[str, float]] = self._standing()
        self._told: dict[str, tuple[int, float]] = {}
        self._away = False
        self._answered, self._unheard = time.monotonic(), False
        self._complaint = ""
        self._stack = ExitStack()
        self._status: Status | None = None
        if console.is_terminal:
            self._status = self._stack.enter_context(console.status(f"connecting to {where}"))

    def on_line(self, line: str) -> None:
        """Take note of a line that the SuperNode printed; called from any thread."""
        self._lines.put(line)

    def say(self, text: str) -> None:
        """A line of its own, with the time."""
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True)

    def tick(self) -> None:
        """Say what is new since the last time."""
        with suppress(queue.Empty):
            while True:
                self._line(_COLOURS.sub("", self._lines.get_nowait()))
        running = ""
        for name, (note, directory) in self._notes().items():
            before = self._seen.get(name)
            if before != (note.state, note.time):
                self._seen[name] = (note.state, note.time)
                self.say(_sentence(note))
            if note.state == "training" and psutil.pid_exists(note.process):
                running = self._step(name, note, directory) or f"{note.name}: starting"
        if self._status is not None:
            idle = f"connected to {self._where}, waiting for work" if self.connected else f"connecting to {self._where}"
            self._status.update(running or idle)

    def lost(self, code: int | None, pause: float) -> None:
        """The SuperNode has ended by itself."""
        self.connected = False
        reason = f": {self._complaint}" if self._complaint else ""
        self.say(f"The SuperNode ended with exit code {code}{reason}. It is started again in {pause:.0f} s.")
        self._complaint = ""

    def asked(self, *, answered: bool) -> None:
        """The coordinator was asked how the federation stands. A SuperNode itself does not notice a cable that is pulled."""
        now = time.monotonic()
        if answered:
            self._answered = now
            if self._unheard:
                self._unheard = False
                self.say(f"{self._where} answers again.")
        elif not self._away and not self._unheard and now - self._answered > _SILENT_SECONDS:
            self._unheard = True
            self.say(f"{self._where} does not answer. Trying again until it does.")

    def close(self) -> None:
        self._stack.close()

    def _line(self, line: str) -> None:
        if _COMPLAINT.search(line) is not None:
            self._complaint = line.strip()[:300].rstrip(".")
        found = _CONNECTED.search(line)
        if found is not None and not self.connected:
            self.connected, self._away = True, False
            node = f" as node {found.group(1)}" if found.group(1) else " again"
            self.say(f"Connected to {self._where}{node}. Waiting for work.")
        elif _AWAY.search(line) is not None and not self._away:
            self.connected, self._away = False, True
            if not self._unheard:
                self.say(f"{self._where} does not answer. Trying again until it does.")

    def _standing(self) -> dict[str, tuple[str, float]]:
        """How the jobs of earlier starts stand: nothing new."""
        return {name: (note.state, note.time) for name, (note, _) in self._notes().items()}

    def _notes(self) -> dict[str, tuple[JobNote, Path]]:
        found = {}
        for file in sorted(self._work.glob(f"*/{JOB_FILE}")):
            with suppress(OSError, ValidationError):  # replaced or removed under our eyes
                found[file.parent.name] = JobNote.model_validate_json(file.read_bytes()), file.parent
        return found

    def _step(self, name: str, note: JobNote, directory: Path) -> str:
        event = last_step(directory / PROGRESS_FILE, note.time)
        if event is None:
            return ""
        text = f"{note.name}: step {event.get('step')} of {event.get('steps')}, loss {_number(event.get('loss'))}"
        step, last = int(event.get("step", 0)), self._told.get(name, (0, 0.0))
        if step != last[0] and time.monotonic() - last[1] > _EVERY_SECONDS:
            self._told[name] = step, time.monotonic()
            if self._status is None:
                self.say(text)
        return text


def last_step(file: Path, since: float = 0.0) -> dict[str, Any] | None:
    """The last step event of a record of progress, if it was written to at or after the Unix time `since`."""
    try:
        if file.stat().st_mtime < since:
            return None
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            lines = stream.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") == "step":
                return event
    return None


def _sentence(note: JobNote) -> str:
    words = {
        "training": "training begins",
        "handing in": "trained, handing the result in",
        "done": "done",
        "failed": f"failed: {note.error}",
    }
    return f"{note.name}: {words[note.state]}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "unknown"
