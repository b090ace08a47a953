"""Adapters on their way in: written aside under the run directory, hashed as they come, and renamed into the store.

    uploads/<participant>/<digest>/   the adapter's own files, the tensors growing; <participant> is a hash of the name
    uploads/usage.jsonl               what was taken (see `quotas`)

An upload that breaks off stays, whatever broke it, and is continued from its length. Each participant's uploads are its own,
so nobody can spoil or stall another's by sending something else under the same digest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from seedbed.common.adapter_file import MANIFEST
from seedbed.common.errors import AdapterError, AdapterFormatError, AdapterMismatchError, SeedbedError, StorageError
from seedbed.common.files import atomic_write, storing
from seedbed.common.manifest import Manifest
from seedbed.common.storage import file_names, read_manifest, require_digest, require_form
from seedbed.server.registry.quotas import Quotas, owner_of
from seedbed.server.registry.refusals import Busy, Refusal
from seedbed.server.registry.store import ServedStore

DOCUMENT_LIMIT = 4_000_000
"""Bytes of a manifest or a configuration."""
HEADER_LIMIT = 10_000_000
"""Bytes of a safetensors header, which is parsed into many times its size."""
KEPT = 7 * 24 * 3600.0
"""Seconds that a broken-off upload waits to be continued."""
_SPARE = 256 << 20
"""Bytes of the disk that uploads leave free."""
_TAKEOVER = 10.0
"""Seconds that an older call for the same upload has to end."""
_PORTION = 1 << 20
_AGAIN = "Hand it in again; if it is refused again, the files were changed after they were written."


@dataclass(frozen=True, slots=True)
class Announced:
    """What an upload says of itself before its tensors come."""

    digest: str
    manifest: bytes
    config: bytes
    size: int
    offset: int


class Upload:
    """One open upload. Bytes are hashed and written as they come; nothing is believed before `finish`."""

    def __init__(self, directory: Path, manifest: Manifest, size: int) -> None:
        self.directory = directory
        self.manifest = manifest
        self.size = size
        self._tensors = Path(file_names(manifest.kind)[0])
        self._hash = hashlib.sha256()
        with storing("write", self._tensors):
            self._handle = os.open(directory / self._tensors, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.received = 0

    def start(self, offset: int) -> None:
        """Go on behind the first `offset` bytes, which are there.

        Raises:
            Refusal: if fewer or more are there: whoever sends must ask again.
        """
        there = os.fstat(self._handle).st_size
        if offset == 0:
            os.ftruncate(self._handle, 0)
        elif offset != there:
            raise Busy(f"{there:,} bytes of this upload are here, not {offset:,}")
        buffer = memoryview(bytearray(min(_PORTION, offset)))
        while self.received < offset:
            count = os.preadv(self._handle, [buffer], self.received)
            self._hash.update(buffer[:count])
            self.received += count

    def write(self, data: bytes) -> None:
        """Add bytes of the tensors.

        Raises:
            AdapterFormatError: if there are more than were announced.
            StorageError: if the file system refuses.
        """
        if self.received + len(data) > self.size:
            raise AdapterFormatError(f"expected {self.size:,} bytes of tensors, got more", _AGAIN)
        with storing("write", self._tensors):
            done = 0
            while done < len(data):
                done += os.pwrite(self._handle, memoryview(data)[done:], self.received + done)
        self._hash.update(data)
        self.received += len(data)

    def verify(self) -> None:
        """Flush the whole upload to the disk and check that it is the adapter that its digest names.

        Raises:
            AdapterError: if it is not.
        """
        if self._hash.hexdigest() != self.manifest.tensors_sha256:
            raise AdapterMismatchError(
                f"expected tensors of SHA-256 {self.manifest.tensors_sha256}, got {self._hash.hexdigest()}", _AGAIN
            )
        length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        if length > HEADER_LIMIT:
            raise AdapterFormatError(f"expected a safetensors header of at most {HEADER_LIMIT:,} bytes, got {length:,}")
        with storing("write", self._tensors):
            os.fsync(self._handle)
        try:
            require_form(self.directory, self.manifest.kind)
        except AdapterError as error:
            raise type(error)(
                error.message.replace(f"{self.directory}/", "").replace(str(self.directory), "it"), error.hint
            ) from None

    def close(self) -> None:
        os.close(self._handle)


@dataclass
class _Active:
    cancel: Callable[[], object]
    done: threading.Event


class Uploads:
    """All uploads of one registry, and those that its earlier processes left, but for what nobody has continued for long.

    Args:
        root: ``uploads/`` of the run directory, on the store's file system.
    """

    def __init__(self, root: Path, store: ServedStore, quotas: Quotas) -> None:
        self.root = root
        self._store = store
        self._quotas = quotas
        self._active: dict[Path, _Active] = {}
        self._lock = threading.Lock()
        with storing("read", root):
            for directory in root.glob("*/*/"):
                found = [file.stat() for file in (directory, *directory.iterdir())]
                if time.time() - max(status.st_mtime for status in found[1:] or found) > KEPT:
                    shutil.rmtree(directory, ignore_errors=True)
                else:
                    quotas.hold(directory.parent.name, directory.name, sum(status.st_size for status in found[1:]))

    def received(self, participant: str, digest: str) -> int:
        """Bytes of the tensors that a participant's broken-off upload has left."""
        directory = self._directory(participant, digest)
        try:
            return (directory / file_names(read_manifest(directory).kind)[0]).stat().st_size
        except (SeedbedError, OSError):
            return 0

    @contextmanager
    def open(self, participant: str, announced: Announced, cancel: Callable[[], object]) -> Iterator[Upload]:
        """Begin an upload or go on with it. One call at a time: a newer ends the older, whose peer has probably gone.

        Args:
            cancel: ends this call when a newer comes.

        Raises:
            AdapterError: if what it says of itself is malformed, too large, or not what the digest names.
            Refusal: if a quota would be passed or the disk is too full.
            Busy: if it must begin elsewhere, or an older call does not end.
        """
        manifest = _announced_manifest(announced)
        directory = self._directory(participant, announced.digest)
        with self._turn(directory, cancel):
            self._quotas.reserve(participant, announced.digest, announced.size)
            self._require_space(announced)
            with storing("write", Path(announced.digest)):
                directory.mkdir(parents=True, exist_ok=True)
            atomic_write(directory / MANIFEST, manifest.canonical())
            atomic_write(directory / file_names(manifest.kind)[1], announced.config)
            upload = Upload(directory, manifest, announced.size)
            try:
                upload.start(announced.offset)
                yield upload
            finally:
                upload.close()

    def finish(self, participant: str, upload: Upload) -> None:
        """Take a whole upload into the store. One that is not what it should be is removed.

        Raises:
            AdapterError: saying what is wrong with it.
            StorageError: if the file system refuses.
        """
        digest = upload.manifest.digest
        try:
            upload.verify()
        except AdapterError:
            shutil.rmtree(upload.directory, ignore_errors=True)
            self._quotas.release(owner_of(participant), digest)
            raise
        self._quotas.take(participant, digest)
        self._store.adopt(upload.directory, upload.manifest)
        shutil.rmtree(upload.directory, ignore_errors=True)  # there still where somebody else was first

    def _directory(self, participant: str, digest: str) -> Path:
        return self.root / owner_of(participant) / require_digest(digest)

    @contextmanager
    def _turn(self, directory: Path, cancel: Callable[[], object]) -> Iterator[None]:
        mine = _Active(cancel, threading.Event())
        with self._lock:
            older = self._active.get(directory)
            if older is None:
                self._active[directory] = mine
        if older is not None:
            older.cancel()
            older.done.wait(_TAKEOVER)
            with self._lock:
                if directory in self._active:
                    raise Busy("another call is handing in the same adapter")
                self._active[directory] = mine
        try:
            yield
        finally:
            with self._lock:
                del self._active[directory]
            mine.done.set()

    def _require_space(self, announced: Announced) -> None:
        with storing("read", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.root).free
        missing = announced.size - announced.offset
        if free < missing + _SPARE:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                StorageError,
                f"the registry's disk has room for {max(0, free - _SPARE):,} bytes, not for {missing:,}",
                "Tell whoever runs the federation; what was received is kept.",
            )


def _announced_manifest(announced: Announced) -> Manifest:
    """The manifest of what is announced, which fits its digest and its configuration."""
    require_digest(announced.digest)
    for name, data in (("manifest", announced.manifest), ("configuration", announced.config)):
        if len(data) > DOCUMENT_LIMIT:
            raise AdapterFormatError(f"expected a {name} of at most {DOCUMENT_LIMIT:,} bytes, got {len(data):,}")
    try:
        manifest = Manifest.model_validate_json(announced.manifest)
    except ValueError as error:
        first = str(error).splitlines()[-1].strip()[:200] if str(error) else ""
        raise AdapterFormatError(f"the adapter's manifest cannot be read: {first}", _AGAIN) from None
    if manifest.digest != announced.digest:
        raise AdapterMismatchError(f"expected adapter {announced.digest}, got {manifest.digest}", _AGAIN)
    if hashlib.sha256(announced.config).hexdigest() != manifest.config_sha256:
        raise AdapterMismatchError("the adapter's configuration is not the one that its manifest vouches for", _AGAIN)
    if announced.offset > announced.size:
        raise AdapterFormatError(f"expected an offset of at most {announced.size:,}, got {announced.offset:,}")
    return manifest
