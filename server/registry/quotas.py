"""How much each participant, and all together, may hand in; remembered across restarts.

Uploads that were broken off count with the size that they announced, since they hold their place. What is in the store
already costs nobody anything.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc
from pydantic import ValidationError

from seedbed.common.errors import AdapterFormatError, StorageError
from seedbed.common.manifest import Record
from seedbed.server.registry.journal import Journal
from seedbed.server.registry.refusals import Refusal

LEAST = 1 << 16
"""Bytes that the smallest adapter counts: each takes a directory, three files and a line in every list."""


@dataclass(frozen=True, slots=True)
class Limits:
    """In bytes."""

    upload: int = 8 << 30
    """Of the tensors of one adapter."""
    participant: int = 64 << 30
    total: int = 512 << 30


class Handed(Record):
    """An upload that was taken."""

    participant: str
    digest: str
    bytes: int


def owner_of(participant: str) -> str:
    """A name for a participant's folder, whatever characters its own has."""
    return hashlib.sha256(participant.encode()).hexdigest()[:32]


class Quotas:
    """The account of all uploads of one run.

    Args:
        path: where taken uploads are noted, one JSON object a line.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.limits = limits
        self._journal = Journal(path)
        self._lock = threading.Lock()
        self._taken: dict[tuple[str, str], int] = {}
        self._pending: dict[tuple[str, str], int] = {}
        for line in self._journal.lines():
            try:
                handed = Handed.model_validate_json(line)
            except ValidationError:
                continue
            self._taken[owner_of(handed.participant), handed.digest] = handed.bytes

    def used(self, participant: str) -> int:
        """Bytes that count against a participant."""
        with self._lock:
            return self._sum(owner_of(participant))

    def hold(self, owner: str, digest: str, size: int) -> None:
        """Count what an upload of an earlier process has left."""
        with self._lock:
            self._pending[owner, digest] = max(size, LEAST)

    def reserve(self, participant: str, digest: str, size: int) -> None:
        """Make room for an upload of `size` bytes, in place of what was reserved for it before.

        Raises:
            AdapterFormatError: if one adapter may not be that large.
            Refusal: if a quota would be passed.
        """
        if size > self.limits.upload:
            raise AdapterFormatError(
                f"expected an adapter of at most {self.limits.upload:,} bytes, got {size:,}", "Use a lower rank."
            )
        owner, cost = owner_of(participant), max(size, LEAST)
        with self._lock:
            for whose, used, limit in (
                (f"what {participant} may hand in", self._sum(owner, but=(owner, digest)), self.limits.participant),
                ("what all participants may hand in", self._sum(but=(owner, digest)), self.limits.total),
            ):
                if used + cost > limit:
                    raise _full(whose, cost, used, limit)
            self._pending[owner, digest] = cost

    def take(self, participant: str, digest: str) -> None:
        """Note for good that an upload was taken."""
        key = owner_of(participant), digest
        with self._lock:
            cost = self._pending.get(key, LEAST)
            if self._taken.get(key) != cost:
                self._journal.append(Handed(participant=participant, digest=digest, bytes=cost))
                self._taken[key] = cost
            self._pending.pop(key, None)

    def release(self, owner: str, digest: str) -> None:
        """Forget an upload that is gone."""
        with self._lock:
            self._pending.pop((owner, digest), None)

    def _sum(self, owner: str | None = None, but: tuple[str, str] | None = None) -> int:
        """What is taken and pending, of one owner or of all, without one upload: each counts once, also when it comes again."""
        account = self._taken | self._pending
        return sum(size for key, size in account.items() if owner in (None, key[0]) and key != but)


def _full(whose: str, cost: int, used: int, limit: int) -> Refusal:
    return Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        StorageError,
        f"{cost:,} bytes more would pass {whose}: {used:,} of {limit:,} bytes are used",
        "Ask whoever runs the federation for a larger quota.",
    )
