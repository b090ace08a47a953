"""Experts that collaborators hand in without Flower: contributed, and withdrawn again by whoever contributed them.

``contributions.jsonl`` of the run directory holds a line for every contribution and withdrawal; of the lines with one
digest the last counts.
"""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import grpc
from pydantic import ValidationError

from seedbed.common.config import FederationConfig
from seedbed.common.errors import ConfigError, StorageError
from seedbed.common.registry import Contribution, FederationInfo
from seedbed.common.shapes import Shapes
from seedbed.common.storage import require_digest
from seedbed.server.registry.examination import examine, shapes_of
from seedbed.server.registry.information import Information
from seedbed.server.registry.journal import Journal
from seedbed.server.registry.refusals import Busy, Refusal
from seedbed.server.registry.store import ServedStore

FILE = "contributions.jsonl"
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class Contributions:
    """The contributions of one run."""

    def __init__(self, run: Path, store: ServedStore, information: Information) -> None:
        self._journal = Journal(run / FILE)
        self._store = store
        self._information = information
        self._lock = threading.Lock()
        self._examining = threading.Lock()
        self._shapes: Shapes | None = None
        self._held: dict[str, Contribution] = {}
        for line in self._journal.lines():
            try:
                found = Contribution.model_validate_json(line)
            except ValidationError:
                continue
            self._held[found.digest] = found

    def contribute(self, digest: str, task: str, name: str, participant: str) -> tuple[Contribution, bool]:
        """Take an adapter of the store as an expert.

        Returns:
            the contribution, and whether it is new: saying it again changes nothing.

        Raises:
            SeedbedError: saying in one sentence why not.
        """
        require_digest(digest)
        self._require_task(task)
        if name and not _NAME.fullmatch(name):
            raise ConfigError(f"expected a name of letters, digits, dots and hyphens, got {name[:40]!r}")
        name = name or f"{_UNFIT.sub('-', task).lstrip('-._') or 'expert'}-{digest[:6]}"
        wanted = Contribution(digest=digest, task=task, name=name, participant=participant, time=time.time())
        with self._lock:
            if (held := self._same(wanted)) is not None:
                return held, False
        self._examine(digest)
        with self._lock:
            if (held := self._same(wanted)) is not None:
                return held, False
            return self._note(wanted), True

    def withdraw(self, digest: str, participant: str) -> tuple[Contribution, bool]:
        """Take one's own contribution back.

        Returns:
            the contribution, and whether it was not withdrawn before.

        Raises:
            Refusal: if there is none, or it is another's.
        """
        with self._lock:
            held = self._held.get(require_digest(digest))
            if held is None:
                hint = "Give the whole digest, as `seedbed contribute` printed it."
                raise Refusal(
                    grpc.StatusCode.NOT_FOUND, StorageError, f"adapter {digest} was not contributed here", hint
                )
            if held.participant != participant:
                raise Refusal(
                    grpc.StatusCode.PERMISSION_DENIED,
                    StorageError,
                    f"adapter {digest[:12]} was contributed by {held.participant}, not by {participant}",
                    "Only whoever contributed it may withdraw it.",
                )
            if held.withdrawn:
                return held, False
            return self._note(held.model_copy(update={"withdrawn": True, "time": time.time()})), True

    def _note(self, contribution: Contribution) -> Contribution:
        self._journal.append(contribution)
        self._held[contribution.digest] = contribution
        return contribution

    def _same(self, wanted: Contribution) -> Contribution | None:
        """The contribution that already is what is wanted; refuses what stands in its way."""
        held = self._held.get(wanted.digest)
        for other in self._held.values():
            taken = other.name == wanted.name and other.digest != wanted.digest
            if taken and not other.withdrawn:
                raise ConfigError(f"another contribution is already called '{wanted.name}'", "Choose another name.")
        if held is None or held.withdrawn:
            return None
        if held.participant != wanted.participant:
            raise ConfigError(f"adapter {wanted.digest[:12]} was already contributed by {held.participant}")
        if (held.task, held.name) != (wanted.task, wanted.name):
            raise ConfigError(
                f"adapter {wanted.digest[:12]} was already contributed as '{held.name}' for task {held.task}",
                "Withdraw it first.",
            )
        return held

    def _require_task(self, task: str) -> None:
        info, _ = self._set_up()
        if not task or len(task) > 100 or not task.isprintable():
            raise ConfigError(f"expected the name of a task of 1 to 100 characters, got {task[:40]!r}")
        if task in info.held_out:
            raise ConfigError(
                f"task {task} is held out: no expert may be trained on it", f"Held in are: {', '.join(info.tasks)}."
            )

    def _examine(self, digest: str) -> None:
        info, config = self._set_up()
        self._store.entry(digest)  # refuses an unknown one before anything is computed
        with self._examining:  # one at a time: each reads a whole adapter
            if self._shapes is None:
                self._shapes = shapes_of(config, info, self._store)
            examine(digest, self._store, info, self._shapes, config.run.norm_bound)

    def _set_up(self) -> tuple[FederationInfo, FederationConfig]:
        found = self._information.look()
        if found is None:
            raise Busy("the federation is not set up yet")
        return found
