"""A run directory is read while others write it, from where the last look ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from seedbed.common.errors import EnvironmentFailure, StorageError
from seedbed.common.events import Event, EventLog
from seedbed.server.ledger import Entry, Ledger
from seedbed.server.monitor.document import from_json, to_json
from seedbed.server.monitor.reader import RunReader


def write(run: Path, *events: Event) -> None:
    for event in events:
        EventLog(run / "events.jsonl").append(event)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("name: valley\n")
    return tmp_path


def test_a_run_that_has_just_begun_waits_under_its_own_name(run: Path) -> None:
    status = RunReader(run).look()
    assert (status.name, status.state) == ("valley", "waiting")


def test_a_directory_that_is_no_run_is_refused_with_a_next_step(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(StorageError) as refused:
            RunReader(path)
        assert "coordinator" in refused.value.hint


def test_a_run_that_is_not_there_yet_waits_and_is_then_seen(tmp_path: Path) -> None:
    reader = RunReader(tmp_path / "later", awaited=True)
    assert (reader.look().name, reader.look().state) == ("later", "waiting")
    write(tmp_path / "later", Event(kind="stage", name="seed", detail={"total": 1}))
    (tmp_path / "later" / "config.yaml").write_text("name: valley\n")
    assert (reader.look().name, reader.look().state) == ("valley", "running")


def test_each_look_reads_on_and_a_torn_last_line_waits(run: Path) -> None:
    reader = RunReader(run)
    write(run, Event(kind="accepted", node="ada", name="expert:sums", detail={"digest": "ab"}))
    assert reader.look().arrived == 1
    line = Event(kind="accepted", node="bob", name="expert:poems", detail={"digest": "cd"}).model_dump_json() + "\n"
    with (run / "events.jsonl").open("a") as file:
        file.write(line[:20])
    assert reader.look().arrived == 1
    with (run / "events.jsonl").open("a") as file:
        file.write(line[20:])
    assert reader.look().arrived == 2
    assert reader.look().arrived == 2


def test_ledger_and_events_together_count_everything_once_and_keep_curves(run: Path) -> None:
    ledger = Ledger(run / "ledger.jsonl")
    ledger.append(Entry(event="accepted", name="seed:sums", node="ada", digest="00"))  # before there was an event log
    write(run, Event(kind="stage", name="experts", detail={"total": 2}))
    write(run, *(Event(kind="step", node="ada", name="expert:sums", detail={"step": n, "loss": 1.0}) for n in (1, 2)))
    ledger.append(Entry(event="accepted", name="expert:sums", node="ada", digest="ab"))
    write(run, Event(kind="accepted", node="ada", name="expert:sums", detail={"digest": "ab", "norm": 2.0}))
    ledger.append(Entry(event="accepted", name="expert:poems", node="bob", digest="cd"))  # its event was never written
    status = RunReader(run).look()
    assert [one.digest for one in status.arrivals] == ["00", "ab", "cd"]
    assert status.arrivals[1].norm == 2.0
    assert len(status.jobs["expert:sums"].curve.points) == 2
    assert status.stage.name == "experts"
    assert status.stage.done == 0


def test_lines_of_another_version_are_passed_over(run: Path) -> None:
    (run / "ledger.jsonl").write_text('{"event": "levitated"}\n{"event": "start", "name": "valley"}\n')
    (run / "events.jsonl").write_text('{"kind": "levitated", "time": 1}\nno json\n')
    write(run, Event(kind="note", detail={"text": "hello"}))
    assert RunReader(run).look().notes[0].text == "hello"


WRITER = """
import sys
from pathlib import Path
from seedbed.common.events import Event, EventLog
log = EventLog(Path(sys.argv[1]) / "events.jsonl")
for number in range(500):
    log.append(Event(kind="accepted", node="ada", name=f"job-{number}", detail={"digest": str(number)}))
log.append(Event(kind="finished"))
"""


def test_a_run_is_watched_while_another_process_writes_it(run: Path) -> None:
    reader = RunReader(run)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(run)]) as writer:
        seen = [reader.look().arrived]
        while not reader.status.ended and writer.poll() is None:
            seen.append(reader.look().arrived)
    assert writer.returncode == 0
    assert reader.look().arrived == 500
    assert seen == sorted(seen)


def test_a_status_goes_through_json_and_back(run: Path) -> None:
    write(
        run,
        Event(kind="stage", name="experts", detail={"total": 2}),
        Event(kind="node", node="ada", detail={"tasks": ["sums"], "devices": ["cpu"]}),
        *(Event(kind="step", node="ada", name="expert:sums", detail={"step": n, "loss": 3.0 / n}) for n in (1, 2, 3)),
        Event(kind="accepted", node="ada", name="seed:sums", detail={"digest": "ab", "bytes": 7}),
        Event(kind="contributed", node="eve", name="hers", detail={"digest": "cd", "task": "sums"}),
        Event(kind="note", detail={"text": "a note"}),
    )
    status = RunReader(run).look()
    assert to_json(from_json(to_json(status, 1.0)), 1.0) == to_json(status, 1.0)
    newer = {**to_json(status), "moon": "full", "nodes": [{**to_json(status)["nodes"][0], "mood": "good"}]}
    assert from_json(newer).nodes["ada"].tasks == ("sums",)


@pytest.mark.parametrize(
    "value", [None, [], {"format": 2}, {"format": 1, "jobs": [{"name": 5}]}, {"format": 1, "nodes": 3}]
)
def test_an_answer_that_is_no_status_is_one_sentence(value: object) -> None:
    with pytest.raises(EnvironmentFailure):
        from_json(value)
