"""Adapters go in and come out whole, whatever breaks in between; nothing else gets in."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from registry.made import BASE, MEGABYTE, large, written
from registry.process import Local, Process

from seedbed.client import registry_transfer
from seedbed.client.registry_transfer import Outgoing
from seedbed.common.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    ConfigError,
    EnvironmentFailure,
    StorageError,
)
from seedbed.common.events import Event, EventLog
from seedbed.common.files import write_file
from seedbed.common.registry import CHUNK
from seedbed.common.routing import Router
from seedbed.common.routing.router_file import read_router, write_router
from seedbed.common.routing.settings import RouterSettings
from seedbed.common.storage import DirectoryStore, read_adapter
from seedbed.proto.v1 import registry_pb2 as pb
from seedbed.proto.v1 import registry_pb2_grpc
from seedbed.server.registry.server import RegistryServer, Settings

RECIPE = "5" * 64


class BrokenOffError(Exception):
    """What a test raises in the middle of a transfer."""


def raw(registry: Local | Process) -> Any:
    """The service without our client in between."""
    return registry_pb2_grpc.RegistryStub(grpc.insecure_channel(f"127.0.0.1:{registry.port}"))


def break_off(after: int) -> Callable[[int, int], None]:
    def told(done: int, size: int) -> None:
        if done >= after:
            raise BrokenOffError

    return told


def half_submit(registry: Local | Process, source: Path, megabytes: int, name: str = "anna") -> None:
    """Send the first megabytes of an adapter, then break off without a word."""
    outgoing = Outgoing.of(source)
    requests = outgoing.requests(0, lambda position: None)
    with grpc.insecure_channel(f"127.0.0.1:{registry.port}") as channel:
        metadata = (("seedbed-participant-bin", name.encode()),)
        answer = registry_pb2_grpc.RegistryStub(channel).Submit(
            (next(requests) for _ in range(megabytes * MEGABYTE // CHUNK + 1)), metadata=metadata
        )
    assert answer.holding.received == megabytes * MEGABYTE
    assert not answer.holding.complete


def leftovers(registry: Local | Process) -> list[Path]:
    return [path for path in (registry.run / "uploads").glob("*/*") if path.is_dir()]


def store(registry: Local | Process) -> DirectoryStore:
    return DirectoryStore(registry.run / "store")


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_is_submitted_is_fetched_again_to_the_last_bit(registry: Local, tmp_path: Path) -> None:
    source = large(tmp_path / "a", 3)
    seen: list[tuple[int, int]] = []
    with registry.client() as client:
        digest = client.submit(source)
        manifest = client.fetch(digest, tmp_path / "b", lambda done, size: seen.append((done, size)))
    assert manifest.digest == digest
    for name in ("adapter_model.safetensors", "adapter_config.json", "seedbed.json"):
        assert (source / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    size = (source / "adapter_model.safetensors").stat().st_size
    assert seen[-1] == (size, size)
    assert store(registry).open(digest).is_dir()
    assert leftovers(registry) == []


def test_submitting_again_changes_nothing_and_sends_nothing(registry: Local, tmp_path: Path) -> None:
    source = large(tmp_path / "a", 3)
    sent: list[int] = []
    with registry.client() as client:
        digest = client.submit(source)
        before = (registry.run / "store/adapters" / digest).stat().st_ino
        assert client.submit(source, lambda done, size: sent.append(done)) == digest
    assert (registry.run / "store/adapters" / digest).stat().st_ino == before
    assert len(sent) == 1  # only that it is all there


def test_an_upload_that_broke_off_is_continued_from_its_offset(registry: Local, tmp_path: Path) -> None:
    source = large(tmp_path / "a", 5)
    half_submit(registry, source, 3)
    sent: list[int] = []
    with registry.client() as client:
        client.submit(source, lambda done, size: sent.append(done))
    assert sent[0] == 3 * MEGABYTE + CHUNK


def test_an_upload_is_continued_after_the_registry_was_killed(serve: Callable[..., Process], tmp_path: Path) -> None:
    registry = serve()
    source = large(tmp_path / "a", 5)
    half_submit(registry, source, 3)
    registry.kill()
    registry.start()
    sent: list[int] = []
    with registry.client() as client:
        digest = client.submit(source, lambda done, size: sent.append(done))
        assert sent[0] == 3 * MEGABYTE + CHUNK
        assert read_adapter(client.fetch(digest, tmp_path / "b") and tmp_path / "b")[1].digest == digest


def test_a_submission_lives_through_a_registry_that_is_killed_in_the_middle_of_it(
    serve: Callable[..., Process], tmp_path: Path
) -> None:
    registry = serve()
    killed: list[int] = []

    def kill_once(done: int, size: int) -> None:
        if done >= 3 * MEGABYTE and not killed:
            killed.append(done)
            registry.kill()
            registry.start()

    with registry.client() as client:
        digest = client.submit(large(tmp_path / "a", 8), kill_once)
    assert killed
    assert store(registry).open(digest).is_dir()


def test_a_fetch_lives_through_a_registry_killed_in_the_middle_of_it(
    serve: Callable[..., Process], tmp_path: Path
) -> None:
    registry = serve()
    seen: list[int] = []

    def kill_once(done: int, size: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            registry.kill()
            registry.start()

    with registry.client() as client:
        digest = client.submit(large(tmp_path / "a", 40))
        assert client.fetch(digest, tmp_path / "b", kill_once).digest == digest
    assert seen == sorted(seen)  # it went on, it did not begin anew


def test_a_fetch_that_broke_off_is_continued_by_another_process(registry: Local, tmp_path: Path) -> None:
    seen: list[int] = []
    with registry.client() as client:
        digest = client.submit(large(tmp_path / "a", 5))
        with pytest.raises(BrokenOffError):
            client.fetch(digest, tmp_path / "b", break_off(3 * MEGABYTE))
        assert not (tmp_path / "b").exists()
        client.fetch(digest, tmp_path / "b", lambda done, size: seen.append(done))
    assert seen[0] == 3 * MEGABYTE + CHUNK
    assert read_adapter(tmp_path / "b")[1].digest == digest


def test_a_part_that_was_spoiled_is_fetched_anew(registry: Local, tmp_path: Path) -> None:
    with registry.client() as client:
        digest = client.submit(large(tmp_path / "a", 5))
        with pytest.raises(BrokenOffError):
            client.fetch(digest, tmp_path / "b", break_off(3 * MEGABYTE))
        with (tmp_path / f".part-{digest}/tensors").open("r+b") as file:
            file.seek(MEGABYTE)
            file.write(b"spoiled")
        client.fetch(digest, tmp_path / "b")
    assert read_adapter(tmp_path / "b")[1].digest == digest


def test_a_spoiled_upload_is_sent_anew(registry: Local, tmp_path: Path) -> None:
    source = large(tmp_path / "a", 5)
    half_submit(registry, source, 3)
    with (leftovers(registry)[0] / "adapter_model.safetensors").open("r+b") as file:
        file.seek(MEGABYTE)
        file.write(b"spoiled")
    with registry.client() as client:
        assert store(registry).open(client.submit(source)).is_dir()


def test_tensors_of_another_hash_are_refused_and_nothing_of_them_stays(registry: Local, tmp_path: Path) -> None:
    source = large(tmp_path / "a", 2)
    with (source / "adapter_model.safetensors").open("r+b") as file:
        file.seek(MEGABYTE)
        file.write(b"changed")
    with registry.client() as client, pytest.raises(AdapterMismatchError, match="expected tensors of SHA-256"):
        client.submit(source)
    assert leftovers(registry) == []
    assert store(registry).list() == []


def test_what_hashes_right_and_is_no_adapter_is_refused(registry: Local, tmp_path: Path) -> None:
    """A manifest vouches for anything that its writer likes: the tensors are looked at, too."""
    outgoing = Outgoing.of(written(tmp_path / "a"))
    rubbish = b"\xff" * 100
    manifest = outgoing.manifest.model_copy(update={"tensors_sha256": hashlib.sha256(rubbish).hexdigest()})
    header = pb.Header(manifest=manifest.canonical(), config=outgoing.config, size=len(rubbish))
    begin = pb.SubmitRequest.Begin(digest=manifest.digest, header=header)
    with pytest.raises(grpc.RpcError) as caught:
        raw(registry).Submit(iter([pb.SubmitRequest(begin=begin), pb.SubmitRequest(tensors=rubbish)]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(registry.run) not in caught.value.details()
    assert leftovers(registry) == []
    assert store(registry).list() == []


def begin(source: Path, **changes: Any) -> Iterator[pb.SubmitRequest]:
    outgoing = Outgoing.of(source)
    fields = {"manifest": outgoing.manifest.canonical(), "config": outgoing.config, "size": outgoing.size}
    digest = changes.pop("digest", outgoing.manifest.digest)
    offset = changes.pop("offset", 0)
    header = pb.Header(**(fields | changes))
    yield pb.SubmitRequest(begin=pb.SubmitRequest.Begin(digest=digest, header=header, offset=offset))
    yield pb.SubmitRequest(tensors=outgoing.tensors.read_bytes())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"digest": "../" * 21 + "x"}, "expected a digest"),
        ({"digest": "a" * 64}, f"expected adapter {'a' * 64}"),
        ({"manifest": b"{}"}, "manifest cannot be read"),
        ({"manifest": b"[" * 100_000}, "manifest cannot be read"),
        ({"config": b"{}"}, "not the one that its manifest vouches for"),
        ({"size": 5}, "got more"),
        ({"size": 1 << 60}, "at most"),
        ({"offset": 1 << 40}, "offset"),
    ],
)
def test_an_upload_that_lies_about_itself_is_refused(
    registry: Local, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw(registry).Submit(begin(written(tmp_path / "a"), **changes))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason in caught.value.details()
    assert store(registry).list() == []


def test_an_upload_that_begins_with_tensors_is_refused(registry: Local) -> None:
    with pytest.raises(grpc.RpcError, match="begins with"):
        raw(registry).Submit(iter([pb.SubmitRequest(tensors=b"x")]))


@pytest.mark.parametrize("digest", ["..", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 63 + "/", "a" * 64 + "\n", ""])
def test_what_is_no_digest_leads_nowhere(registry: Local, digest: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(raw(registry).Fetch(pb.FetchRequest(digest=digest)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_page_token_or_recipe_that_is_a_path_leads_nowhere(registry: Local) -> None:
    assert not raw(registry).List(pb.ListRequest(recipe="../../store")).manifests
    assert not raw(registry).List(pb.ListRequest(page_token="../../etc")).manifests


def test_an_unknown_adapter_is_refused_with_a_next_step(registry: Local, tmp_path: Path) -> None:
    with registry.client() as client, pytest.raises(StorageError, match="is not in the registry") as caught:
        client.fetch("c" * 64, tmp_path / "b")
    assert caught.value.hint
    assert list(tmp_path.glob(".part-*")) == []


def test_an_adapter_that_is_damaged_in_the_store_is_never_believed(registry: Local, tmp_path: Path) -> None:
    with registry.client() as client:
        digest = client.submit(large(tmp_path / "a", 2))
        with (registry.run / "store/adapters" / digest / "adapter_model.safetensors").open("r+b") as file:
            file.seek(MEGABYTE)
            file.write(b"damage")
        with pytest.raises(AdapterMismatchError, match="tensors"):
            client.fetch(digest, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_participant_may_hand_in_so_much_and_no_more(serve: Callable[..., Process], tmp_path: Path) -> None:
    registry = serve("--quota-participant", str(5 * MEGABYTE))
    with registry.client("anna") as anna, registry.client("bert") as bert:
        anna.submit(large(tmp_path / "a", 3))
        with pytest.raises(StorageError, match="would pass what anna may hand in"):
            anna.submit(large(tmp_path / "b", 3))
        bert.submit(tmp_path / "b")
        assert anna.submit(tmp_path / "b")  # it is there: it costs nothing


def test_a_quota_is_remembered_by_the_next_registry(serve: Callable[..., Process], tmp_path: Path) -> None:
    registry = serve("--quota-participant", str(8 * MEGABYTE))
    with registry.client() as client:
        client.submit(large(tmp_path / "a", 3))
        half_submit(registry, large(tmp_path / "b", 3), 2)
        registry.kill()
        registry.start()
        with pytest.raises(StorageError, match="would pass"):
            client.submit(large(tmp_path / "c", 4))
        assert client.submit(tmp_path / "b")


def test_what_the_registry_has_lost_and_gets_again_counts_once(serve: Callable[..., Process], tmp_path: Path) -> None:
    registry = serve("--quota-participant", str(5 * MEGABYTE))
    source = large(tmp_path / "a", 3)
    with registry.client() as client:
        for _ in range(3):
            digest = client.submit(source)
            shutil.rmtree(registry.run / "store/adapters" / digest)
        client.submit(large(tmp_path / "b", 1))


def test_all_together_may_hand_in_so_much_and_no_more(serve: Callable[..., Process], tmp_path: Path) -> None:
    registry = serve("--quota-total", str(5 * MEGABYTE))
    with registry.client("anna") as anna, registry.client("bert") as bert:
        anna.submit(large(tmp_path / "a", 3))
        with pytest.raises(StorageError, match="all participants"):
            bert.submit(large(tmp_path / "b", 3))


def test_an_adapter_that_is_too_large_is_refused_before_it_is_sent(
    serve: Callable[..., Process], tmp_path: Path
) -> None:
    registry = serve("--max-upload", str(MEGABYTE))
    sent: list[int] = []
    with registry.client() as client, pytest.raises(AdapterFormatError, match="at most 1,048,576 bytes"):
        client.submit(large(tmp_path / "a", 30), lambda done, size: sent.append(done))
    assert leftovers(registry) == []


def test_two_participants_may_hand_in_one_adapter_at_the_same_time(registry: Local, tmp_path: Path) -> None:
    source = large(tmp_path / "a", 5)
    half_submit(registry, source, 2, "anna")
    with registry.client("bert") as bert:
        digest = bert.submit(source)
    with registry.client("anna") as anna:
        assert anna.submit(source) == digest


def named(name: str) -> tuple[tuple[str, bytes]]:
    return (("seedbed-participant-bin", name.encode()),)


def test_one_participant_cannot_take_every_thread(tmp_path: Path) -> None:
    """Of 8 threads it has 2, whatever it does with them: here it begins two uploads and sends nothing more."""
    registry = Local(tmp_path / "run", threads=8)
    ended, begun = threading.Event(), threading.Semaphore(0)
    stub = raw(registry)

    def silent(source: Path) -> Iterator[pb.SubmitRequest]:
        yield next(begin(source))
        begun.release()
        ended.wait(60)

    sources = [large(tmp_path / name, 1) for name in "ab"]
    calls = [stub.Submit.future(silent(source), metadata=named("anna")) for source in sources]
    for _ in calls:
        begun.acquire()
    until(lambda: len(leftovers(registry)) == 2)
    with pytest.raises(grpc.RpcError) as caught:
        stub.List(pb.ListRequest(), metadata=named("anna"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "2 calls of anna are being answered already"
    assert not stub.List(pb.ListRequest(), metadata=named("bert")).manifests
    ended.set()
    assert [call.result().holding.complete for call in calls] == [False, False]
    assert not stub.List(pb.ListRequest(), metadata=named("anna")).manifests
    registry.server.stop(0)


def admitted(call: Callable[[], Any]) -> Any:
    """A stream that has begun; who comes before the registry has noticed the end of the last comes again."""
    end = time.monotonic() + 60
    while True:
        stream = call()
        try:
            next(stream)
            return stream
        except grpc.RpcError:
            if stream.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                raise
        time.sleep(0.02)


def test_who_breaks_a_fetch_or_a_watch_off_may_call_again(tmp_path: Path) -> None:
    registry = Local(tmp_path / "run", threads=8)
    stub, digest = raw(registry), store(registry).put(large(tmp_path / "a", 30))
    EventLog(registry.run / "events.jsonl").append(Event(kind="note", name="a"))
    for _ in range(5):
        admitted(lambda: stub.Fetch(pb.FetchRequest(digest=digest), metadata=named("anna"))).cancel()
        admitted(lambda: stub.Watch(pb.WatchRequest(), metadata=named("anna"))).cancel()
    registry.server.stop(0)


def test_pages_make_one_list_in_the_order_of_digests(registry: Local, tmp_path: Path) -> None:
    directory = store(registry)
    digests = sorted(directory.put(written(tmp_path / str(value), value)) for value in range(1, 8))
    stub, found, token = raw(registry), [], ""
    for page in range(3):
        answer = stub.List(pb.ListRequest(page_size=3, page_token=token))
        assert len(answer.manifests) == (3, 3, 1)[page]
        found += list(answer.manifests)
        token = answer.next_page_token
    assert token == ""
    with registry.client() as client:
        assert [manifest.digest for manifest in client.manifests()] == digests
        assert [manifest.canonical() for manifest in client.manifests()] == found


def test_a_recipe_finds_what_it_made(registry: Local, tmp_path: Path) -> None:
    with registry.client() as client:
        assert client.find(RECIPE) is None
        digest = client.submit(written(tmp_path / "a", recipe=RECIPE))
        assert client.find(RECIPE) == digest


def test_sixteen_at_once_all_get_it_whole(registry: Local, tmp_path: Path) -> None:
    with registry.client() as client:
        digest = client.submit(large(tmp_path / "a", 8))

        def fetch(number: int) -> str:
            with registry.client(f"p{number}") as own:
                return own.fetch(digest, tmp_path / f"b{number}").digest

        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(fetch, range(16))) == {digest}


def test_who_comes_while_another_finishes_begins_anew_and_not_in_what_the_other_made(
    registry: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finishing = threading.Event()

    def slowly(path: Path, data: bytes) -> None:
        finishing.set()
        time.sleep(0.2)
        write_file(path, data)

    monkeypatch.setattr(registry_transfer, "write_file", slowly)
    with registry.client() as client, ThreadPoolExecutor(2) as pool:
        digest = client.submit(written(tmp_path / "a"))
        first = pool.submit(client.fetch, digest, tmp_path / "into/b")
        assert finishing.wait(30)
        second = pool.submit(client.fetch, digest, tmp_path / "into/c")
        assert first.result().digest == second.result().digest == digest
    assert sorted(os.listdir(tmp_path / "into")) == ["b", "c"]
    for name in "bc":
        assert sorted(os.listdir(tmp_path / "into" / name)) == sorted(os.listdir(tmp_path / "a"))


def test_two_that_fetch_to_one_place_share_the_work(registry: Local, tmp_path: Path) -> None:
    with registry.client() as client:
        digest = client.submit(large(tmp_path / "a", 20))
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(client.fetch, digest, tmp_path / "b") for _ in range(2)]
            assert {future.result().digest for future in found} == {digest}
    assert read_adapter(tmp_path / "b")[1].digest == digest


def test_memory_does_not_grow_with_the_adapter(serve: Callable[..., Process], tmp_path: Path) -> None:
    registry = serve()
    with registry.client() as client:
        digest = client.submit(written(tmp_path / "small"))
        client.fetch(digest, tmp_path / "small-again")
        idle = registry.memory()
        digest = client.submit(large(tmp_path / "a", 256))
        client.fetch(digest, tmp_path / "b")
    assert registry.memory() - idle < 100 * MEGABYTE


def test_a_router_travels_like_an_adapter(registry: Local, tmp_path: Path) -> None:
    write_router(
        tmp_path / "r",
        Router(RouterSettings(kind="uniform"), {}),
        kind="router",
        base=BASE,
        names=["a"],
        parents=["c" * 64],
    )
    with registry.client() as client:
        digest = client.submit(tmp_path / "r")
        client.fetch(digest, tmp_path / "again")
    assert read_router(tmp_path / "again")[2].digest == digest


def test_health_is_told_with_and_without_the_service_around_it(registry: Local) -> None:
    for port in (registry.port, registry.health_port):
        stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
        for service in ("", "seedbed.v1.Registry"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_names_the_service(registry: Local) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(grpc.insecure_channel(f"127.0.0.1:{registry.port}"))
    (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    assert "seedbed.v1.Registry" in {service.name for service in answer.list_services_response.service}


def test_it_ends_cleanly_when_it_is_told_to(serve: Callable[..., Process]) -> None:
    registry = serve()
    assert registry.terminate() == 0


def test_plaintext_beyond_loopback_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without TLS"):
        RegistryServer(Settings(tmp_path / "run", host="0.0.0.0"))
    server = RegistryServer(Settings(tmp_path / "run", host="0.0.0.0", insecure=True))
    server.start()
    server.stop(0)


def test_a_port_that_is_taken_is_told(registry: Local, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="cannot listen"):
        RegistryServer(Settings(tmp_path / "other", port=registry.port))


def test_an_upload_that_nobody_continues_is_removed_in_the_end(serve: Callable[..., Process], tmp_path: Path) -> None:
    registry = serve()
    half_submit(registry, large(tmp_path / "a", 3), 2)
    registry.kill()
    for file in leftovers(registry)[0].iterdir():
        os.utime(file, (0, 0))
    registry.start()
    assert leftovers(registry) == []
    shutil.rmtree(tmp_path / "a")
