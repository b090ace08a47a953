"""One adapter on its way out of a registry or into one: in chunks, hashed as they come, continued where they broke off."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from seedbed.common.adapter_file import MANIFEST, AdapterFile
from seedbed.common.errors import AdapterFormatError, AdapterMismatchError
from seedbed.common.files import storing, sync_directory, temporary_beside, write_file
from seedbed.common.manifest import Manifest
from seedbed.common.registry import CHUNK
from seedbed.common.storage import file_names, read_manifest, require_form
from seedbed.proto.v1 import registry_pb2 as pb

OnBytes = Callable[[int, int], None]
"""Told of progress: bytes of the tensors that are there, and of all of them."""
_AGAIN = "Fetch it again; if that fails again, tell whoever runs the federation."


class Download:
    """An adapter that is being fetched, in a directory beside the one that it becomes."""

    def __init__(self, digest: str, directory: Path, handle: int, part: Path) -> None:
        self._digest = digest
        self._directory = directory
        self._handle = handle
        self._part = part
        self._hash = hashlib.sha256()
        self._manifest: Manifest | None = None
        self._config = b""
        self.received = 0
        self.size = 0
        self.resumed = self._rehash()
        """Bytes that were left here before; 0 once they are forgotten."""

    @property
    def manifest(self) -> Manifest:
        assert self._manifest is not None
        return self._manifest

    def begin(self, header: pb.Header) -> None:
        """Take the header, which must be what the digest names.

        Raises:
            AdapterError: if it is not.
        """
        try:
            manifest = Manifest.model_validate_json(header.manifest)
        except ValueError:
            raise AdapterFormatError(f"adapter {self._digest} has a manifest that cannot be read", _AGAIN) from None
        _same("adapter", self._digest, manifest.digest)
        _same("configuration", manifest.config_sha256, hashlib.sha256(header.config).hexdigest())
        self._manifest, self._config, self.size = manifest, header.config, header.size
        if self.received > self.size:
            self.restart()

    def write(self, data: bytes) -> None:
        """Add bytes of the tensors.

        Raises:
            AdapterMismatchError: if there are more than were announced.
        """
        if self.received + len(data) > self.size:
            raise AdapterMismatchError(f"adapter {self._digest}: expected {self.size:,} bytes, got more", _AGAIN)
        with storing("write", self._part):
            done = 0
            while done < len(data):
                done += os.pwrite(self._handle, memoryview(data)[done:], self.received + done)
        self._hash.update(data)
        self.received += len(data)

    def restart(self) -> None:
        """Forget all bytes."""
        os.ftruncate(self._handle, 0)
        self._hash, self.received, self.resumed = hashlib.sha256(), 0, 0

    def is_whole(self) -> bool:
        """Whether the bytes are those that the manifest vouches for."""
        return self.received == self.size and self._hash.hexdigest() == self.manifest.tensors_sha256

    def finish(self) -> Manifest:
        """Check the adapter and give it its place. Of what is damaged there is nothing to go on from: `discard` it.

        Raises:
            AdapterError: if it is damaged or malformed.
        """
        tensors, config = file_names(self.manifest.kind)
        _same("tensors", self.manifest.tensors_sha256, self._hash.hexdigest())
        with storing("write", self._directory):
            os.fsync(self._handle)
            os.rename(self._part / "tensors", self._part / tensors)
            write_file(self._part / config, self._config)
            write_file(self._part / MANIFEST, self.manifest.canonical())
            require_form(self._part, self.manifest.kind)
            sync_directory(self._part)
            if self._directory.is_dir():  # it came another way
                self.discard()
            else:
                os.rename(self._part, self._directory)
            sync_directory(self._directory.parent)
        return self.manifest

    def discard(self) -> None:
        """Forget all of it. It goes as a whole, so that who waits for this place does not begin in what vanishes."""
        aside = temporary_beside(self._part)
        with suppress(OSError):  # it is done after an error that says more
            os.rename(self._part, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _rehash(self) -> int:
        buffer = memoryview(bytearray(CHUNK))
        while count := os.preadv(self._handle, [buffer], self.received):
            self._hash.update(buffer[:count])
            self.received += count
        return self.received


@contextmanager
def downloading(digest: str, directory: Path) -> Iterator[Download | None]:
    """A download that no other process makes at the same time; None if another has just finished it.

    What is not finished stays in ``.part-<digest>`` beside the directory, to be continued.

    Raises:
        StorageError: if the file system refuses.
    """
    part = directory.parent / f".part-{digest}"
    lock = _locked(part, directory)
    if lock is None:
        yield None
        return
    try:
        with storing("write", part):
            handle = os.open(part / "tensors", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            yield Download(digest, directory, handle, part)
        finally:
            os.close(handle)
    finally:
        os.close(lock)


def _locked(part: Path, directory: Path) -> int | None:
    """The lock of a part, or None once `directory` is there.

    What is locked is the manifest, empty until the end: of all files in there it alone keeps its name and its inode until the
    part as a whole gets another name. So nobody who finds it under its name and holds it has been overtaken.
    """
    while not directory.is_dir():
        with storing("write", part):
            part.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # with exist_ok it fails on one that gets its other name meanwhile
                part.mkdir()
            try:
                lock = os.open(part / MANIFEST, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # renamed by whoever finished it
                continue
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_there(lock, part / MANIFEST):
                return lock
            os.close(lock)
    return None


def _is_there(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Outgoing:
    """An adapter on this disk that is handed in."""

    directory: Path
    manifest: Manifest
    config: bytes
    tensors: Path
    size: int

    @classmethod
    def of(cls, directory: Path) -> Outgoing:
        """Of a PEFT directory (or a router's); one without a manifest gets that of an adapter from outside.

        Raises:
            AdapterError: if it is malformed.
            StorageError: if it cannot be read.
        """
        has_manifest = (directory / MANIFEST).is_file()
        manifest = read_manifest(directory) if has_manifest else AdapterFile(directory).manifest
        tensors, config = file_names(manifest.kind)
        with storing("read", directory):
            size = (directory / tensors).stat().st_size
            return cls(directory, manifest, (directory / config).read_bytes(), directory / tensors, size)

    def requests(self, offset: int, on_chunk: Callable[[int], None]) -> Iterator[pb.SubmitRequest]:
        """The messages of one upload from an offset on."""
        header = pb.Header(manifest=self.manifest.canonical(), config=self.config, size=self.size)
        yield pb.SubmitRequest(begin=pb.SubmitRequest.Begin(digest=self.manifest.digest, header=header, offset=offset))
        with self.tensors.open("rb", buffering=0) as file:
            file.seek(offset)
            while data := file.read(CHUNK):
                yield pb.SubmitRequest(tensors=data)
                offset += len(data)
                on_chunk(offset)


def _same(what: str, expected: str, got: str) -> None:
    if expected != got:
        raise AdapterMismatchError(f"expected {what} of SHA-256 {expected}, got {got}", _AGAIN)
