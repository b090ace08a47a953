"""The run's store as the registry serves it: read in pieces, and given whole uploads without a second copy."""

from __future__ import annotations

import bisect
import os
import re
from dataclasses import dataclass
from pathlib import Path

import grpc

from seedbed.common.adapter_file import CONFIG, TENSORS
from seedbed.common.errors import AdapterError, AdapterMismatchError, StorageError
from seedbed.common.files import atomic_write, storing, sync_directory
from seedbed.common.manifest import Kind, Manifest
from seedbed.common.routing.router_file import ROUTER_CONFIG, ROUTER_TENSORS
from seedbed.common.storage import DirectoryStore, read_manifest
from seedbed.server.registry.refusals import Refusal

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Names:
    """What an adapter's files are called."""

    tensors: str
    config: str


def names_of(kind: Kind) -> Names:
    """Of an adapter, or of a router or gate."""
    return Names(ROUTER_TENSORS, ROUTER_CONFIG) if kind in ("router", "gate") else Names(TENSORS, CONFIG)


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter of the store, opened to be sent."""

    manifest: bytes
    config: bytes
    tensors: Path
    size: int
    """Bytes of the tensors."""


def require_digest(digest: str) -> str:
    """Refuse what is no digest: it would become part of a path.

    Raises:
        AdapterMismatchError: if it is not 64 hexadecimal digits.
    """
    if not _DIGEST.fullmatch(digest):
        raise AdapterMismatchError(f"expected a digest of 64 hexadecimal digits, got {digest[:80]!r}")
    return digest


class ServedStore(DirectoryStore):
    """A `DirectoryStore` with what a server needs beside it."""

    def holds(self, digest: str) -> bool:
        return self._directory(digest).is_dir()

    def entry(self, digest: str) -> Entry:
        """One adapter, to be sent. Its hashes are not computed: whoever receives it does that.

        Raises:
            Refusal: if it is not here.
            AdapterError, StorageError: if it is damaged or cannot be read.
        """
        directory = self._directory(digest)
        if not directory.is_dir():
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                StorageError,
                f"adapter {digest} is not in the registry",
                "`seedbed fetch` takes a digest, its beginning, `seed` or `best`.",
            )
        manifest = read_manifest(directory)
        names = names_of(manifest.kind)
        with storing("read", Path(digest)):
            size = (directory / names.tensors).stat().st_size
            return Entry(manifest.canonical(), (directory / names.config).read_bytes(), directory / names.tensors, size)

    def page(self, after: str, size: int) -> tuple[list[Manifest], str]:
        """Manifests of the next adapters in the order of their digests.

        Args:
            after: the digest behind which the page begins; empty begins at the first.
            size: manifests at most.

        Returns:
            the manifests, without damaged ones, and the digest to go on behind; empty where there is no more.
        """
        names = self._names()
        first = bisect.bisect_right(names, after)
        chosen = names[first : first + size]
        found = [manifest for name in chosen if (manifest := self._manifest(name)) is not None]
        return found, chosen[-1] if first + size < len(names) else ""

    def adopt(self, directory: Path, manifest: Manifest) -> None:
        """Take a directory itself, whole, verified and on the disk, into the store: it is renamed, not copied.

        Raises:
            StorageError: if the file system refuses.
        """
        with storing("write", self._adapters):
            self._adapters.mkdir(parents=True, exist_ok=True)
            sync_directory(directory)
            self._place(directory, manifest.digest)
        if _DIGEST.fullmatch(manifest.recipe) and self.find(manifest.recipe) is None:
            atomic_write(self._recipes / manifest.recipe, f"{manifest.digest}\n".encode())

    def _names(self) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self._adapters) if _DIGEST.fullmatch(entry.name))
        except FileNotFoundError:
            return []

    def _manifest(self, name: str) -> Manifest | None:
        try:
            manifest = read_manifest(self._adapters / name)
        except AdapterError:
            return None
        return manifest if manifest.digest == name else None
