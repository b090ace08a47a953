"""Bytes from anyone, at every decoder: only our own refusals come out, soon, and without memory to speak of."""

from __future__ import annotations

import contextlib
import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.adapter_file import AdapterFile, read_manifest
from seedbed.common.config_file import load_config
from seedbed.common.datafiles import read_examples
from seedbed.common.errors import AdapterFormatError, SeedbedError
from seedbed.common.events import EventLog
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.common.manifest import BaseIdentity
from seedbed.common.peft_config import parse_peft_config
from seedbed.common.registry import FederationInfo
from seedbed.common.routing.router_file import read_router
from seedbed.common.storage import write_adapter
from seedbed.common.tensor_file import TensorFile
from seedbed.common.wire import unpack

Decoder = Callable[[Path], object]
MEGABYTE = 1 << 20
FUZZ = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = st.one_of(st.integers(), st.just(10**400), st.floats(), st.sampled_from([-1, 0, 2**31, 2**63, 2**64]))
JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def refused_or_read(decode: Callable[[], object]) -> None:
    """The one property: a value or a `SeedbedError`, within seconds."""
    began = time.monotonic()
    with contextlib.suppress(SeedbedError):
        decode()
    assert time.monotonic() - began < 60


@st.composite
def changed(draw: st.DrawFn, document: dict[str, Any]) -> Any:
    """A document in which some values, at any depth, are others."""
    value = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = value
        while True:
            if not place or not isinstance(place, dict | list):
                break
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.booleans()):
                place[key] = draw(JSON)
            elif isinstance(place, dict):
                del place[key]
            break
    return value


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as Seedbed writes it."""
    directory = tmp_path_factory.mktemp("good") / "adapter"
    factors = {name: LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 1.0) for name in ("a.q_proj", "b.q_proj")}
    write_adapter(directory, Adapter(factors), base=BaseIdentity(name="tiny", digest="1" * 64), kind="expert")
    return directory


def copied(good: Path, place: Path, name: str, data: bytes) -> Path:
    """The good adapter with one file replaced."""
    place.mkdir(exist_ok=True)
    for path in good.iterdir():
        (place / path.name).write_bytes(data if path.name == name else path.read_bytes())
    return place


def safetensors(header: bytes, tensors: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + tensors


HEADER = {
    "__metadata__": {"format": "pt"},
    "base_model.model.a.lora_A.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "base_model.model.a.lora_B.weight": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [24, 40]},
}


@FUZZ
@given(st.one_of(st.binary(max_size=200), st.builds(safetensors, st.binary(max_size=200), st.binary(max_size=50))))
def test_any_bytes_as_a_tensor_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    refused_or_read(lambda: TensorFile(tmp_path / "x"))


@FUZZ
@given(st.one_of(changed(HEADER), JSON), st.integers(0, 60))
def test_a_changed_header_of_a_tensor_file(tmp_path: Path, header: Any, stored: int) -> None:
    (tmp_path / "x").write_bytes(safetensors(encoded(header), bytes(stored)))

    def read() -> None:
        file = TensorFile(tmp_path / "x")
        for name in file.names:
            file.tensor(name)

    refused_or_read(read)


@FUZZ
@given(st.data())
def test_an_adapter_with_a_changed_file(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in good.iterdir())))
    original = (good / name).read_bytes()
    if name.endswith(".json") and data.draw(st.booleans()):
        replaced = encoded(data.draw(changed(json.loads(original))))
    else:
        start = data.draw(st.integers(0, len(original)))
        stop = data.draw(st.integers(start, min(len(original), start + 8)))
        replaced = original[:start] + data.draw(st.binary(max_size=8)) + original[stop:]
    directory = copied(good, tmp_path / "adapter", name, replaced)

    def read() -> None:
        file = AdapterFile(directory)
        for module in file.names:
            file.factors(module)

    refused_or_read(read)
    refused_or_read(lambda: read_manifest(directory))


PEFT = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"^a.q_proj": 1.5},
    "bias": "none",
    "init_lora_weights": True,
}


@FUZZ
@given(st.one_of(changed(PEFT), st.dictionaries(st.sampled_from(sorted(PEFT)), JSON)))
def test_a_changed_configuration_of_peft(values: dict[str, Any]) -> None:
    if not isinstance(values, dict):
        return
    text = json.loads(encoded(values))

    def read() -> None:
        config = parse_peft_config(text, "adapter_config.json")
        assert config.rank_of("a.q_proj") >= 1
        config.scaling_of("a.q_proj")

    refused_or_read(read)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(a|a)*",
        "(.*)*x",
        "a*" * 20,
        "(a?){30}" + "a" * 30,
        "a?" * 30,
        "(a|ab)" * 30,
        r"(aa|a.|.a|..|\wa|a\w|\w\w|\w.|.\w)" * 8 + "x",  # few groups, but 9 to the 8th ways
        ".?" * 8 + ".*.*x",
    ],
)
@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_take_for_ever_is_refused(pattern: str, table: str) -> None:
    with pytest.raises(AdapterFormatError, match="is not matched: it "):
        parse_peft_config({**PEFT, table: {pattern: 1}}, "adapter_config.json")


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"^model\.layers\.0\.q_proj",
        r".*layers\.[0-9]+\.q",
        "(q|k|v)_proj",
        r".*layers\.[0-9]+\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        rf"layers\.({'|'.join(map(str, range(32)))})\.q_proj",
    ],
)
def test_patterns_that_people_write_are_taken(pattern: str) -> None:
    parse_peft_config({**PEFT, "rank_pattern": {pattern: 1}}, "adapter_config.json")


def test_a_slow_allowed_pattern_still_ends() -> None:
    config = parse_peft_config({**PEFT, "rank_pattern": {".*.*x": 1}}, "adapter_config.json")
    refused_or_read(lambda: config.rank_of("a." * 150))


@FUZZ
@given(st.sampled_from([Job, JobResult, Hello, FederationInfo]), st.one_of(JSON.map(encoded), st.binary(max_size=60)))
def test_any_message(kind: Any, data: bytes) -> None:
    for text in (data, data.decode("latin-1")):
        refused_or_read(lambda text=text: unpack(kind, {"json": text}))  # type: ignore[misc]
    refused_or_read(lambda: unpack(kind, {"other": 1}))
    refused_or_read(lambda: unpack(kind, None))


@pytest.mark.parametrize("kind", [Job, JobResult, Hello])
def test_a_deep_or_long_message_is_refused(kind: Any) -> None:
    for text in ("[" * 1_000_000, '{"a":' * 100_000, "9" * 1_000_000, '"' + "x" * 5_000_000 + '"', "\ud800"):
        with pytest.raises(SeedbedError):
            unpack(kind, {"json": text})


@FUZZ
@given(
    st.sampled_from(["x.jsonl", "x.csv", "x.json", "x.parquet"]),
    st.lists(st.one_of(JSON.map(encoded), st.binary(max_size=40)), max_size=4),
)
def test_any_data_file(tmp_path: Path, name: str, lines: list[bytes]) -> None:
    (tmp_path / name).write_bytes(b"\n".join(lines))
    refused_or_read(lambda: read_examples(tmp_path / name))


EXAMPLE = {"prompt": "a", "choices": ["x", "y"], "label": 1, "instruction": "i", "completion": "c", "text": "t"}


@FUZZ
@given(changed(EXAMPLE))
def test_a_changed_example(tmp_path: Path, record: Any) -> None:
    (tmp_path / "x.jsonl").write_bytes(encoded(record))
    refused_or_read(lambda: read_examples(tmp_path / "x.jsonl"))


@FUZZ
@given(st.data())
def test_any_federation_file(tmp_path: Path, data: st.DataObject) -> None:
    document = {
        "name": "x",
        "tasks": {"experts": ["a"]},
        "lora": {"rank": 1},
        "seed": {"mode": "none"},
        "combine": {"candidates": ["base"]},
    }
    text = data.draw(st.one_of(changed(document).map(encoded), JSON.map(encoded), st.binary(max_size=60)))
    (tmp_path / "f.yaml").write_bytes(text)
    override = data.draw(st.text(max_size=12))
    refused_or_read(lambda: load_config(str(tmp_path / "f.yaml")))
    refused_or_read(lambda: load_config(str(tmp_path / "f.yaml"), [override]))


def test_a_federation_file_that_grows_when_read_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "f.yaml").write_text("\n".join(lines))
    refused_or_read(lambda: load_config(str(tmp_path / "f.yaml")))


ROUTER = {"format": 1, "settings": {"kind": "arrow"}, "names": ["a", "b"]}


@FUZZ
@given(st.one_of(changed(ROUTER), JSON), st.one_of(st.just(safetensors(b"{}")), st.binary(max_size=40)))
def test_any_router(good: Path, tmp_path: Path, config: Any, tensors: bytes) -> None:
    (tmp_path / "router_config.json").write_bytes(encoded(config))
    (tmp_path / "router.safetensors").write_bytes(tensors)
    (tmp_path / "seedbed.json").write_bytes((good / "seedbed.json").read_bytes())
    refused_or_read(lambda: read_router(tmp_path))


@FUZZ
@given(st.lists(st.one_of(JSON.map(encoded), st.binary(max_size=40)), max_size=5))
def test_any_event_file(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / "events.jsonl").write_bytes(b"\n".join(lines))
    refused_or_read(lambda: EventLog(tmp_path / "events.jsonl").read())


BOMBS = {
    "a header that claims to be endless": struct.pack("<Q", 2**63) + b"{}",
    "a tensor that claims to be endless": safetensors(
        encoded({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    ),
    "a shape of a million axes": safetensors(
        encoded({"a": {"dtype": "F32", "shape": [2**62] * 1_000_000, "data_offsets": [0, 4]}}), bytes(4)
    ),
    "a number of a million digits": safetensors(b'{"a":' + b"9" * 1_000_000 + b"}"),
    "brackets without end": safetensors(b"[" * 1_000_000),
    "zeros": bytes(MEGABYTE),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_nothing_is_allocated_for_what_is_only_claimed(tmp_path: Path, bomb: str) -> None:
    (tmp_path / "x").write_bytes(BOMBS[bomb])
    tracemalloc.start()
    try:
        with pytest.raises(AdapterFormatError):
            TensorFile(tmp_path / "x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(BOMBS[bomb]) + MEGABYTE


def test_a_manifest_without_end_is_not_read(good: Path, tmp_path: Path) -> None:
    directory = copied(good, tmp_path / "adapter", "seedbed.json", b"")
    with (directory / "seedbed.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no space on the disk
    tracemalloc.start()
    try:
        with pytest.raises(AdapterFormatError, match="larger than"):
            read_manifest(directory)
        assert tracemalloc.get_traced_memory()[1] < 100 * MEGABYTE
    finally:
        tracemalloc.stop()
