"""Certificates as `seedbed keys` lays them out, made with nothing but `cryptography`."""

from __future__ import annotations

import datetime
import ipaddress
import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from seedbed.common.registry import RegistryAccess


class Keys:
    """An authority with a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("authority")
        self._certificate = self._signed(self._name, self._key, authority=True)
        directory.mkdir()
        (directory / "ca.crt").write_bytes(_pem(self._certificate))
        self.revoke()
        self.server()

    def server(self) -> None:
        """Make the server's certificate, or make it anew."""
        self._write(self.directory / "server", "server", "registry")

    def participant(self, name: str) -> x509.Certificate:
        folder = self.directory / "participants" / name
        certificate = self._write(folder, "client", name)
        (folder / "ca.crt").write_bytes(_pem(self._certificate))
        return certificate

    def access(self, name: str, port: int) -> RegistryAccess:
        folder = self.directory / "participants" / name
        return RegistryAccess(
            address=f"127.0.0.1:{port}",
            ca=folder / "ca.crt",
            certificate=folder / "client.crt",
            key=folder / "client.key",
            name=name,
        )

    def revoke(self, *certificates: x509.Certificate) -> None:
        serials = [f"{certificate.serial_number:x}" for certificate in certificates]
        (self.directory / "revoked.json").write_text(json.dumps({"serials": serials}))

    def _write(self, folder: Path, file: str, name: str) -> x509.Certificate:
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(_name(name), key)
        (folder / f"{file}.crt").write_bytes(_pem(certificate))
        (folder / f"{file}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate

    def _signed(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool = False) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        here = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(here), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
