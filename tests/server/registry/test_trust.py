"""Who may speak to a registry that has keys, and as whom."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry.made import large, written
from registry.process import Local

from seedbed.client.registry import RegistryClient
from seedbed.common.errors import EnvironmentFailure, StorageError
from seedbed.common.events import Event
from seedbed.common.registry import RegistryAccess
from seedbed.server.keys import Authority


@pytest.fixture
def keys(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "keys")


@pytest.fixture
def registry(tmp_path: Path, keys: Authority) -> Iterator[Local]:
    local = Local(tmp_path / "run", keys.directory)
    yield local
    local.server.stop(0)


def access(keys: Authority, registry: Local, name: str) -> RegistryAccess:
    folder = keys.directory / "participants" / name
    files = {"ca": folder / "ca.crt", "certificate": folder / "client.crt", "key": folder / "client.key"}
    return RegistryAccess(address=f"127.0.0.1:{registry.port}", name=name, **files)


def client(keys: Authority, registry: Local, name: str) -> RegistryClient:
    return RegistryClient(access(keys, registry, name), patience=10.0)


def refused(access: RegistryAccess) -> EnvironmentFailure:
    with RegistryClient(access, patience=1.0) as stranger, pytest.raises(EnvironmentFailure) as caught:
        stranger.manifests()
    return caught.value


def test_a_participant_with_a_certificate_submits_and_fetches(registry: Local, keys: Authority, tmp_path: Path) -> None:
    keys.participant("anna")
    with client(keys, registry, "anna") as anna:
        digest = anna.submit(large(tmp_path / "a", 3))
        assert anna.fetch(digest, tmp_path / "b").digest == digest


def test_without_a_certificate_nobody_gets_in(registry: Local, keys: Authority) -> None:
    keys.participant("anna")
    whole = access(keys, registry, "anna")
    refused(whole.model_copy(update={"certificate": None, "key": None}))
    refused(RegistryAccess(address=whole.address))


def test_a_certificate_of_another_authority_lets_nobody_in(registry: Local, keys: Authority, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other")
    other.participant("anna")
    stranger = access(other, registry, "anna")
    refused(stranger.model_copy(update={"ca": keys.directory / "ca.crt"}))
    assert "no trusted connection" in refused(stranger).message


def test_whoever_is_revoked_is_refused_at_once_and_nobody_else(registry: Local, keys: Authority) -> None:
    keys.participant("anna")
    keys.participant("bert")
    with client(keys, registry, "anna") as first, client(keys, registry, "bert") as second:
        assert first.manifests() == second.manifests() == []
        keys.revoke("anna")
        with pytest.raises(EnvironmentFailure, match="the certificate of anna was revoked") as caught:
            first.manifests()
        assert caught.value.hint
        assert second.manifests() == []


@pytest.mark.parametrize("text", [None, "", '{"serials": [', '{"serials": "1f"}'])
def test_a_list_of_revoked_certificates_that_is_missing_or_damaged_lets_nobody_in(
    registry: Local, keys: Authority, text: str | None
) -> None:
    keys.participant("anna")
    with client(keys, registry, "anna") as anna:
        assert anna.manifests() == []
        (keys.directory / "revoked.json").unlink()
        if text is not None:
            (keys.directory / "revoked.json").write_text(text)
        with pytest.raises(EnvironmentFailure, match="which certificates") as caught:
            anna.manifests()
    assert "revoked.json" in caught.value.hint
    assert str(keys.directory) not in caught.value.message + caught.value.hint


def test_the_certificate_says_who_it_is_and_not_what_is_claimed(registry: Local, keys: Authority) -> None:
    keys.participant("anna")
    claimed = access(keys, registry, "anna").model_copy(update={"name": "bert"})
    with RegistryClient(claimed) as anna:
        anna.report(Event(kind="note", node="bert", name="hello"))
        assert next(anna.watch()).node == "anna"


def test_each_participant_has_a_quota_of_its_own_by_its_certificate(
    registry: Local, keys: Authority, tmp_path: Path
) -> None:
    for name in ("anna", "bert"):
        keys.participant(name)
    with client(keys, registry, "anna") as anna:
        anna.submit(written(tmp_path / "a"))
    usage = (registry.run / "uploads/usage.jsonl").read_text()
    assert '"participant":"anna"' in usage


def test_a_new_certificate_of_the_server_is_used_without_a_restart(registry: Local, keys: Authority) -> None:
    before = ssl.get_server_certificate(("127.0.0.1", registry.port))
    folder = keys.rotate("server")
    after = ssl.get_server_certificate(("127.0.0.1", registry.port))
    assert before != after
    assert after.strip() == (folder / "server.crt").read_text().strip()
    keys.participant("anna")
    with client(keys, registry, "anna") as anna:
        assert anna.manifests() == []


def test_keys_that_are_not_there_are_told(tmp_path: Path, keys: Authority, registry: Local) -> None:
    with pytest.raises(EnvironmentFailure, match="cannot read"):
        Local(tmp_path / "other", tmp_path / "nothing")
    with pytest.raises(StorageError, match="cannot read"):
        RegistryClient(access(keys, registry, "nobody"))
