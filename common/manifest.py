"""What an adapter is and where it comes from: the record that travels beside its tensors as ``seedbed.json``.

A manifest carries the SHA-256 of the tensors and of the adapter's configuration, so its own digest names the whole adapter,
and the digests of its parents, so that seed -> expert -> merge can be walked back. It holds nothing that changes when the
same work is done again on the same machine: no time stamps, no host names, no durations (those are in the ledger).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal["seed", "expert", "joint", "merge", "gate", "router", "external"]


class Record(BaseModel):
    """A frozen, strict, JSON-serializable value."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseIdentity(Record):
    """Which base model an adapter belongs to: a readable name, and the hash that decides.

    `digest` is the SHA-256 of the base model's weights and architecture; empty where it is not known, as for an adapter
    that another program wrote.
    """

    name: str
    digest: str = ""


class Manifest(Record):
    """One adapter's identity, lineage and making."""

    format: Literal[1] = 1
    kind: Kind
    base: BaseIdentity
    tensors_sha256: str
    config_sha256: str
    rank: int
    """The largest rank of any module."""
    modules: int
    """Number of adapted modules."""
    dtype: str
    parents: tuple[str, ...] = ()
    """Digests of the adapters that this one was made from, in the order of use."""
    task: str | None = None
    recipe: str = ""
    """Hash of everything that determined this adapter; two adapters with one recipe are interchangeable."""
    settings: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    versions: dict[str, str] = {}

    def canonical(self) -> bytes:
        """The bytes that are written to ``seedbed.json`` and hashed."""
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of `canonical`: the name of the whole adapter."""
        return hashlib.sha256(self.canonical()).hexdigest()


def recipe_hash(recipe: dict[str, Any]) -> str:
    """SHA-256 of a JSON-serializable description, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
