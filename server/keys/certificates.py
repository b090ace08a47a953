"""Certificates and keys as bytes: what the authority signs, with nothing of files in it.

Profiles follow RFC 5280: an authority that may sign leaves only (path length 0), and leaves that may serve *or* be a
client, never both, and never sign. Curves: P-384 for the authority and for Flower's node keys, P-256 for TLS.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from seedbed.common.errors import ConfigError

AUTHORITY_DAYS, LEAF_DAYS = 3650, 365
"""How long certificates are valid, where nothing else is said."""
WARN_DAYS = 30
"""From so many days before its end on, a certificate is called expiring."""
ALWAYS = ("localhost", "127.0.0.1", "::1")
"""Names that every server certificate has, so that the coordinator's own machine reaches it."""
_SLACK = timedelta(hours=1)
"""Valid from a little earlier, for machines whose clocks are behind."""
_HOST = re.compile(r"^(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*$")


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key. The key is never shown: `repr` leaves it out."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return f"Pair({self.certificate.subject.rfc4514_string()})"

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """PKCS#8, unencrypted: the file's permissions protect it, as a service has nobody to type a password."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


@dataclass(frozen=True)
class NodeKey:
    """An EC P-384 key pair in OpenSSH's format, as Flower's ``--auth-supernode-private-key`` wants it."""

    private: bytes
    public: bytes

    def __repr__(self) -> str:
        return "NodeKey()"


def make_authority(name: str, days: int = AUTHORITY_DAYS) -> Pair:
    """A self-signed authority that can sign leaves and nothing that signs in turn."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _common_name(name)
    builder = (
        _builder(subject, subject, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
    )
    return Pair(builder.sign(key, hashes.SHA384()), key)


def make_server(authority: Pair, hosts: Iterable[str], days: int = LEAF_DAYS) -> Pair:
    """A certificate to listen with, for host names and IP addresses, always `ALWAYS` among them.

    Raises:
        ConfigError: if a host is neither a name nor an address.
    """
    names = list(dict.fromkeys([*(clean_host(host) for host in hosts), *ALWAYS]))
    return _leaf(authority, names[0], days, ExtendedKeyUsageOID.SERVER_AUTH, [_general_name(name) for name in names])


def make_client(authority: Pair, name: str, days: int = LEAF_DAYS) -> Pair:
    """A participant's certificate: its common name is who it is, and it can do nothing but be a client.

    It has no subject alternative name, so that no server can be impersonated and gRPC takes the common name as identity.
    """
    return _leaf(authority, name, days, ExtendedKeyUsageOID.CLIENT_AUTH, [])


def make_node_key() -> NodeKey:
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return NodeKey(private, public + b"\n")


def clean_host(host: str) -> str:
    """A host name in lower case or an IP address in its short form.

    Raises:
        ConfigError: if it is neither.
    """
    bare = host.strip().removeprefix("[").removesuffix("]").rstrip(".").lower()
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        if _HOST.match(bare) and len(bare) <= 253:
            return bare
    raise ConfigError(
        f"'{host}' is neither a host name nor an IP address",
        "Give it without port or https://, such as gpu.example.org.",
    )


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Host names and addresses that a server certificate is for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns = names.get_values_for_type(x509.DNSName)
    return (*dns, *(str(address) for address in names.get_values_for_type(x509.IPAddress)))


def _leaf(authority: Pair, name: str, days: int, purpose: x509.ObjectIdentifier, names: list[x509.GeneralName]) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    signer = authority.certificate
    builder = (
        _builder(_common_name(name), signer.subject, key, days, last=signer.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return Pair(builder.sign(authority.key, hashes.SHA384()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int, last: datetime | None = None
) -> x509.CertificateBuilder:
    """What every certificate has; a leaf ends with its authority at the latest."""
    now = datetime.now(UTC).replace(microsecond=0)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(end if last is None else min(end, last))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
