"""Experts from collaborators join when they fit, and only who brought one takes it back; everybody sees what happens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from registry.process import Local

from seedbed.client.registry import RegistryClient
from seedbed.common import basemodel
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.config import BaseModelConfig, FederationConfig, LoraSettings, RunSettings, TaskSettings
from seedbed.common.errors import (
    AdapterMismatchError,
    ConfigError,
    EnvironmentFailure,
    NonFiniteError,
    SeedbedError,
    StorageError,
)
from seedbed.common.events import Event, EventLog
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import DirectoryStore, read_manifest, write_adapter
from seedbed.proto.v1 import registry_pb2 as pb
from seedbed.proto.v1 import registry_pb2_grpc
from seedbed.server.ledger import Entry
from seedbed.server.registry.fairness import Rates
from seedbed.server.rundir import RunDirectory

CONFIG = FederationConfig(
    name="garden",
    lora=LoraSettings(rank=1, targets=("q_proj", "v_proj")),
    tasks=TaskSettings(experts=("sum", "mood"), held_out=("odd",)),
    run=RunSettings(norm_bound=100.0),
)


@pytest.fixture(scope="module")
def base() -> BaseIdentity:
    return basemodel.identify(basemodel.resolve(BaseModelConfig()), "embedded")


@pytest.fixture
def seed(tmp_path: Path, base: BaseIdentity) -> str:
    """A run directory whose federation has made its seed: one module, 3 by 2."""
    run = RunDirectory.open(tmp_path / "run", CONFIG, {}, resume=False)
    digest = run.store.put(adapter(tmp_path / "seed", base, kind="seed"))
    run.ledger.append(Entry(event="combined", name="seed:round-1", key="1" * 64, digest=digest))
    run.close()
    return digest


@pytest.fixture
def registry(tmp_path: Path, seed: str) -> Iterator[Local]:
    local = Local(tmp_path / "run")
    yield local
    local.server.stop(0)


@pytest.fixture
def anna(registry: Local) -> Iterator[RegistryClient]:
    with registry.client("anna") as client:
        yield client


@pytest.fixture
def bert(registry: Local) -> Iterator[RegistryClient]:
    with registry.client("bert") as client:
        yield client


def adapter(path: Path, base: BaseIdentity, kind: str = "expert", **changes: object) -> Path:
    rank, rows, value = (changes.pop(name, default) for name, default in (("rank", 1), ("rows", 3), ("value", 1.0)))
    module = changes.pop("module", "m")
    factors = LoraFactors(torch.full((rank, 2), float(value)), torch.ones(rows, rank), 1.0)  # type: ignore[call-overload]
    write_adapter(path, Adapter({str(module): factors}), kind=kind, base=base, **changes)  # type: ignore[arg-type]
    return path


def contributions(registry: Local) -> list[dict[str, object]]:
    return [json.loads(line) for line in (registry.run / "contributions.jsonl").read_text().splitlines()]


def test_a_federation_says_what_a_participant_must_know(anna: RegistryClient, base: BaseIdentity, seed: str) -> None:
    info = anna.info()
    assert (info.name, info.state, info.seed, info.best) == ("garden", "running", seed, "")
    assert (info.tasks, info.held_out) == (("sum", "mood"), ("odd",))
    assert (info.base, info.lora, info.identity) == (CONFIG.base, CONFIG.lora, base)
    assert info.registry_port == int(anna.access.address.rpartition(":")[2])
    assert not info.secure


@pytest.mark.parametrize(
    ("events", "state"),
    [
        (["start"], "waiting"),
        (["start", "hello"], "running"),
        (["start", "hello", "failed"], "failed"),
        (["start", "hello", "failed", "resume", "hello"], "running"),
        (["start", "hello", "finished", "resume"], "finished"),
    ],
)
def test_the_state_of_a_federation_is_what_its_ledger_says_last(
    anna: RegistryClient, registry: Local, events: list[str], state: str
) -> None:
    lines = [json.dumps({"event": event}) + "\n" for event in events]
    (registry.run / "ledger.jsonl").write_text("".join(lines) + '{"event": "fini')  # a line that is being written
    assert anna.info().state == state


def test_a_federation_that_is_not_set_up_is_waited_for_and_then_told(tmp_path: Path) -> None:
    local = Local(tmp_path / "empty")
    with local.client(patience=0.5) as client, pytest.raises(EnvironmentFailure, match="not set up"):
        client.info()
    local.server.stop(0)


def test_names_are_resolved(anna: RegistryClient, tmp_path: Path, base: BaseIdentity, seed: str) -> None:
    digest = anna.submit(adapter(tmp_path / "a", base))
    assert anna.resolve(digest) == digest
    assert anna.resolve(digest[:8]) == digest
    assert anna.resolve("seed") == seed
    with pytest.raises(StorageError, match="no 'best' yet"):
        anna.resolve("best")
    with pytest.raises(StorageError, match="no adapter begins with"):
        anna.resolve("0" * 20)
    with pytest.raises(ConfigError, match="expected a digest"):
        anna.resolve(digest[:5])


def test_an_expert_of_any_rank_joins_and_is_seen(
    anna: RegistryClient, registry: Local, tmp_path: Path, base: BaseIdentity, seed: str
) -> None:
    digest = anna.submit(adapter(tmp_path / "a", base, rank=4, parents=(seed,)))
    found = anna.contribute(digest, "sum", "annas")
    assert (found.digest, found.task, found.name, found.participant) == (digest, "sum", "annas", "anna")
    assert anna.contribute(digest, "sum", "annas") == found
    assert [line["digest"] for line in contributions(registry)] == [digest]
    (event,) = [event for event in EventLog(registry.run / "events.jsonl").read()[0] if event.kind == "contributed"]
    assert (event.node, event.name, event.detail["digest"]) == ("anna", "annas", digest)


def test_an_expert_of_another_program_joins_by_the_name_of_its_base(
    anna: RegistryClient, tmp_path: Path, base: BaseIdentity
) -> None:
    source = adapter(tmp_path / "a", base.model_copy(update={"digest": ""}))
    (source / "seedbed.json").unlink()
    assert anna.contribute(anna.submit(source), "sum").name.startswith("sum-")


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"rows": 4}, AdapterMismatchError, r"module m: expected shape \[3, 2\], got \[4, 2\]"),
        ({"module": "n"}, AdapterMismatchError, "misses module m"),
        ({"value": 1000.0}, AdapterMismatchError, "norm 100 or less, got"),
        ({"base": BaseIdentity(name="embedded", digest="e" * 64)}, AdapterMismatchError, "another base model"),
        ({"base": BaseIdentity(name="other")}, AdapterMismatchError, "another base model"),
        ({"parents": ("f" * 64,)}, AdapterMismatchError, "parent f+ is not known"),
        ({"kind": "seed"}, AdapterMismatchError, "expected an expert, got an adapter of kind 'seed'"),
    ],
)
def test_an_expert_that_does_not_fit_is_refused_in_one_sentence(
    anna: RegistryClient,
    registry: Local,
    tmp_path: Path,
    base: BaseIdentity,
    changes: dict[str, object],
    kind: type[SeedbedError],
    reason: str,
) -> None:
    changes = {"base": base, **changes}
    digest = anna.submit(adapter(tmp_path / "a", **changes))  # type: ignore[arg-type]
    with pytest.raises(kind, match=reason) as caught:
        anna.contribute(digest, "sum")
    assert str(registry.run) not in caught.value.message
    assert not (registry.run / "contributions.jsonl").exists()


def test_numbers_that_are_none_are_refused(
    anna: RegistryClient, registry: Local, tmp_path: Path, base: BaseIdentity
) -> None:
    import hashlib

    source = adapter(tmp_path / "a", base)
    tensors = source / "adapter_model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # NaN
    tensors.write_bytes(data)
    changed = read_manifest(source).model_copy(update={"tensors_sha256": hashlib.sha256(data).hexdigest()})
    (source / "seedbed.json").write_bytes(changed.canonical())
    digest = anna.submit(source)
    with pytest.raises(NonFiniteError, match="NaN"):
        anna.contribute(digest, "sum")


def test_nobody_may_train_on_what_is_held_out(anna: RegistryClient, tmp_path: Path, base: BaseIdentity) -> None:
    digest = anna.submit(adapter(tmp_path / "a", base))
    with pytest.raises(ConfigError, match="odd is held out"):
        anna.contribute(digest, "odd")
    with pytest.raises(ConfigError, match="name of a task"):
        anna.contribute(digest, "")
    with pytest.raises(ConfigError, match="expected a name of letters"):
        anna.contribute(digest, "sum", "../sum")


def test_what_was_not_submitted_cannot_be_contributed(anna: RegistryClient) -> None:
    with pytest.raises(StorageError, match="is not in the registry"):
        anna.contribute("c" * 64, "sum")


def test_only_who_contributed_an_expert_withdraws_it(
    anna: RegistryClient, bert: RegistryClient, registry: Local, tmp_path: Path, base: BaseIdentity
) -> None:
    digest = anna.submit(adapter(tmp_path / "a", base))
    anna.contribute(digest, "sum")
    with pytest.raises(StorageError, match="was contributed by anna, not by bert"):
        bert.withdraw(digest)
    assert anna.withdraw(digest).withdrawn
    assert anna.withdraw(digest).withdrawn
    assert [line["withdrawn"] for line in contributions(registry)] == [False, True]
    with pytest.raises(StorageError, match="was not contributed here"):
        bert.withdraw("c" * 64)


def test_one_expert_counts_once_and_one_name_means_one_expert(
    anna: RegistryClient, bert: RegistryClient, tmp_path: Path, base: BaseIdentity
) -> None:
    first, second = (anna.submit(adapter(tmp_path / str(value), base, value=value)) for value in (1.0, 2.0))
    anna.contribute(first, "sum", "one")
    with pytest.raises(ConfigError, match="already contributed by anna"):
        bert.contribute(first, "sum", "mine")
    with pytest.raises(ConfigError, match="already called 'one'"):
        bert.contribute(second, "sum", "one")
    anna.withdraw(first)
    assert bert.contribute(second, "sum", "one").participant == "bert"


def test_contributions_are_remembered_by_the_next_registry(
    anna: RegistryClient, registry: Local, tmp_path: Path, base: BaseIdentity
) -> None:
    digest = anna.submit(adapter(tmp_path / "a", base))
    anna.contribute(digest, "sum")
    registry.server.stop(0)
    with (registry.run / "contributions.jsonl").open("a") as file:
        file.write('{"digest": "torn')
    again = Local(registry.run)
    with again.client("anna") as client:
        assert client.withdraw(digest).withdrawn
    assert len(contributions(again)) == 2
    again.server.stop(0)


def test_without_a_seed_shapes_are_those_of_the_base_model(tmp_path: Path, base: BaseIdentity) -> None:
    from seedbed.common.targets import target_shapes

    shapes = target_shapes(basemodel.resolve(CONFIG.base), CONFIG.lora)
    RunDirectory.open(tmp_path / "run", CONFIG, {}, resume=False).close()
    fitting = {
        name: LoraFactors(torch.ones(1, cols), torch.ones(rows, 1), 0.01) for name, (rows, cols) in shapes.items()
    }
    write_adapter(tmp_path / "fits", Adapter(fitting), kind="expert", base=base)
    local = Local(tmp_path / "run")
    with local.client("anna") as client:
        assert client.contribute(client.submit(tmp_path / "fits"), "sum")
        other = client.submit(adapter(tmp_path / "other", base))
        with pytest.raises(AdapterMismatchError, match=f"expected {len(shapes)} modules, got 1"):
            client.contribute(other, "sum")
    local.server.stop(0)


def test_events_are_watched_from_an_offset_and_live(anna: RegistryClient, bert: RegistryClient) -> None:
    for name in "abc":
        anna.report(Event(kind="step", name=name, detail={"step": 1, "loss": 0.5}))
    numbered = bert.watch_numbered()
    (first, offset), (second, _), (third, _) = (next(numbered) for _ in range(3))
    assert [event.name for event in (first, second, third)] == ["a", "b", "c"]
    assert (first.node, first.detail) == ("anna", {"step": 1, "loss": 0.5})
    anna.report(Event(kind="note", name="d"))
    assert next(numbered)[0].name == "d"
    assert next(bert.watch(offset)).name == "b"


def test_a_watcher_lives_through_a_restart_and_misses_nothing(anna: RegistryClient, registry: Local) -> None:
    stream = anna.watch()
    anna.report(Event(kind="note", name="before"))
    assert next(stream).name == "before"
    registry.server.stop(0)
    EventLog(registry.run / "events.jsonl").append(Event(kind="note", name="between"))
    from seedbed.server.registry.server import RegistryServer, Settings

    again = RegistryServer(Settings(registry.run, port=registry.port))
    again.start()
    assert next(stream).name == "between"
    again.stop(0)


def test_a_watcher_ends_when_its_client_is_closed(registry: Local) -> None:
    client = registry.client("carl")
    client.report(Event(kind="note", name="a"))
    stream = client.watch()
    assert next(stream).name == "a"
    client.close()
    assert list(stream) == []


def test_a_kind_of_event_that_is_not_known_here_is_passed_over(anna: RegistryClient, registry: Local) -> None:
    from seedbed.client import registry_messages

    assert registry_messages.event(pb.Event(kind="from the future")) is None


@pytest.mark.parametrize("kind", ["accepted", "finished", "contributed", "stage", "transfer"])
def test_a_participant_cannot_speak_for_the_federation(anna: RegistryClient, kind: str) -> None:
    with pytest.raises(EnvironmentFailure, match="a participant tells of"):
        anna.report(Event(kind=kind))  # type: ignore[arg-type]


def test_a_report_may_be_so_long_and_no_longer(anna: RegistryClient) -> None:
    with pytest.raises(ConfigError, match="at most 8,192 bytes"):
        anna.report(Event(kind="note", name="x" * 10_000))


def test_numbers_that_json_does_not_know_do_not_spoil_a_report(anna: RegistryClient, registry: Local) -> None:
    anna.report(Event(kind="step", detail={"loss": math.nan}))
    assert EventLog(registry.run / "events.jsonl").read()[0][0].detail == {"loss": None}


def test_a_detail_that_is_no_object_is_refused(registry: Local) -> None:
    stub = registry_pb2_grpc.RegistryStub(grpc.insecure_channel(f"127.0.0.1:{registry.port}"))
    for detail in ("[1]", "{", "[" * 5000):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Report(pb.ReportRequest(event=pb.Event(kind="note", detail=detail)))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_each_participant_may_report_so_often() -> None:
    rates = Rates(rate=1e-9, burst=2)
    assert [rates.allows("anna") for _ in range(3)] == [True, True, False]
    assert rates.allows("bert")


def test_the_store_of_the_run_is_what_the_registry_serves(registry: Local, anna: RegistryClient, seed: str) -> None:
    assert [manifest.digest for manifest in anna.manifests()] == [seed]
    assert DirectoryStore(registry.run / "store").open(seed).is_dir()
