"""Who is calling: under TLS the common name of the client's certificate, unless that was revoked."""

from __future__ import annotations

import json
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from seedbed.common.errors import EnvironmentFailure
from seedbed.server.registry.refusals import Refusal

NAME_KEY = "seedbed-participant-bin"
"""Metadata by which a participant without a certificate says its name."""
ANONYMOUS = "anonymous"
_LONGEST = 200


class Identities:
    """Names the peers of one registry.

    Args:
        keys: the keys directory, whose ``revoked.json`` holds ``{"serials": [hexadecimal, …]}``; None believes what peers say.
    """

    def __init__(self, keys: Path | None) -> None:
        self._keys = keys
        self._revoked: frozenset[int] = frozenset()
        self._seen: tuple[int, int, int] | None = None
        self._lock = threading.Lock()

    def peer(self, context: Any) -> str:
        """The caller's name.

        Raises:
            Refusal: if it has no certificate, a revoked one, or a name that is none.
        """
        return self._claimed(context) if self._keys is None else self._certified(context)

    def _claimed(self, context: Any) -> str:
        name = dict(context.invocation_metadata()).get(NAME_KEY, b"")
        return _checked(name.decode("utf-8", "replace") or ANONYMOUS)

    def _certified(self, context: Any) -> str:
        found = context.auth_context().get("x509_pem_cert")
        if not found:
            raise _unauthenticated("no client certificate came with this call")
        name, serial = _subject(found[0])
        if serial in self._revoked_serials():
            raise _unauthenticated(f"the certificate of {name} was revoked")
        return _checked(name)

    def _revoked_serials(self) -> frozenset[int]:
        """Read again whenever the file has changed. A file that cannot be understood lets nobody in."""
        assert self._keys is not None
        path = self._keys / "revoked.json"
        with self._lock:
            try:
                status = path.stat()
            except FileNotFoundError:
                return frozenset()
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            if seen != self._seen:
                self._revoked, self._seen = _read(path), seen
            return self._revoked


def _read(path: Path) -> frozenset[int]:
    try:
        document = json.loads(path.read_bytes())
        return frozenset(int(str(serial).replace(":", ""), 16) for serial in document["serials"])
    except (OSError, ValueError, KeyError, TypeError):
        raise Refusal(
            grpc.StatusCode.UNAVAILABLE,
            EnvironmentFailure,
            "the registry cannot read which certificates were revoked",
            "Tell the coordinator: revoked.json of its keys is damaged.",
        ) from None


@lru_cache(maxsize=1024)
def _subject(pem: bytes) -> tuple[str, int]:
    certificate = x509.load_pem_x509_certificate(pem)
    names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else "", certificate.serial_number


def _checked(name: str) -> str:
    if not name or len(name) > _LONGEST or not name.isprintable():
        raise _unauthenticated(f"expected a participant's name of 1 to {_LONGEST} printable characters")
    return name


def _unauthenticated(message: str) -> Refusal:
    hint = "Ask whoever runs the federation for keys, and join with --keys FOLDER."
    return Refusal(grpc.StatusCode.UNAUTHENTICATED, EnvironmentFailure, message, hint)
