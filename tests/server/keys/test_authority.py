"""The keys directory: what its certificates can do, what they cannot, and how they end."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

from seedbed.common.errors import ConfigError, StorageError
from seedbed.server.keys import Authority, expiry_warnings, is_revoked, node_keys, participants
from seedbed.server.keys.certificates import Pair, make_client
from seedbed.server.keys.directory import read_certificate


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    Authority.create(tmp_path / "keys", ["gpu.example.org", "10.1.2.3"])
    return tmp_path / "keys"


def policy(keys: Path) -> PolicyBuilder:
    return PolicyBuilder().store(Store([read_certificate(keys / "ca.crt")]))


def client_policy(keys: Path) -> PolicyBuilder:
    """The web's rules, but that a participant is named by its common name, as gRPC wants it."""
    leaf = ExtensionPolicy.webpki_defaults_ee().may_be_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
    return policy(keys).extension_policies(ca_policy=ExtensionPolicy.webpki_defaults_ca(), ee_policy=leaf)


@pytest.mark.parametrize("name", ["gpu.example.org", "localhost"])
def test_the_servers_chain_verifies_for_its_host_names(keys: Path, name: str) -> None:
    policy(keys).build_server_verifier(x509.DNSName(name)).verify(read_certificate(keys / "server/server.crt"), [])


@pytest.mark.parametrize("address", ["10.1.2.3", "127.0.0.1", "::1"])
def test_the_servers_chain_verifies_for_its_addresses(keys: Path, address: str) -> None:
    verifier = policy(keys).build_server_verifier(x509.IPAddress(ip_address(address)))
    verifier.verify(read_certificate(keys / "server/server.crt"), [])


def test_the_server_cannot_be_taken_for_another_host(keys: Path) -> None:
    verifier = policy(keys).build_server_verifier(x509.DNSName("elsewhere.example.org"))
    with pytest.raises(VerificationError):
        verifier.verify(read_certificate(keys / "server/server.crt"), [])


def test_a_participants_chain_verifies_as_a_client_that_is_called_so(keys: Path) -> None:
    folder = Authority.load(keys).participant("alice").folder
    certificate = read_certificate(folder / "client.crt")
    client_policy(keys).build_client_verifier().verify(certificate, [])
    assert certificate.subject.rfc4514_string() == "CN=alice"


def test_a_participant_is_no_server_and_the_server_is_no_participant(keys: Path) -> None:
    folder = Authority.load(keys).participant("localhost").folder
    with pytest.raises(VerificationError):
        policy(keys).build_server_verifier(x509.DNSName("localhost")).verify(
            read_certificate(folder / "client.crt"), []
        )
    with pytest.raises(VerificationError):
        client_policy(keys).build_client_verifier().verify(read_certificate(keys / "server/server.crt"), [])


def test_what_a_participant_signs_is_not_believed(keys: Path) -> None:
    folder = Authority.load(keys).participant("mallory").folder
    own = read_certificate(folder / "client.crt")
    key = serialization.load_pem_private_key((folder / "client.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    forged = make_client(Pair(own, key), "alice").certificate
    with pytest.raises(VerificationError):
        client_policy(keys).build_client_verifier().verify(forged, [own])


def test_another_federations_participant_is_not_believed(keys: Path, tmp_path: Path) -> None:
    stranger = Authority.create(tmp_path / "other").participant("alice").folder
    with pytest.raises(VerificationError):
        client_policy(keys).build_client_verifier().verify(read_certificate(stranger / "client.crt"), [])


def test_every_private_key_is_its_owners_alone(keys: Path) -> None:
    Authority.load(keys).participant("alice")
    private = [path for path in keys.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert {path.name for path in private} == {"ca.key", "server.key", "client.key", "node.key"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    folders = [path for path in (keys, *keys.rglob("*")) if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}


def test_a_node_key_is_what_flower_reads(keys: Path) -> None:
    folder = Authority.load(keys).participant("alice").folder
    private = serialization.load_ssh_private_key((folder / "node.key").read_bytes(), None)
    public = serialization.load_ssh_public_key((folder / "node.key.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert private.public_key() == public


def test_a_revoked_participant_shows_up_everywhere(keys: Path) -> None:
    authority = Authority.load(keys)
    alice, bob = authority.participant("alice"), authority.participant("bob")
    assert not is_revoked(keys, alice.serial)
    authority.revoke("alice")
    assert is_revoked(keys, alice.serial)
    assert is_revoked(keys, int(alice.serial, 16))
    assert not is_revoked(keys, bob.serial)
    assert {one.name: one.state for one in participants(keys)} == {"alice": "revoked", "bob": "valid"}
    assert node_keys(keys) == {"bob": bob.folder / "node.key.pub"}
    assert json.loads((keys / "revoked.json").read_text()) == {"serials": [alice.serial]}


def test_a_revoked_name_is_given_again_with_other_keys(keys: Path) -> None:
    authority = Authority.load(keys)
    first = authority.participant("alice")
    node_key = (first.folder / "node.key.pub").read_bytes()
    authority.revoke("alice")
    second = authority.participant("alice")
    assert (second.state, is_revoked(keys, first.serial)) == ("valid", True)
    assert (second.folder / "node.key.pub").read_bytes() != node_key


def test_a_rotated_participant_has_a_new_certificate_and_the_same_node(keys: Path) -> None:
    authority = Authority.load(keys)
    old = authority.participant("alice")
    before = {path.name: path.read_bytes() for path in old.folder.iterdir()}
    folder = authority.rotate("alice")
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"client.crt", "client.key"}
    assert is_revoked(keys, old.serial)
    assert [one.state for one in participants(keys)] == ["valid"]
    authority.rotate("alice", new_node_key=True)
    assert (folder / "node.key").read_bytes() != before["node.key"]


def test_a_rotated_server_keeps_its_hosts_and_gains_others(keys: Path) -> None:
    old = read_certificate(keys / "server/server.crt")
    Authority.load(keys).rotate("server", hosts=["new.example.org"])
    new = read_certificate(keys / "server/server.crt")
    for name in ("gpu.example.org", "new.example.org", "localhost"):
        policy(keys).build_server_verifier(x509.DNSName(name)).verify(new, [])
    assert is_revoked(keys, old.serial_number)
    assert not is_revoked(keys, new.serial_number)


def test_certificates_end_and_somebody_is_told(keys: Path) -> None:
    participant = Authority.load(keys).participant("alice", days=10)
    assert participant.state == "expiring"
    assert expiry_warnings(keys) == [f"the certificate of the participant 'alice' expires on {participant.expires:%F}"]
    later = datetime.now(UTC) + timedelta(days=11)
    assert participants(keys, later)[0].state == "expired"
    assert "expired on" in expiry_warnings(keys, later)[0]
    assert expiry_warnings(keys, datetime.now(UTC) + timedelta(days=350))[0].startswith("the certificate of the server")
    with pytest.raises(VerificationError):
        client_policy(keys).time(later).build_client_verifier().verify(
            read_certificate(participant.folder / "client.crt"), []
        )


def test_no_certificate_outlives_its_authority(keys: Path) -> None:
    folder = Authority.load(keys).participant("alice", days=3650).folder
    assert (
        read_certificate(folder / "client.crt").not_valid_after_utc
        <= read_certificate(keys / "ca.crt").not_valid_after_utc
    )


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", ".hidden", "server", "CA", "a b", "x" * 64, "ü", "a\n", "a."])
def test_names_that_are_no_names_are_refused(keys: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a participant's name"):
        Authority.load(keys).participant(name)


@pytest.mark.parametrize("host", ["https://x.org", "x.org:7400", "a b", "", "-x.org", "300.1.1.1/8", "x..org"])
def test_hosts_that_are_no_hosts_are_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a host name nor an IP address"):
        Authority.create(tmp_path / "keys", [host])
    assert not (tmp_path / "keys").exists()


def test_mistakes_are_answered_with_the_next_step(keys: Path, tmp_path: Path) -> None:
    authority = Authority.load(keys)
    authority.participant("alice")
    with pytest.raises(StorageError, match="already there"):
        Authority.create(keys)
    with pytest.raises(ConfigError, match="already a participant 'alice'"):
        authority.participant("alice")
    with pytest.raises(ConfigError, match="no participant 'alcie'") as unknown:
        authority.revoke("alcie")
    assert unknown.value.hint == "Did you mean 'alice'?"
    with pytest.raises(ConfigError, match="does not exist"):
        Authority.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="not a keys directory"):
        Authority.load(tmp_path)
    with pytest.raises(ConfigError, match=r"it has no server/server.crt"):
        Authority.load(keys / "participants/alice")
    authority.revoke("alice")
    with pytest.raises(ConfigError, match="was revoked"):
        authority.rotate("alice")


def test_a_damaged_list_of_revoked_certificates_lets_nobody_in(keys: Path) -> None:
    for text in ("", "[]", '{"serials": "1f"}', '{"serials": [1]}', '{"serials": ["xyz"]}', "[" * 100_000):
        (keys / "revoked.json").write_text(text)
        with pytest.raises(ConfigError, match="not a list of revoked certificates"):
            is_revoked(keys, 1)
    (keys / "revoked.json").unlink()
    with pytest.raises(StorageError):
        is_revoked(keys, 1)


def test_a_key_that_is_not_the_authoritys_cannot_sign(keys: Path, tmp_path: Path) -> None:
    Authority.create(tmp_path / "other")
    (keys / "ca.key").write_bytes((tmp_path / "other/ca.key").read_bytes())
    with pytest.raises(ConfigError, match=r"is not the key of ca\.crt"):
        Authority.load(keys)


def test_a_revoked_name_that_could_not_be_given_again_is_not_let_in_with_its_old_node_key(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority.load(keys)
    authority.participant("alice")
    authority.revoke("alice")

    def full(path: Path, data: bytes, *, private: bool = False) -> None:
        raise StorageError(f"cannot write {path}: no space is left on the device")

    monkeypatch.setattr("seedbed.server.keys.authority.write_file", full)
    with pytest.raises(StorageError, match="no space is left"):
        authority.participant("alice")
    assert node_keys(keys) == {}


def test_a_rotation_that_is_interrupted_between_two_renames_leaves_the_old_folder(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, rename = Authority.load(keys), os.rename
    before = (keys / "server/server.crt").read_bytes()

    def interrupted(source: Path, target: Path) -> None:
        if target == keys / "server":
            monkeypatch.setattr("os.rename", rename)
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("os.rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        authority.rotate("server")
    assert (keys / "server/server.crt").read_bytes() == before
