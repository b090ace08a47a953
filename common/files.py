"""Files that are never half-written: everything is written aside, flushed, and renamed into place.

A reader sees the old state or the new one, whatever is interrupted (Ctrl-C, kill -9, power). What an interruption
leaves behind has a name that begins with `.tmp-`, and nothing believes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seedbed.common.errors import StorageError

TEMPORARY = ".tmp-"

_REASONS = {
    errno.ENOSPC: ("no space is left on the device", "Free some space, then run again: what was finished is kept."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space, then run again: what was finished is kept."),
    errno.EACCES: ("permission is denied", "Change its permissions or choose another place."),
    errno.EPERM: ("permission is denied", "Change its permissions or choose another place."),
    errno.EROFS: ("the file system is read-only", "Choose a place that can be written."),
    errno.ENOTDIR: ("a part of the path is not a directory", "Choose another path."),
    errno.EISDIR: ("it is a directory", "Name a file."),
    errno.EEXIST: ("a file is where a directory is needed", "Choose another path."),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter path."),
}


@contextmanager
def storing(action: str, path: Path) -> Iterator[None]:
    """Turn an operating-system error into a sentence: ``cannot <action> <path>: <reason>``.

    Raises:
        StorageError: in place of any OSError of the body.
    """
    try:
        yield
    except OSError as error:
        reason, hint = _REASONS.get(error.errno or 0, (error.strerror or str(error), "Check the path and the disk."))
        raise StorageError(f"cannot {action} {path}: {reason}", hint) from error


def temporary_beside(path: Path) -> Path:
    """A fresh name in the same directory, so that a rename stays within one file system."""
    return path.parent / f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:12]}"


def atomic_write(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write `data` to `path`, replacing what was there, all or nothing. Missing parent directories are made.

    Args:
        private: for the owner's eyes only (mode 0600) from the first byte on, whatever the umask.

    Raises:
        StorageError: if the file system refuses.
    """
    with storing("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = temporary_beside(path)
        try:
            _write(aside, data, private)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        sync_directory(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `path` when the body ends and vanishes when it fails.

    Yields:
        the temporary directory beside `path`.

    Raises:
        StorageError: if `path` is already there, or the file system refuses.
    """
    _require_absent(path)
    with storing("write", path):
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = temporary_beside(path)
        try:
            aside.mkdir()
            yield aside
            sync_directory(aside)
            _require_absent(path)
            os.rename(aside, path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):  # in use by another by now
                for parent in made:
                    parent.rmdir()
            raise
        sync_directory(path.parent)


def write_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write and flush a file inside a `new_directory`, where no rename is needed; `private` as in `atomic_write`.

    Raises:
        StorageError: if the file system refuses.
    """
    with storing("write", path):
        _write(path, data, private)


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut; a file system that cannot do this is left alone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _write(path: Path, data: bytes, private: bool) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600 if private else 0o666)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _require_absent(path: Path) -> None:
    if os.path.lexists(path):
        raise StorageError(f"{path} is already there", "Choose another output, or remove it first.")
