"""Reading a keys directory without its secrets: who takes part, which keys to register, what is about to expire."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from seedbed.common.errors import ConfigError
from seedbed.common.files import storing
from seedbed.server.keys.index import Index, State
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
    require_directory(directory)
    now = now or datetime.now(UTC)
    index, revoked = Index.read(directory), revoked_serials(directory)
    found = []
    for name in sorted(index.names("participant")):
        issued = index.latest("participant", name)
        assert issued is not None
        state: State = "revoked" if int(issued.serial, 16) in revoked else issued.validity(now)
        folder = directory / "participants" / name
        found.append(Participant(name, folder, issued.serial, issued.expires, state))
    return found


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
    now = now or datetime.now(UTC)
    inside = {one.name for one in participants(directory, now) if one.state != "revoked"}
    newest = {(issued.kind, issued.name): issued for issued in Index.read(directory).certificates}
    sentences = []
    for issued in newest.values():
        state = issued.validity(now)
        if state != "valid" and (issued.kind != "participant" or issued.name in inside):
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
