"""A keys directory: the authority of one federation, what it has signed, and what it no longer vouches for.

    DIR/ca.crt  ca.key                   the authority; the key signs, guard it
    DIR/server/{server.crt,server.key}   for the coordinator's gateway, registry and SuperLink
    DIR/participants/NAME/               handed to a participant as it is: ca.crt client.crt client.key node.key node.key.pub
    DIR/index.json  revoked.json         every certificate ever signed, and the serials that are revoked

Private keys are readable by their owner only, from the first byte on, and never leave this module but into their files.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from seedbed.common.errors import ConfigError, StorageError, nearest
from seedbed.common.files import new_directory, storing, sync_directory, temporary_beside, write_file
from seedbed.server.keys.certificates import (
    LEAF_DAYS,
    NodeKey,
    Pair,
    hosts_of,
    make_authority,
    make_client,
    make_node_key,
    make_server,
)
from seedbed.server.keys.directory import Participant, participants, read_certificate, require_directory
from seedbed.server.keys.index import Index, Issued, Kind
from seedbed.server.keys.revocation import revoked_serials, write_revoked

SERVER = "server"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_RESERVED = {SERVER, "ca", "authority"}


class Authority:
    """An open keys directory; `create` makes one, `load` opens one."""

    def __init__(self, directory: Path, pair: Pair) -> None:
        self.directory = directory
        self._pair = pair

    @classmethod
    def create(
        cls, directory: Path, hosts: Iterable[str] = (), *, name: str = "Seedbed federation", days: int = LEAF_DAYS
    ) -> Authority:
        """Make a keys directory with an authority and a server certificate.

        Args:
            hosts: names and addresses by which participants reach the coordinator; its own machine's are always added.
            days: how long the server certificate is valid.

        Raises:
            ConfigError: if a host or the number of days makes no sense.
            StorageError: if the directory is already there or cannot be written.
        """
        require_days(days)
        pair = make_authority(name)
        server = make_server(pair, hosts, days)
        with new_directory(directory) as aside:
            aside.chmod(0o700)
            write_file(aside / "ca.crt", pair.certificate_pem)
            write_file(aside / "ca.key", pair.key_pem, private=True)
            write_revoked(aside, frozenset())
            Index(
                certificates=(
                    Issued.of("authority", name, pair.certificate),
                    Issued.of("server", SERVER, server.certificate),
                )
            ).write(aside)
            with _folder(aside / "participants"):
                pass
            with _folder(aside / SERVER) as folder:
                _write_server(folder, server)
        return cls(directory, pair)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """Open a keys directory to sign or revoke.

        Raises:
            ConfigError: if it is not one, it is damaged, or its authority has expired.
            StorageError: if it cannot be read.
        """
        require_directory(directory)
        with storing("read", directory / "ca.key"):
            key_pem = (directory / "ca.key").read_bytes()
        certificate = read_certificate(directory / "ca.crt")
        try:
            key = serialization.load_pem_private_key(key_pem, None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(f"{directory / 'ca.key'} is not the key of ca.crt", "Restore the directory from a copy.")
        if datetime.now(UTC) >= certificate.not_valid_after_utc:
            raise ConfigError(
                f"the authority in {directory} expired on {certificate.not_valid_after_utc:%Y-%m-%d}",
                "Make a new keys directory: seedbed keys init, then add every participant again.",
            )
        return cls(directory, Pair(certificate, key))

    def participant(self, name: str, *, days: int = LEAF_DAYS) -> Participant:
        """Admit a participant: a client certificate and a node key, in a folder to hand over.

        A name that was revoked may be given again, with keys that have nothing to do with the old ones.

        Raises:
            ConfigError: if the name is malformed or taken.
            StorageError: if the folder cannot be written.
        """
        require_name(name)
        require_days(days)
        with self._locked():
            known = self._find(name)
            if known is not None and known.state != "revoked" and known.folder.exists():
                raise ConfigError(
                    f"there is already a participant '{name}'", f"Renew its keys: seedbed keys rotate DIR {name}."
                )
            if known is not None:
                # With a new certificate its old node key would count again, until the folder is replaced.
                shutil.rmtree(known.folder, ignore_errors=True)
            return self._hand_out(name, days, make_node_key())

    def rotate(
        self, name: str, *, days: int = LEAF_DAYS, hosts: Iterable[str] = (), new_node_key: bool = False
    ) -> Path:
        """Sign a new certificate with a new key, and revoke the old one.

        Args:
            name: a participant, or ``server``, whose new certificate is for the same hosts and `hosts`.
            new_node_key: also renew the participant's Flower key: as another node to the SuperLink, which must learn it.

        Returns:
            the folder with the new files.

        Raises:
            ConfigError: if there is no such participant, or it was revoked.
        """
        require_days(days)
        if name == SERVER:
            return self._rotate_server(hosts, days)
        with self._locked():
            participant = self._require(name)
            if participant.state == "revoked":
                raise ConfigError(f"participant '{name}' was revoked", f"Admit it anew: seedbed keys add DIR {name}.")
            node_key = make_node_key() if new_node_key else _read_node_key(participant.folder)
            renewed = self._hand_out(name, days, node_key)
            self._revoke("participant", name, but=renewed.serial)
            return renewed.folder

    def revoke(self, name: str) -> Participant:
        """Stop believing every certificate of a participant; its node key is no longer registered.

        Raises:
            ConfigError: if there is no such participant.
        """
        with self._locked():
            self._require(name)
            self._revoke("participant", name)
            return self._require(name)

    def _rotate_server(self, hosts: Iterable[str], days: int) -> Path:
        folder = self.directory / SERVER
        with self._locked():
            server = make_server(self._pair, [*hosts_of(read_certificate(folder / "server.crt")), *hosts], days)
            issued = Issued.of("server", SERVER, server.certificate)
            self._record(issued)
            with _replaced(folder) as fresh:
                _write_server(fresh, server)
            self._revoke("server", SERVER, but=issued.serial)
        return folder

    def _hand_out(self, name: str, days: int, node_key: NodeKey) -> Participant:
        client = make_client(self._pair, name, days)
        self._record(Issued.of("participant", name, client.certificate))
        with _replaced(self.directory / "participants" / name) as folder:
            write_file(folder / "ca.crt", self._pair.certificate_pem)
            write_file(folder / "client.crt", client.certificate_pem)
            write_file(folder / "client.key", client.key_pem, private=True)
            write_file(folder / "node.key", node_key.private, private=True)
            write_file(folder / "node.key.pub", node_key.public)
        return self._require(name)

    def _record(self, issued: Issued) -> None:
        Index.read(self.directory).with_one_more(issued).write(self.directory)

    def _revoke(self, kind: Kind, name: str, but: str = "") -> None:
        """Revoke every certificate that a name ever had, except one."""
        known = [one for one in Index.read(self.directory).certificates if (one.kind, one.name) == (kind, name)]
        gone = {int(one.serial, 16) for one in known if one.serial != but}
        write_revoked(self.directory, revoked_serials(self.directory) | gone)

    def _find(self, name: str) -> Participant | None:
        return next((one for one in participants(self.directory) if one.name == name), None)

    def _require(self, name: str) -> Participant:
        found = self._find(name)
        if found is None:
            known = [one.name for one in participants(self.directory)]
            hint = nearest(name, known) if known else "Nobody has been admitted yet: seedbed keys add DIR NAME."
            raise ConfigError(f"there is no participant '{name}' in {self.directory}", hint)
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time, whoever runs another `seedbed keys` meanwhile."""
        with storing("lock", self.directory):
            lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(lock)


def require_name(name: str) -> None:
    """
    Raises:
        ConfigError: if a participant cannot be called so: names stand in certificates and are folders.
    """
    if not _NAME.fullmatch(name) or name.lower() in _RESERVED or name.endswith("."):
        raise ConfigError(
            f"'{name}' cannot be a participant's name",
            "Use 1 to 63 letters, digits, dots, hyphens and underscores, a letter or digit first, and not 'server' or 'ca'.",
        )


def require_days(days: int) -> None:
    """
    Raises:
        ConfigError: if a certificate cannot be valid for so long.
    """
    if not 1 <= days <= 3650:
        raise ConfigError(f"a certificate cannot be valid for {days} days", "Choose 1 to 3650.")


def _write_server(folder: Path, server: Pair) -> None:
    write_file(folder / "server.crt", server.certificate_pem)
    write_file(folder / "server.key", server.key_pem, private=True)


def _read_node_key(folder: Path) -> NodeKey:
    try:
        return NodeKey((folder / "node.key").read_bytes(), (folder / "node.key.pub").read_bytes())
    except OSError as error:
        raise StorageError(
            f"the node key in {folder} cannot be read: {error.strerror}", "Renew it too: --new-node-key."
        ) from None


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    with new_directory(path) as aside:
        aside.chmod(0o700)
        yield aside


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Fill a folder that takes the place of one that may be there: a certificate and its key change together."""
    fresh = temporary_beside(path)
    old = temporary_beside(path)
    try:
        with _folder(fresh) as aside:
            yield aside
        with storing("write", path):
            try:
                if path.exists():
                    os.rename(path, old)
                os.rename(fresh, path)
            except BaseException:
                if old.exists() and not path.exists():
                    os.rename(old, path)
                raise
            sync_directory(path.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
