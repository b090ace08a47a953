"""Where adapters live: a content-addressed store, and by way of it everything that reads and writes adapters.

    root/adapters/<digest>/   a PEFT directory (or a router's) with its manifest; the digest is the manifest's
    root/recipes/<recipe>     the digest of the adapter that this recipe made

What is in a store never changes, so any number of processes may read and write one at the same time: entries are
written aside and renamed, and of two that put the same adapter at once, one wins and both are right.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Protocol

from seedbed.common.adapter_file import FILES, AdapterFile, read_manifest
from seedbed.common.checks import check_update, require_base
from seedbed.common.errors import AdapterError, AdapterMismatchError, StorageError
from seedbed.common.files import atomic_write, new_directory, storing, sync_directory, temporary_beside
from seedbed.common.manifest import Manifest
from seedbed.common.peft_format import read_adapter, write_adapter
from seedbed.common.routing.router_file import ROUTER_FILES, read_router

__all__ = [
    "AdapterFile",
    "AdapterStore",
    "DirectoryStore",
    "atomic_write",
    "check_update",
    "new_directory",
    "read_adapter",
    "read_manifest",
    "require_base",
    "write_adapter",
]

_DIGEST = re.compile(r"[0-9a-f]{64}")


class AdapterStore(Protocol):
    """Adapters by digest, wherever they are."""

    def put(self, directory: Path) -> str:
        """Take a copy of a PEFT directory with manifest and return its digest; putting it again changes nothing."""

    def open(self, digest: str) -> Path:
        """A local PEFT directory with that adapter, verified; to be read, never changed."""

    def list(self) -> list[Manifest]:
        """Manifests of all adapters, in the order of their digests."""

    def find(self, recipe: str) -> str | None:
        """Digest of the adapter that a recipe made, if there is one."""


class DirectoryStore:
    """An `AdapterStore` in a local (or shared) directory, which is made when it is first written to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._adapters = root / "adapters"
        self._recipes = root / "recipes"

    def put(self, directory: Path) -> str:
        """See `AdapterStore.put`. The copy is verified, not the original.

        Raises:
            AdapterError: if the directory is not a whole adapter or router with manifest (see `AdapterFile`).
            StorageError: if the file system refuses.
        """
        read_manifest(directory)
        with storing("write", self._adapters):
            self._adapters.mkdir(parents=True, exist_ok=True)
            aside = temporary_beside(self._adapters / "new")
            try:
                manifest = _copy(directory, aside)
                self._place(aside, manifest.digest)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        if _DIGEST.fullmatch(manifest.recipe):
            atomic_write(self._recipes / manifest.recipe, f"{manifest.digest}\n".encode())
        return manifest.digest

    def open(self, digest: str) -> Path:
        """See `AdapterStore.open`. Every hash is computed again.

        Raises:
            StorageError: if it is not in the store.
            AdapterMismatchError: if what is there is not what the digest names.
        """
        directory = self._directory(digest)
        if not directory.is_dir():
            raise StorageError(f"adapter {digest} is not in the store {self.root}", "Put it there, or ask for another.")
        try:
            got = _verified(directory).digest
        except AdapterError as error:
            raise AdapterMismatchError(f"adapter {digest} is damaged in the store: {error.message}", _AGAIN) from None
        if got != digest:
            raise AdapterMismatchError(f"store {self.root}: expected adapter {digest}, got {got}", _AGAIN)
        return directory

    def list(self) -> list[Manifest]:
        """See `AdapterStore.list`. Entries with a damaged manifest are left out; `open` says what is wrong with one."""
        found = []
        for name in _names(self._adapters):
            try:
                manifest = read_manifest(self._adapters / name)
            except AdapterError:
                continue
            if manifest.digest == name:
                found.append(manifest)
        return found

    def find(self, recipe: str) -> str | None:
        """See `AdapterStore.find`."""
        path = self._recipes / recipe
        if not _DIGEST.fullmatch(recipe) or not path.is_file():
            return None
        with storing("read", path):
            digest = path.read_text(encoding="ascii", errors="replace").strip()
        return digest if _DIGEST.fullmatch(digest) and (self._adapters / digest).is_dir() else None

    def _directory(self, digest: str) -> Path:
        # Digests come in messages: anything else could be a path out of the store.
        if not _DIGEST.fullmatch(digest):
            raise AdapterMismatchError(f"expected a digest of 64 hexadecimal digits, got {digest[:80]!r}")
        return self._adapters / digest

    def _place(self, aside: Path, digest: str) -> None:
        """Rename a verified copy to its digest, unless it is there and whole; a damaged one makes way."""
        target = self._adapters / digest
        for _ in range(2):
            try:
                os.rename(aside, target)
                return sync_directory(self._adapters)
            except OSError:
                if not target.is_dir():
                    raise
            try:
                self.open(digest)
                return None
            except AdapterError:
                damaged = temporary_beside(target)
                os.rename(target, damaged)
                shutil.rmtree(damaged, ignore_errors=True)
        raise StorageError(f"cannot write {target}: another process keeps writing it", "Try again.")


_AGAIN = "Remove that entry of the store and put the adapter again."


def _copy(source: Path, target: Path) -> Manifest:
    target.mkdir()
    for name in ROUTER_FILES if _is_router(source) else FILES:
        shutil.copyfile(source / name, target / name)
        with (target / name).open("rb") as file:
            os.fsync(file.fileno())
    return _verified(target)


def _is_router(directory: Path) -> bool:
    return read_manifest(directory).kind in ("router", "gate")


def _verified(directory: Path) -> Manifest:
    """The manifest of a whole adapter or router; every hash is computed again."""
    return read_router(directory)[2] if _is_router(directory) else AdapterFile(directory).manifest


def _names(directory: Path) -> list[str]:
    if not directory.is_dir():
        return []
    with storing("read", directory):
        return sorted(entry.name for entry in directory.iterdir() if _DIGEST.fullmatch(entry.name))
