"""Experts that collaborators without Flower have handed in: read from what the registry writes, checked, and taken in.

The registry appends to ``contributions.jsonl``; of the lines with one digest the last counts, and a withdrawn contribution
is none. One for a task of the federation takes that task's place where no participant has delivered; of several the first.
One for a further task joins the merges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from seedbed.common.errors import SeedbedError, StorageError
from seedbed.common.events import Event
from seedbed.common.files import storing
from seedbed.common.registry import Contribution
from seedbed.server.admission import Admission
from seedbed.server.ledger import Entry, Ledger
from seedbed.server.observer import Observer

FILE = "contributions.jsonl"


def read_contributions(run: Path) -> list[Contribution]:
    """Contributions to a run that are not withdrawn, the earliest first. A line that cannot be read is left out.

    Raises:
        StorageError: if the file cannot be read.
    """
    path = run / FILE
    if not path.exists():
        return []
    with storing("read", path):
        lines = path.read_bytes().splitlines()
    held: dict[str, Contribution] = {}
    for line in lines:
        try:
            found = Contribution.model_validate_json(line)
        except ValidationError:  # torn by a crash, or being written just now
            continue
        held[found.digest] = found
    return sorted((one for one in held.values() if not one.withdrawn), key=lambda one: (one.time, one.digest))


@dataclass
class Contributions:
    """The contributions of one run, as far as they pass.

    Args:
        run: its directory.
        admission: the refusals.
        tasks: of the federation, one expert each.
        shut_out: is told of one that is refused: who handed it in, what it is called, and why.
    """

    run: Path
    admission: Admission
    ledger: Ledger
    observe: Observer
    tasks: tuple[str, ...]
    shut_out: Callable[[str, str, str], None]
    _judged: dict[str, str] = field(default_factory=dict)
    """By digest: why it is refused, empty where it passed."""

    def admitted(self) -> list[Contribution]:
        """Those that pass, the earliest first; each is checked once."""
        found = []
        for one in read_contributions(self.run):
            if one.digest not in self._judged:
                self._judged[one.digest] = self._judge(one)
            if not self._judged[one.digest]:
                found.append(one)
        return found

    def places(self) -> dict[str, str]:
        """Digests by task of the federation: of several contributions for one task the first."""
        found: dict[str, str] = {}
        for one in self.admitted():
            if one.task in self.tasks:
                found.setdefault(one.task, one.digest)
        return found

    def guests(self) -> dict[str, str]:
        """Digests by name of contributions for further tasks."""
        return {one.name: one.digest for one in self.admitted() if one.task not in self.tasks}

    def _judge(self, one: Contribution) -> str:
        try:
            metrics = self.admission.admit_contribution(one.digest)
        except SeedbedError as error:
            self.shut_out(one.participant, f"contributed:{one.name}", error.message)
            return error.message
        self._record(one, metrics)
        return ""

    def _record(self, one: Contribution, metrics: Mapping[str, float]) -> None:
        if self.ledger.accepted(one.digest) is not None:
            return
        name, detail = f"contributed:{one.name}", {"task": one.task, **metrics}
        self.ledger.append(
            Entry(event="accepted", name=name, key=one.digest, digest=one.digest, node=one.participant, detail=detail)
        )
        told = {"digest": one.digest, **detail}
        self.observe.tell(Event(kind="accepted", node=one.participant, name=name, detail=told))
        self.observe.note(f"{one.participant} has contributed an expert for {one.task}")


def state_of(run: Path) -> list[str]:
    """What decides whether a finished run has to combine again: digests and names of what is contributed now."""
    try:
        return [f"{one.digest} {one.task} {one.name}" for one in read_contributions(run)]
    except StorageError:
        return []
