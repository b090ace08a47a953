"""A process of a coordinator that hangs is ended and started again; one that is merely not asked is left alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from seedbed.common.processes import RotatingLog, free_port
from seedbed.common.watch import Watch
from seedbed.server.coordinator import services
from seedbed.server.coordinator.pulse import gateway_lives, registry_lives
from seedbed.server.coordinator.services import Service

LISTENS = "import json, time; print(json.dumps({'event': 'listening', 'port': 1}), flush=True); time.sleep(300)"


def until(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_a_service_that_does_not_answer_any_more_is_started_again(tmp_path: Path) -> None:
    hung: list[int] = []
    log = RotatingLog(tmp_path / "log")
    one = Service(
        "tester",
        lambda port: [sys.executable, "-c", LISTENS],
        0,
        log,
        {},
        alive=lambda: one.starts not in hung,
        check=0.1,
        patience=1.0,
    )

    def comes(start: int) -> bool:
        return until(lambda: one.tick() or (one.ready and one.starts == start))

    try:
        assert comes(1)
        assert not until(lambda: one.tick() or one.starts > 1, 2.5), "it answers, and stays"
        hung.append(1)
        assert comes(2)
        assert any("tester does not answer: it is ended" in line for line in log.path.read_text().splitlines())
    finally:
        one.stop(1)


def test_a_service_that_never_begins_to_serve_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "START_SECONDS", 0.5)
    silent = [sys.executable, "-c", "import time; time.sleep(300)"]
    one = Service("tester", lambda port: silent, 0, RotatingLog(tmp_path / "log"), {})
    try:
        assert until(lambda: one.tick() or one.starts == 2)
    finally:
        one.stop(1)


def test_who_was_just_started_may_take_its_time_until_its_first_answer_and_no_longer_after() -> None:
    answers: list[bool] = []
    watch = Watch(lambda: bool(answers), check=0.05, patience=0.4)
    watch.begin(allowance=600.0)
    assert not until(watch.hangs, 1.0)
    answers.append(True)
    assert not until(watch.hangs, 1.0)
    answers.clear()
    assert until(watch.hangs)


def test_whoever_asks_and_stood_still_itself_does_not_call_the_other_hung() -> None:
    watch = Watch(lambda: True, check=0.1, patience=0.3)
    assert not watch.hangs()
    time.sleep(0.6)  # the supervisor was stopped, or its machine asleep
    assert not watch.hangs()


def test_a_question_that_hangs_itself_is_no_answer() -> None:
    watch = Watch(lambda: bool(time.sleep(60)) or True, check=0.05, patience=1.0)
    assert until(lambda: watch.hangs(), 10)


@pytest.mark.parametrize("name", ["registry", "gateway"])
def test_a_stopped_process_does_not_live_though_its_port_is_open(tmp_path: Path, name: str) -> None:
    port, health = free_port(), free_port()
    options = {
        "registry": ["--health-port", str(health)],
        "gateway": ["--upstream", "http://127.0.0.1:1", "--registry-port", "1"],
    }[name]
    command = [sys.executable, "-m", f"seedbed.server.{name}", "--run", str(tmp_path), "--listen", f"127.0.0.1:{port}"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE)
    lives = {
        "registry": lambda: registry_lives(health, 1.0),
        "gateway": lambda: gateway_lives("0.0.0.0", port, secure=False, seconds=1.0),
    }[name]
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "listening"
        assert until(lives), "what stands behind a gateway may be away: it lives all the same"
        psutil.Process(process.pid).suspend()
        assert not lives()
        psutil.Process(process.pid).resume()
        assert until(lives, 20)
    finally:
        process.kill()
        process.wait()
    assert not lives()
