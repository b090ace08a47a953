"""Processes that die with whoever started them, and their logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from seedbed.common.processes import Backoff, Child, RotatingLog

GRANDCHILDREN = """
import os, subprocess, sys, time
# A child in a session of its own, whose parent is gone: what a process group alone would not find.
code = "import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)', 'MARK'])"
subprocess.Popen([sys.executable, "-c", code], start_new_session=True).wait()
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", "MARK"])
print("ready", flush=True)
time.sleep(300)
"""


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if any(mark in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


@pytest.fixture
def mark(tmp_path: Path) -> str:
    return f"{tmp_path}/mark"


def family(mark: str) -> list[str]:
    return [sys.executable, "-c", GRANDCHILDREN.replace("MARK", mark), mark]


def test_stopping_a_child_leaves_none_of_its_descendants(mark: str) -> None:
    lines: list[str] = []
    child = Child("family", family(mark), on_line=lines.append)
    assert until(lambda: "ready" in lines)
    assert len(child.descendants()) == 3
    child.stop()
    assert not marked(mark)


def test_a_child_that_ends_takes_what_it_started_with_it(mark: str) -> None:
    lines: list[str] = []
    child = Child("family", family(mark), on_line=lines.append)
    assert until(lambda: "ready" in lines)
    leader = min(child.descendants(), key=lambda process: process.pid)
    leader.kill()
    assert child.wait(60) == 128 + signal.SIGKILL
    assert until(lambda: not marked(mark))


def test_after_kill_9_of_whoever_started_it_nothing_is_left(mark: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "socket").touch()
    code = (
        "import sys, time; from pathlib import Path; from seedbed.common.processes import Child; "
        f"Child('family', {family(mark)!r}, on_line=lambda line: print(line, flush=True), scratch=Path({str(scratch)!r})); "
        "time.sleep(300)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    assert starter.stdout.readline() == b"ready\n"
    starter.kill()
    starter.wait()
    starter.stdout.close()
    assert until(lambda: not marked(mark)), marked(mark)
    assert until(lambda: not scratch.exists())


def test_when_the_keeper_itself_is_killed_the_child_is_gone_at_the_next_look(mark: str) -> None:
    lines: list[str] = []
    child = Child("family", family(mark), on_line=lines.append)
    assert until(lambda: "ready" in lines)
    os.kill(child.pid, signal.SIGKILL)
    assert until(lambda: child.poll() is not None)
    child.kill()
    left = marked(mark)
    # Only what had left the group *and* lost its parent can escape, and that no process of ours does.
    assert len(left) <= 1
    for process in left:
        process.kill()


def test_a_scratch_directory_goes_with_the_child_that_it_was_made_for(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    child = Child("brief", ["sleep", "0"], scratch=scratch)
    assert child.wait(60) == 0
    assert not scratch.exists()
    assert tmp_path.exists()


def test_a_child_that_will_not_listen_is_ended_all_the_same(mark: str) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(300)"
    )
    lines: list[str] = []
    child = Child("deaf", [sys.executable, "-c", code, mark], on_line=lines.append)
    assert until(lambda: "deaf" in lines)
    child.stop(grace=0.2)
    assert not marked(mark)


def test_a_child_that_listens_ends_with_its_own_code() -> None:
    listen = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
    code = f"{listen}; print('here', flush=True); time.sleep(300)"
    lines: list[str] = []
    child = Child("polite", [sys.executable, "-c", code], on_line=lines.append)
    assert until(lambda: "here" in lines)
    assert child.stop() == 7


def test_a_command_that_is_not_there_says_so(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "log")
    child = Child("nothing", ["no-such-program-anywhere"], log=log)
    assert child.wait(60) == 127
    child.kill()
    assert "no-such-program-anywhere cannot be started" in log.path.read_text().splitlines()[-1]


def test_what_a_child_prints_stands_in_the_log_with_time_and_name_and_without_colours(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "logs" / "all.log")
    child = Child("painter", [sys.executable, "-c", r"print('\x1b[92mgreen\x1b[0m grass')"], log=log)
    assert child.wait(60) == 0
    child.kill()
    (line,) = log.path.read_text().splitlines()
    said = json.loads(line)
    assert (said["process"], said["text"]) == ("painter", "green grass")
    assert said["time"].endswith("Z")


def test_a_log_keeps_its_size_and_its_number_of_files(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "log", max_bytes=1000, keep=2)
    for number in range(100):
        log.write("writer", f"line {number:04} {'x' * 40}")
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["log", "log.1", "log.2"]
    assert all(file.stat().st_size <= 1000 for file in files)
    assert "line 0099" in log.path.read_text().splitlines()[-1]


def test_restarts_wait_longer_and_longer_until_one_has_lived() -> None:
    pause = Backoff(first=1, longest=8, steady=60)
    assert [pause.after(0.1) for _ in range(5)] == [1, 2, 4, 8, 8]
    assert pause.after(61) == 1
