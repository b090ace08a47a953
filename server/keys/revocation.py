"""Which certificates are no longer believed: ``revoked.json``, ``{"serials": ["1f0c…", …]}`` in lower-case hexadecimal.

Whoever accepts client certificates asks `is_revoked` for every connection or call: the file is read again when it changes,
so that a revocation holds at once, without a restart.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from seedbed.common.errors import ConfigError
from seedbed.common.files import atomic_write, storing

REVOKED = "revoked.json"
_SERIAL = re.compile(r"[0-9a-f]{1,40}")  # RFC 5280: at most 20 octets
_LIMIT = 50_000_000
_Stamp = tuple[int, int, int]
_seen: dict[Path, tuple[_Stamp, frozenset[int]]] = {}


def is_revoked(directory: Path, serial: int | str) -> bool:
    """Whether a certificate has been revoked.

    Args:
        directory: the keys directory.
        serial: as a number, or in hexadecimal.

    Raises:
        ConfigError: if the list is damaged: then nobody can be believed.
        StorageError: if it is missing or cannot be read: then neither.
    """
    return (serial if isinstance(serial, int) else int(serial, 16)) in revoked_serials(directory)


def revoked_serials(directory: Path) -> frozenset[int]:
    """All revoked serial numbers, from memory while the file is unchanged.

    Raises:
        ConfigError, StorageError: as `is_revoked`.
    """
    path = directory / REVOKED
    with storing("read", path):
        state = path.stat()
        # Written aside and renamed, so a changed file is another inode even where its time and size are the same.
        stamp = (state.st_ino, state.st_mtime_ns, state.st_size)
        known = _seen.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        with path.open("rb") as file:
            text = file.read(_LIMIT + 1)
    serials = _parse(path, text)
    _seen[path] = (stamp, serials)
    return serials


def write_revoked(directory: Path, serials: frozenset[int]) -> None:
    """Replace the list.

    Raises:
        StorageError: if the file system refuses.
    """
    document = {"serials": sorted(f"{serial:x}" for serial in serials)}
    atomic_write(directory / REVOKED, (json.dumps(document, indent=2) + "\n").encode())


def _parse(path: Path, text: bytes) -> frozenset[int]:
    try:
        document = json.loads(text) if len(text) <= _LIMIT else None
    except (ValueError, RecursionError):
        document = None
    serials = document.get("serials") if isinstance(document, dict) else None
    if not isinstance(serials, list) or not all(isinstance(one, str) and _SERIAL.fullmatch(one) for one in serials):
        raise ConfigError(
            f"{path} is not a list of revoked certificates",
            'Restore it from a copy; it reads {"serials": ["1f0c..."]}.',
        )
    return frozenset(int(one, 16) for one in serials)
