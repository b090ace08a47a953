"""A SuperNode is started again when it ends, and when it does not answer any more; one that answers is left alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from seedbed.client.join.supervise import Supervisor
from seedbed.common.watch import Watch

ANSWERS = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print("serves", flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


class Kept:
    """A supervisor of a process that answers as a SuperNode does, impatient for the test's sake."""

    def __init__(self, log: Path) -> None:
        self.said: list[str] = []
        self.codes: list[int] = []
        self.supervisor = Supervisor(
            lambda port: [sys.executable, "-c", ANSWERS, str(port)], {}, log, lambda line: self.said.append(line)
        )
        self.supervisor._watch = Watch(self.supervisor._answers, check=0.1, patience=6.0)

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> bool:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            code = self.supervisor.tick()
            self.codes += [code] if code is not None else []
            time.sleep(0.05)
        return condition()

    def starts(self) -> int:
        return self.said.count("serves")

    def process(self) -> psutil.Process:
        assert self.supervisor._child is not None
        (found,) = self.supervisor._child.descendants()
        return found


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path / "log")
    yield made
    made.supervisor.stop()


def test_one_that_is_killed_is_started_again_and_its_exit_code_told(kept: Kept) -> None:
    assert kept.until(lambda: kept.starts() == 1)
    kept.process().kill()
    assert kept.until(lambda: kept.starts() == 2)
    assert kept.codes == [137]


def test_one_that_answers_stays_and_one_that_hangs_is_started_again(kept: Kept) -> None:
    assert kept.until(lambda: kept.starts() == 1)
    assert not kept.until(lambda: kept.starts() > 1, 8.0), "it answers"
    kept.process().suspend()
    assert kept.until(lambda: kept.starts() == 2)


def test_when_it_is_told_to_stop_nothing_is_left(kept: Kept) -> None:
    assert kept.until(lambda: kept.starts() == 1)
    process = kept.process()
    kept.supervisor.stop()
    assert not process.is_running()
