"""The folder that a participant was handed: certificates for the gateway and the registry, and the SuperNode's key."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from seedbed.common.errors import ConfigError

_FILES = ("ca.crt", "client.crt", "client.key", "node.key")
_HINT = "Name the folder participants/NAME that `seedbed keys` made, whole as it was handed out."


@dataclass(frozen=True, slots=True)
class Keys:
    """Paths of a participant's keys, and what its certificate says."""

    ca: Path
    certificate: Path
    key: Path
    node_key: Path
    """Private key of the SuperNode: EC P-384 in OpenSSH format. It is the node's identity."""
    name: str
    """Common name of the certificate: what the registry calls this participant."""
    expires: datetime
    """When the first of the certificate and the authority's own runs out, in UTC."""
    begins: datetime
    """When the last of the two begins to be valid, in UTC."""

    @property
    def private(self) -> tuple[Path, Path]:
        """Files that nobody else may read."""
        return self.key, self.node_key


def load_keys(folder: Path) -> Keys:
    """Look at a participant's folder; no key is read into memory.

    Raises:
        ConfigError: if a file is missing, or a certificate is none or not made by the authority beside it.
    """
    folder = folder.expanduser().absolute()
    ca, certificate, key, node_key = paths = tuple(folder / name for name in _FILES)
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"the keys folder {folder} has no {path.name}", _HINT)
    authority, own = _certificate(ca), _certificate(certificate)
    try:
        own.verify_directly_issued_by(authority)
    except Exception:  # a signature, a name or a type of key that does not fit
        raise ConfigError(f"{certificate} was not made by the authority of {ca}", _HINT) from None
    names = own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not names:
        raise ConfigError(f"{certificate} names no participant", _HINT)
    return Keys(
        ca=ca,
        certificate=certificate,
        key=key,
        node_key=node_key,
        name=str(names[0].value),
        expires=min(own.not_valid_after_utc, authority.not_valid_after_utc),
        begins=max(own.not_valid_before_utc, authority.not_valid_before_utc),
    )


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no PEM certificate"
        raise ConfigError(f"{path} cannot be used: {reason}", _HINT) from None
