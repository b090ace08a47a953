"""The events of a federation: written by several, followed by anyone."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pytest

from seedbed.common.events import Event, EventLog


def note(name: str) -> Event:
    return Event(kind="note", name=name, detail={"loss": 0.5})


def names(events: list[Event]) -> list[str]:
    return [event.name for event in events]


def write_many(path: Path, writer: str) -> None:
    for number in range(200):
        EventLog(path).append(note(f"{writer}{number}" + "x" * 3000))


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "events.jsonl")


def test_a_log_that_nobody_wrote_is_empty(log: EventLog) -> None:
    assert log.read() == ([], 0)


def test_what_was_written_is_read_in_order_and_reading_goes_on_from_the_offset(log: EventLog) -> None:
    log.append(note("a"))
    log.append(note("b"))
    first, offset = log.read()
    log.append(note("c"))
    second, end = log.read(offset)
    assert (names(first), names(second)) == (["a", "b"], ["c"])
    assert end == log.path.stat().st_size
    assert second[0].detail == {"loss": 0.5}


def test_a_torn_last_line_is_left_for_later(log: EventLog) -> None:
    log.append(note("a"))
    whole = note("b").model_dump_json().encode() + b"\n"
    with log.path.open("ab") as file:
        file.write(whole[:10])
    first, offset = log.read()
    with log.path.open("ab") as file:
        file.write(whole[10:])
    assert (names(first), names(log.read(offset)[0])) == (["a"], ["b"])


def test_a_line_torn_by_a_dying_process_does_not_take_the_next_event_with_it(log: EventLog) -> None:
    log.path.write_bytes(b'{"kind": "no')
    log.append(note("after"))
    assert names(log.read()[0]) == ["after"]


def test_a_damaged_line_is_passed_over(log: EventLog) -> None:
    log.append(note("a"))
    with log.path.open("ab") as file:
        file.write(b'{"kind": "unheard of"}\n\xff\xff\n')
    log.append(note("b"))
    assert names(log.read()[0]) == ["a", "b"]


def test_a_line_longer_than_what_is_read_at_once_is_read_whole(log: EventLog) -> None:
    log.append(note("a" * 3_000_000))
    log.append(note("b"))
    assert [len(name) for name in names(log.read()[0])] == [3_000_000, 1]


def test_several_processes_write_at_once_and_no_line_is_lost_or_mixed(log: EventLog) -> None:
    context = get_context("fork")
    writers = [context.Process(target=write_many, args=(log.path, letter)) for letter in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = names(log.read()[0])
    for letter in "abc":
        assert [name for name in found if name[0] == letter] == [f"{letter}{n}" + "x" * 3000 for n in range(200)]
