"""A participant's side of a registry: a store like any other, and patience with a network that fails."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry.made import large, written
from registry.process import Local

from seedbed.client.registry import RegistryClient
from seedbed.client.registry_calls import Patience
from seedbed.client.registry_store import RegistryStore
from seedbed.common.errors import EnvironmentFailure, StorageError
from seedbed.common.registry import CHUNK, RegistryAccess
from seedbed.common.storage import AdapterStore, DirectoryStore, read_adapter
from seedbed.server.registry.server import RegistryServer, Settings

RECIPE = "5" * 64


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Local]:
    local = Local(tmp_path / "run")
    yield local
    local.server.stop(0)


@pytest.fixture
def client(registry: Local) -> Iterator[RegistryClient]:
    with registry.client() as client:
        yield client


@pytest.fixture
def store(client: RegistryClient, tmp_path: Path) -> RegistryStore:
    return RegistryStore(client, DirectoryStore(tmp_path / "cache"))


def run_store(registry: Local) -> DirectoryStore:
    return DirectoryStore(registry.run / "store")


def wait_for_ever(patience: Patience) -> None:
    while True:
        patience.wait("a line was cut")


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("kind", ["directory", "registry"])
def test_both_stores_do_the_same(kind: str, store: RegistryStore, tmp_path: Path) -> None:
    chosen: AdapterStore = store if kind == "registry" else DirectoryStore(tmp_path / "plain")
    assert chosen.list() == []
    assert chosen.find(RECIPE) is None
    digest = chosen.put(written(tmp_path / "a", 7.0, RECIPE))
    assert chosen.put(tmp_path / "a") == digest
    assert [manifest.digest for manifest in chosen.list()] == [digest]
    assert chosen.find(RECIPE) == digest
    assert read_adapter(chosen.open(digest))[0]["m"].A.tolist() == [[7.0, 7.0]]
    with pytest.raises(StorageError, match="is not in the"):
        chosen.open("c" * 64)


def test_what_is_put_reaches_the_run(store: RegistryStore, registry: Local, tmp_path: Path) -> None:
    digest = store.put(written(tmp_path / "a"))
    assert run_store(registry).open(digest).is_dir()


def test_what_others_put_is_fetched_once_and_then_kept(store: RegistryStore, registry: Local, tmp_path: Path) -> None:
    digest = run_store(registry).put(large(tmp_path / "a", 2))
    assert store.open(digest) == store.cache.root / "adapters" / digest
    registry.server.stop(0)
    assert read_adapter(store.open(digest))[1].digest == digest


def test_a_result_that_could_not_be_handed_in_is_kept_and_handed_in_later(
    registry: Local, client: RegistryClient, tmp_path: Path
) -> None:
    cache = DirectoryStore(tmp_path / "cache")
    gone = RegistryClient(RegistryAccess(address=f"127.0.0.1:{closed_port()}"), patience=0.2)
    with pytest.raises(EnvironmentFailure):
        RegistryStore(gone, cache).put(written(tmp_path / "a", recipe=RECIPE))
    digest = RegistryStore(client, cache).find(RECIPE)
    assert digest is not None
    assert run_store(registry).open(digest).is_dir()


def test_the_store_of_the_registry_is_asked_where_the_cache_knows_nothing(
    store: RegistryStore, registry: Local, tmp_path: Path
) -> None:
    digest = run_store(registry).put(written(tmp_path / "a", recipe=RECIPE))
    assert store.find(RECIPE) == digest


def test_a_registry_that_is_not_there_is_told_with_its_address() -> None:
    address = f"127.0.0.1:{closed_port()}"
    client = RegistryClient(RegistryAccess(address=address), patience=0.3)
    with client, pytest.raises(EnvironmentFailure, match=f"{address} does not answer") as caught:
        client.manifests()
    assert caught.value.hint


def test_a_registry_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    port = closed_port()
    started: list[RegistryServer] = []

    def start() -> None:
        time.sleep(0.5)
        started.append(RegistryServer(Settings(tmp_path / "run", port=port)))
        started[0].start()

    thread = threading.Thread(target=start)
    thread.start()
    with RegistryClient(RegistryAccess(address=f"127.0.0.1:{port}"), patience=30) as client:
        assert client.manifests() == []
    thread.join()
    started[0].stop(0)


def test_a_registry_that_hangs_is_given_up(tmp_path: Path) -> None:
    """It takes the connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        access = RegistryAccess(address=f"127.0.0.1:{silent.getsockname()[1]}")
        client = RegistryClient(access, deadline=0.3, patience=0.5)
        with client, pytest.raises(EnvironmentFailure, match="does not answer"):
            client.manifests()


def test_a_place_that_is_taken_is_not_written_over(client: RegistryClient, tmp_path: Path) -> None:
    digest = client.submit(written(tmp_path / "a"))
    with pytest.raises(StorageError, match="already there"):
        client.fetch(digest, tmp_path / "a")


def test_an_adapter_of_another_program_is_handed_in_without_touching_its_folder(
    client: RegistryClient, tmp_path: Path
) -> None:
    source = written(tmp_path / "a")
    (source / "seedbed.json").unlink()
    assert client.fetch(client.submit(source), tmp_path / "b").kind == "external"
    assert not (source / "seedbed.json").exists()


def test_what_a_transfer_is_told_rises_to_the_whole(client: RegistryClient, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    client.submit(large(tmp_path / "a", 3), lambda done, size: told.append((done, size)))
    size = told[-1][1]
    assert [done for done, _ in told][:3] == [CHUNK, 2 * CHUNK, 3 * CHUNK]
    assert told[-1] == (size, size)


def test_a_closed_client_says_so(registry: Local) -> None:
    client = registry.client()
    client.close()
    with pytest.raises(EnvironmentFailure, match="was closed"):
        client.manifests()


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(registry: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with registry.client() as client:
        assert client.manifests() == []


def test_patience_begins_with_the_first_failure_however_long_the_call_took() -> None:
    patience = Patience("here:1", 0.2)
    time.sleep(0.3)
    patience.wait("a line was cut")


def test_patience_begins_anew_when_something_gets_on() -> None:
    patience = Patience("here:1", 0.2)
    for _ in range(3):
        patience.wait("a line was cut")
        patience.progress()
    with pytest.raises(EnvironmentFailure, match="a line was cut"):
        wait_for_ever(patience)


def test_the_cache_may_be_lost(store: RegistryStore, tmp_path: Path) -> None:
    digest = store.put(written(tmp_path / "a"))
    shutil.rmtree(store.cache.root)
    assert store.open(digest).is_dir()
