"""Checks of the way to the coordinator: keys, certificates, the gateway, the clock, the registry."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
from cryptography.x509 import load_pem_x509_certificate

from seedbed.client.join.contact import Contact, Greeting
from seedbed.client.join.keys import Keys
from seedbed.client.preflight.report import Check, failed
from seedbed.common.errors import SeedbedError
from seedbed.common.registry import FederationInfo

_SOON = timedelta(days=14)
_AHEAD_SECONDS, _BEHIND_SECONDS = 5.0, 300.0
"""What Flower's node authentication bears: our clock ahead of the coordinator's by so much, or behind it."""
_TIMEOUT = 10.0
_NO_RECIPE = "0" * 64


def keys(found: Keys) -> Iterator[Check]:
    """Validity of the certificates, and who may read the private keys."""
    now = datetime.now(UTC)
    when = f"certificate of '{found.name}', valid until {found.expires:%Y-%m-%d %H:%M} UTC"
    if now >= found.expires:
        yield Check(
            "keys", "fail", f"{when}: it has expired", "Ask the coordinator for new ones (`seedbed keys rotate`)."
        )
    elif now < found.begins:
        remedy = "Set this machine's clock; it is behind the one that made the keys."
        yield Check("keys", "fail", f"{when}: it is not valid before {found.begins:%Y-%m-%d %H:%M} UTC", remedy)
    elif found.expires - now < _SOON:
        yield Check("keys", "warn", when, "Ask the coordinator for new ones soon (`seedbed keys rotate`).")
    else:
        yield Check("keys", "ok", when)
    yield from _private(found)
    open_files = [path for path in found.private if path.stat().st_mode & 0o077]
    if open_files:
        paths = " ".join(map(str, open_files))
        yield Check("private keys", "warn", f"others can read {paths}", f"chmod 600 {paths}")


def _private(found: Keys) -> Iterator[Check]:
    """Whether the private keys are keys, and that of the certificate is its own."""
    remedy = "Ask the coordinator for the folder once more (`seedbed keys rotate` makes a new one)."
    try:
        own = load_pem_private_key(found.key.read_bytes(), None)
        node = load_ssh_private_key(found.node_key.read_bytes(), None)
        certificate = load_pem_x509_certificate(found.certificate.read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        yield Check(
            "keys", "fail", f"client.key or node.key beside {found.certificate} is no usable private key", remedy
        )
        return
    if own.public_key() != certificate.public_key():
        yield Check("keys", "fail", f"{found.key} is not the key of {found.certificate}", remedy)
    elif not isinstance(node, EllipticCurvePrivateKey):
        yield Check("keys", "fail", f"{found.node_key} is no key of a SuperNode", remedy)


def gateway(contact: Contact) -> tuple[Greeting | None, Check]:
    """Whether the coordinator answers; over TLS this verifies chain, host name and expiry of its certificate."""
    try:
        greeting = contact.greet(_TIMEOUT)
    except SeedbedError as error:
        return None, failed("gateway", error)
    how = "TLS, its certificate fits" if contact.keys is not None else "no TLS"
    info = greeting.info
    return greeting, Check("gateway", "ok", f"federation '{info.name}' at {contact.address}, {info.state} ({how})")


def clock(offset: float | None, *, signed: bool) -> Check:
    """Our clock against the coordinator's, which decides whether signed requests are accepted.

    Args:
        offset: seconds that the coordinator's is ahead.
        signed: whether requests are signed, that is, whether there are keys.
    """
    if offset is None:
        return Check("clock", "warn", "the coordinator does not tell its time", "Compare the clocks by hand.")
    found = f"{abs(offset):.0f} s {'behind' if offset > 0 else 'ahead of'} the coordinator's"
    remedy = "Set the clock: `timedatectl set-ntp true`, or run an NTP client."
    if signed and not -_AHEAD_SECONDS <= offset <= _BEHIND_SECONDS:
        return Check("clock", "fail", f"{found}, Flower refuses such requests", remedy)
    if not -_AHEAD_SECONDS / 2 <= offset <= _BEHIND_SECONDS / 5:
        return Check("clock", "warn", found, remedy)
    return Check("clock", "ok", found)


def registry(contact: Contact, info: FederationInfo, name: str) -> Check:
    """Whether adapters can be fetched and handed in, as this participant."""
    from seedbed.client.registry import RegistryClient

    access = contact.registry(info, name)
    try:
        client = RegistryClient(access, deadline=_TIMEOUT, patience=0.0)
        try:
            client.find(_NO_RECIPE)  # a question that it can answer at any time
        finally:
            client.close()
    except SeedbedError as error:
        return failed("registry", error)
    return Check("registry", "ok", f"{access.address} answers")
