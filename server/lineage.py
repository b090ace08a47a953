"""Where adapters come from and what they cost: walking manifests back to the first training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from seedbed.common.manifest import Manifest
from seedbed.common.storage import AdapterStore, read_manifest
from seedbed.server.ledger import Entry, Ledger


@dataclass(frozen=True, slots=True)
class Cost:
    """What the trainings behind an adapter took."""

    jobs: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Ancestry:
    """Manifests of one store, and the ledger's account of how they came about."""

    def __init__(self, store: AdapterStore, ledger: Ledger) -> None:
        self._store = store
        self._trained: dict[str, Entry] = {entry.digest: entry for entry in ledger.of("accepted")}
        self._combined: dict[str, Entry] = {entry.digest: entry for entry in ledger.of("combined")}
        self._manifests: dict[str, Manifest] = {}

    def manifest(self, digest: str) -> Manifest:
        if digest not in self._manifests:
            self._manifests[digest] = read_manifest(self._store.open(digest))
        return self._manifests[digest]

    def name(self, digest: str) -> str:
        """What the run called it."""
        entry = self._trained.get(digest) or self._combined.get(digest)
        return entry.name if entry else "given"

    def closure(self, digests: Iterable[str]) -> list[str]:
        """The adapters and all their ancestors, each once, parents first."""
        ordered: dict[str, None] = {}
        for digest in digests:
            for parent in self.closure(self.manifest(digest).parents):
                ordered.setdefault(parent)
            ordered.setdefault(digest)
        return list(ordered)

    def cost(self, digest: str | None) -> Cost:
        """Everything that had to be trained for an adapter, each training counted once."""
        entries = [self._trained[d] for d in self.closure([digest] if digest else []) if d in self._trained]
        return total(entries)


def total(entries: Iterable[Entry]) -> Cost:
    """The cost of trainings together."""
    kept = list(entries)
    return Cost(
        jobs=len(kept),
        steps=sum(int(entry.detail.get("steps", 0)) for entry in kept),
        tokens=sum(int(entry.detail.get("tokens", 0)) for entry in kept),
        seconds=sum(entry.seconds for entry in kept),
    )
