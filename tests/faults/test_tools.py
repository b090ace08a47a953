"""The tools of the fault matrix do what they say: a fault that does nothing would prove nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import clock
import pytest
import table
from faults import POSSIBLE, STAGES, Cell
from journey import Outcome
from way import Way

from seedbed.common.processes import free_port


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server on 127.0.0.1 that sends everything back."""
    with socket.create_server(("127.0.0.1", free_port())) as server:

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    while data := peer.recv(1 << 16):
                        peer.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


@pytest.fixture
def way(echo: int) -> Iterator[Way]:
    way = Way("127.0.0.2", (echo,))
    yield way
    way.close()


def sent_and_back(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.2", port)) as peer:
        peer.sendall(data)
        got = b""
        while len(got) < len(data):
            got += peer.recv(1 << 16)
        return got


def test_a_way_passes_bytes_on_as_they_are(way: Way, echo: int) -> None:
    data = bytes(range(256)) * 100
    assert sent_and_back(echo, data) == data


def test_a_way_that_flips_changes_one_bit_of_what_comes_back(way: Way, echo: int) -> None:
    way.weather[echo].flips = 1
    got = sent_and_back(echo, bytes(64))
    assert [byte for byte in got if byte] == [1]
    assert way.weather[echo].flipped == 1
    assert sent_and_back(echo, bytes(64)) == bytes(64)


def test_a_slow_way_takes_its_time(way: Way, echo: int) -> None:
    way.weather[echo].rate = 1000.0
    began = time.monotonic()
    assert sent_and_back(echo, bytes(500)) == bytes(500)
    assert time.monotonic() - began >= 1.0, "half a second there and half a second back"


@pytest.mark.skipif(bool(clock.reason_not_to()), reason=clock.reason_not_to() or "-")
def test_a_clock_is_moved_in_one_kind_of_process_alone(tmp_path: Path) -> None:
    clocks = clock.Clocks(tmp_path)
    clocks.shift("client", 900)

    def time_of(kind: str) -> float:
        environment = {**os.environ, **clocks.environment(kind)}
        done = subprocess.run(
            [sys.executable, "-c", "import time; print(time.time())"], env=environment, capture_output=True
        )
        return float(done.stdout) - time.time()

    assert 800 < time_of("client") < 1000
    assert abs(time_of("bystander")) < 100
    clocks.shift("client", 0)
    assert abs(time_of("client")) < 100


def test_the_table_has_a_verdict_for_each_stage_and_says_what_does_not_apply_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = {stage: Cell("coordinator", "kill -9", stage) for stage in STAGES}
    found = {killed["seed"]: Outcome("resumed"), killed["expert"]: Outcome("failed", "other digests than undisturbed")}
    store = tmp_path / "results.json"
    table._save(store, found)
    assert table._load(store) == found
    assert table.main(["--show", "--resume", str(store), "--only", "coordinator/kill*", "--width", "200"]) == 1
    said = capsys.readouterr().out
    assert "160 cells: 0 survived, 1 resumed, 0 refused, 1 failed; 42 do not apply, 116 not run." in said
    assert "coordinator/kill -9/expert failed: other digests than undisturbed" in said
    assert "nothing is trained in this stage" in said


def test_federations_are_shared_as_asked() -> None:
    cells = [cell for cell in POSSIBLE if cell.kind in ("kill -9", "hang")]
    assert [len(list(group)) for group in table._groups(cells, "kind")] == [18, 18]
    assert [len(list(group)) for group in table._groups(cells, "target")] == [4, 2, 4, 4, 4] * 2
    assert {len(list(group)) for group in table._groups(cells, "none")} == {1}
