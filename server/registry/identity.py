"""Who is calling: under TLS the common name of the client's certificate, unless that was revoked."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from seedbed.common.errors import EnvironmentFailure, SeedbedError
from seedbed.common.registry import NAME_KEY
from seedbed.server.keys import is_revoked
from seedbed.server.registry.refusals import Refusal

ANONYMOUS = "anonymous"
_LONGEST = 200
_LOG = logging.getLogger("seedbed.registry")


class Identities:
    """Names the peers of one registry.

    Args:
        keys: the keys directory (see `server.keys.revocation`); None believes what peers say.
    """

    def __init__(self, keys: Path | None) -> None:
        self._keys = keys

    def peer(self, context: Any) -> str:
        """The caller's name.

        Raises:
            Refusal: if it has no certificate, a revoked one, or a name that is none; or if nobody can know what is revoked.
        """
        return _claimed(context) if self._keys is None else _certified(context, self._keys)


def _claimed(context: Any) -> str:
    name = dict(context.invocation_metadata()).get(NAME_KEY, b"")
    return _checked(name.decode("utf-8", "replace") or ANONYMOUS)


def _certified(context: Any, keys: Path) -> str:
    found = context.auth_context().get("x509_pem_cert")
    if not found:
        raise _unauthenticated("no client certificate came with this call")
    name, serial = _subject(found[0])
    if _is_revoked(keys, serial):
        raise _unauthenticated(f"the certificate of {name} was revoked")
    return _checked(name)


def _is_revoked(keys: Path, serial: int) -> bool:
    try:
        return is_revoked(keys, serial)
    except SeedbedError as error:
        _LOG.warning("nobody is let in: %s", error.message)
        raise Refusal(
            grpc.StatusCode.UNAVAILABLE,
            EnvironmentFailure,
            "the registry cannot read which certificates were revoked",
            "Tell the coordinator: revoked.json of its keys is missing or damaged.",
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
