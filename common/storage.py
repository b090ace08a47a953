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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from seedbed.common.adapter_file import CONFIG, MANIFEST, TENSORS, AdapterFile, read_manifest
from seedbed.common.checks import check_update, require_base
from seedbed.common.errors import AdapterError, AdapterMismatchError, StorageError
from seedbed.common.files import atomic_write, new_directory, storing, sync_directory, temporary_beside
from seedbed.common.manifest import Kind, Manifest
from seedbed.common.peft_format import read_adapter, write_adapter
from seedbed.common.routing.router_file import ROUTER_CONFIG, ROUTER_TENSORS, read_router

__all__ = [
    "AdapterFile",
    "AdapterStore",
    "DirectoryStore",
    "atomic_write",
    "check_update",
    "file_names",
    "is_digest",
    "new_directory",
    "read_adapter",
    "read_manifest",
    "require_base",
    "require_digest",
    "require_form",
    "write_adapter",
]

_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def require_digest(text: str) -> str:
    """Refuse what is no digest: digests come in messages, and anything else could be a path out of a store.

    Raises:
        AdapterMismatchError: if it is not 64 hexadecimal digits.
    """
    if not is_digest(text):
        raise AdapterMismatchError(f"expected a digest of 64 hexadecimal digits, got {text[:80]!r}")
    return text


def file_names(kind: Kind) -> tuple[str, str]:
    """What the tensors and the configuration of an adapter, or of a router or gate, are called."""
    return (ROUTER_TENSORS, ROUTER_CONFIG) if kind in ("router", "gate") else (TENSORS, CONFIG)


def require_form(directory: Path, kind: Kind) -> None:
    """Refuse what is no adapter (or router, or gate) by its header and configuration; an adapter's tensors are not hashed.

    Raises:
        AdapterError: if it is malformed, or not what its manifest says.
    """
    if kind in ("router", "gate"):
        read_router(directory)
    else:
        AdapterFile(directory, verify_later=True)


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
                self._settle(aside, manifest.digest)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        self._remember(manifest)
        return manifest.digest

    def adopt(self, directory: Path, manifest: Manifest) -> None:
        """Take a directory itself, which is verified and flushed: it is renamed, not copied, or left where it was not needed.

        A recipe that has made something already keeps it: whoever hands in another result does not take its place.

        Args:
            directory: on the store's file system.
            manifest: its own.

        Raises:
            StorageError: if the file system refuses.
        """
        with storing("write", self._adapters):
            self._adapters.mkdir(parents=True, exist_ok=True)
            sync_directory(directory)
            self._settle(directory, manifest.digest)
        if self.find(manifest.recipe) is None:
            self._remember(manifest)

    def place(self, digest: str) -> Path:
        """Where an adapter is, or would be.

        Raises:
            AdapterMismatchError: if it is no digest.
        """
        return self._adapters / require_digest(digest)

    def holds(self, digest: str) -> bool:
        """Whether an adapter is there; only `open` looks whether it is whole."""
        return self.place(digest).is_dir()

    def open(self, digest: str) -> Path:
        """See `AdapterStore.open`. Every hash is computed again.

        Raises:
            StorageError: if it is not in the store.
            AdapterMismatchError: if what is there is not what the digest names.
        """
        directory = self.place(digest)
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
        return [*self.manifests(self.digests())]

    def digests(self) -> Sequence[str]:
        """Of all entries, sorted; a damaged one's, too."""
        with storing("read", self._adapters):
            try:
                return sorted(name for name in os.listdir(self._adapters) if is_digest(name))
            except FileNotFoundError:
                return []

    def manifests(self, digests: Iterable[str]) -> Iterator[Manifest]:
        """Of some entries, without those that are damaged or not there."""
        for digest in digests:
            try:
                manifest = read_manifest(self.place(digest))
            except AdapterError:
                continue
            if manifest.digest == digest:
                yield manifest

    def find(self, recipe: str) -> str | None:
        """See `AdapterStore.find`."""
        path = self._recipes / recipe
        if not is_digest(recipe) or not path.is_file():
            return None
        with storing("read", path):
            digest = path.read_text(encoding="ascii", errors="replace").strip()
        return digest if is_digest(digest) and self.holds(digest) else None

    def _remember(self, manifest: Manifest) -> None:
        if is_digest(manifest.recipe):
            atomic_write(self._recipes / manifest.recipe, f"{manifest.digest}\n".encode())

    def _settle(self, aside: Path, digest: str) -> None:
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
    for name in (*file_names(read_manifest(source).kind), MANIFEST):
        shutil.copyfile(source / name, target / name)
        with (target / name).open("rb") as file:
            os.fsync(file.fileno())
    return _verified(target)


def _verified(directory: Path) -> Manifest:
    """The manifest of a whole adapter or router; every hash is computed again."""
    is_router = read_manifest(directory).kind in ("router", "gate")
    return read_router(directory)[2] if is_router else AdapterFile(directory).manifest
