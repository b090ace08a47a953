"""Reading a keys directory without its secrets: who takes part, which keys to register, what is about to expire."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from seedbed.common.errors import ConfigError
from seedbed.common.files import storing
from seedbed.server.keys.index import Index, Issued, State
from seedbed.server.keys.revocation import revoked_serials


@dataclass(frozen=True)
class Participant:
    """Somebody who may take part, or once did."""

    name: str
    folder: Path
    """What they are handed."""
    serial: str
    expires: datetime
    state: State


def participants(directory: Path, now: datetime | None = None) -> list[Participant]:
    """Everybody who was ever admitted, by name; needs no private key.

    Raises:
        ConfigError: if `directory` is not a keys directory, or it is damaged.
    """
    return [
        Participant(one.name, directory / "participants" / one.name, one.serial, one.expires, state)
        for one, state in sorted(in_use(directory, now), key=lambda found: found[0].name)
        if one.kind == "participant"
    ]


def in_use(directory: Path, now: datetime | None = None) -> list[tuple[Issued, State]]:
    """The newest certificate of everybody and everything, and how it stands.

    Raises:
        ConfigError: if `directory` is not a keys directory, or it is damaged.
    """
    require_directory(directory)
    now = now or datetime.now(UTC)
    revoked = revoked_serials(directory)
    return [
        (one, "revoked" if int(one.serial, 16) in revoked else one.validity(now))
        for one in Index.read(directory).newest
    ]


def node_keys(directory: Path) -> dict[str, Path]:
    """Public node keys to register with the SuperLink, ``name -> …/node.key.pub``; those of revoked participants are not.

    Raises:
        ConfigError: if `directory` is not a keys directory, or it is damaged.
    """
    return {
        one.name: one.folder / "node.key.pub"
        for one in participants(directory)
        if one.state != "revoked" and (one.folder / "node.key.pub").is_file()
    }


def expiry_warnings(directory: Path, now: datetime | None = None) -> list[str]:
    """A sentence for every certificate in use that has expired or soon will: the authority's, the server's, participants'.

    Raises:
        ConfigError: if `directory` is not a keys directory, or it is damaged.
    """
    sentences = []
    for issued, state in in_use(directory, now):
        if state in ("expiring", "expired"):
            word = "expired" if state == "expired" else "expires"
            who = f"participant '{issued.name}'" if issued.kind == "participant" else issued.kind
            sentences.append(f"the certificate of the {who} {word} on {issued.expires:%Y-%m-%d}")
    return sentences


def require_directory(directory: Path) -> None:
    """
    Raises:
        ConfigError: if this is not a keys directory, as the folder that a participant is handed is none.
    """
    if not directory.exists():
        raise ConfigError(f"{directory} does not exist", f"Make one: seedbed keys init {directory}.")
    lacking = [name for name in ("ca.crt", "server/server.crt") if not (directory / name).is_file()]
    if lacking:
        raise ConfigError(
            f"{directory} is not a keys directory: it has no {lacking[0]}", "Name one that `seedbed keys init` made."
        )


def read_certificate(path: Path) -> x509.Certificate:
    """
    Raises:
        ConfigError: if the file holds no certificate.
        StorageError: if it cannot be read.
    """
    with storing("read", path):
        text = path.read_bytes()
    try:
        return x509.load_pem_x509_certificate(text)
    except ValueError:
        raise ConfigError(f"{path} holds no certificate", "Restore it from a copy.") from None
