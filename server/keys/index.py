"""``index.json``: every certificate that the authority has ever signed, written down before it is handed out.

That order matters: a certificate that is not in the index could never be revoked, whereas an entry whose files a crash
prevented harms nobody.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from pydantic import ValidationError

from seedbed.common.errors import ConfigError
from seedbed.common.files import atomic_write, storing
from seedbed.common.manifest import Record
from seedbed.server.keys.certificates import WARN_DAYS

INDEX = "index.json"
Kind = Literal["authority", "server", "participant"]
State = Literal["valid", "expiring", "expired", "revoked"]


class Issued(Record):
    """One certificate: whose it is, and until when it is valid (UTC)."""

    kind: Kind
    name: str
    serial: str
    """Lower-case hexadecimal."""
    issued: datetime
    expires: datetime

    @classmethod
    def of(cls, kind: Kind, name: str, certificate: x509.Certificate) -> Issued:
        return cls(
            kind=kind,
            name=name,
            serial=f"{certificate.serial_number:x}",
            issued=datetime.now(UTC).replace(microsecond=0),
            expires=certificate.not_valid_after_utc,
        )

    def validity(self, now: datetime) -> Literal["valid", "expiring", "expired"]:
        """How it stands with its dates alone."""
        if now >= self.expires:
            return "expired"
        return "expiring" if now >= self.expires - timedelta(days=WARN_DAYS) else "valid"


class Index(Record):
    """All certificates, oldest first."""

    format: Literal[1] = 1
    certificates: tuple[Issued, ...] = ()

    @property
    def newest(self) -> tuple[Issued, ...]:
        """The last certificate of each name, in the order in which the names came."""
        return tuple({(issued.kind, issued.name): issued for issued in self.certificates}.values())

    def with_one_more(self, issued: Issued) -> Index:
        return self.model_copy(update={"certificates": (*self.certificates, issued)})

    @classmethod
    def read(cls, directory: Path) -> Index:
        """Read the index of a keys directory.

        Raises:
            ConfigError: if it is damaged.
            StorageError: if it cannot be read.
        """
        path = directory / INDEX
        with storing("read", path):
            text = path.read_bytes()
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            raise ConfigError(f"{path} is damaged", "Restore the keys directory from a copy.") from None

    def write(self, directory: Path) -> None:
        atomic_write(directory / INDEX, (self.model_dump_json(indent=2) + "\n").encode())
