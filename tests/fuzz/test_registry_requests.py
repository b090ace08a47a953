"""Requests from anyone at a running registry: it answers with a status, and lives on."""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import psutil
import pytest
from doorway import running
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from seedbed.client import registry_messages as received
from seedbed.common.config_file import dump_config, load_config
from seedbed.common.errors import SeedbedError
from seedbed.proto.v1 import registry_pb2 as pb
from seedbed.server.registry import messages

SERVICE = pb.DESCRIPTOR.services_by_name["Registry"]
FUZZ = settings(max_examples=200, deadline=None, derandomize=True)
ROUNDS = 40
TEXTS = st.one_of(st.text(max_size=30), st.sampled_from(["{}", "[]", "NaN", '{"a": 1e999}', "[" * 100_000, "9" * 5000]))


@FUZZ
@given(st.builds(pb.Event, kind=TEXTS, node=TEXTS, name=TEXTS, detail=TEXTS, time=st.floats()))
def test_any_event_that_a_participant_reports(message: Any) -> None:
    try:
        event = messages.reported(message, "alice")
    except SeedbedError:
        return
    assert event.node == "alice"
    received.event(message)


@FUZZ
@given(st.binary(max_size=80))
def test_any_bytes_as_what_the_registry_says(data: bytes) -> None:
    try:
        message = pb.Federation.FromString(data)
    except DecodeError:
        return
    with contextlib.suppress(SeedbedError):
        received.federation(message)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text(dump_config(load_config("embedded")))
    command = [sys.executable, "-m", "seedbed.server.registry", "--run", str(run), "--listen", "127.0.0.1:0"]
    with running(command) as process:
        port = json.loads(process.until(lambda line: line.startswith('{"event"')))["port"]
        yield f"127.0.0.1:{port}", psutil.Process(process.popen.pid)


def _call(channel: grpc.Channel, method: Any, requests: list[bytes]) -> grpc.StatusCode:
    """Send bytes as they are; the status that came back. A stream of events is listened to for a moment only."""
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    call = kinds[method.client_streaming, method.server_streaming](f"/{SERVICE.full_name}/{method.name}")
    sent: Any = iter(requests) if method.client_streaming else requests[0]
    try:
        answer = call(sent, timeout=5, wait_for_ready=True)
        if method.server_streaming:
            for _ in zip(range(3), answer, strict=False):
                pass
            answer.cancel()
    except grpc.RpcError as error:
        return error.code()  # type: ignore[attr-defined,no-any-return]
    return grpc.StatusCode.OK


@pytest.mark.parametrize("name", [method.name for method in SERVICE.methods])
def test_any_bytes_at_every_method(registry: tuple[str, psutil.Process], name: str) -> None:
    address, process = registry
    method = SERVICE.methods_by_name[name]
    before, draw = process.memory_info().rss, random.Random(name)
    with grpc.insecure_channel(address) as channel:
        for _ in range(ROUNDS if not method.server_streaming else 8):
            requests = [draw.randbytes(draw.choice((0, 1, 7, 60))) for _ in range(draw.randint(1, 4))]
            _call(channel, method, requests)
    assert process.is_running()
    # Others, on connections of their own: whoever sends nonsense may use up the streams of its own connection.
    with grpc.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        assert _call(channel, SERVICE.methods_by_name["Describe"], [b""]) == grpc.StatusCode.OK
    assert process.memory_info().rss < before + (200 << 20)
