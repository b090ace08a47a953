"""What a person sees of a federation in a terminal and in a log."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from seedbed.common.errors import EnvironmentFailure, StorageError
from seedbed.common.events import Event
from seedbed.server.monitor import prometheus, words
from seedbed.server.monitor.changes import changes
from seedbed.server.monitor.document import to_json
from seedbed.server.monitor.fold import fold_all
from seedbed.server.monitor.live import picture, watch
from seedbed.server.monitor.reader import RunReader
from seedbed.server.monitor.remote import remote
from seedbed.server.monitor.state import Status
from seedbed.server.monitor.table import show_status, status_table


def event(kind: Any, at: float = 100.0, node: str = "", name: str = "", **detail: Any) -> Event:
    return Event(kind=kind, time=at, node=node, name=name, detail=detail)


def step(at: float, number: int) -> Event:
    detail = {"step": number, "steps": 10, "loss": 10.0 / number, "tokens": 100 * number, "seconds": float(number)}
    return event("step", at, "ada", "expert:sums", **detail)


EVENTS = [
    event("stage", 100, name="experts", total=3),
    event("node", 100, "ada", state="joined", tasks=["sums"], devices=["A100"]),
    event("node", 100, "bob", state="joined", tasks=["poems"]),
    event("job", 100, "ada", "expert:sums", state="running", steps=10),
    *(step(100 + number, number) for number in range(1, 6)),
    event("accepted", 106, "bob", "expert:poems", digest="ab" * 32, seconds=6.0, bytes=2_000_000, cosine=0.25),
    event("advance", 106, name="expert:poems"),
    event("quarantined", 107, "eve", "expert:lies", reason="module q_proj holds 3 values that are NaN, expected 0"),
    event("job", 107, "", "expert:songs", state="open", steps=10),
]
STATUS = fold_all(Status(name="valley"), EVENTS)


def shown(what: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_says_who_does_what_within_80_columns() -> None:
    text = shown(status_table(STATUS, now=107))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert lines["ada"][1:] == ["running", "expert:sums", "5/10", "2.000", "100", "2", "s"]
    assert lines["bob"][1:4] == ["idle", "1", "done"]
    assert lines["(nobody)"][1:3] == ["open", "expert:songs"]
    assert lines["valley"][1:] == ["running", "experts", "1/3,", "this", "stage", "left:", "10", "s"]
    assert "1 running, 1 open, 1 done, 1 quarantined" in text
    assert "expert:lies of eve: module q_proj holds 3 values that are NaN" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_long_names_are_cut_and_numbers_are_not() -> None:
    events = [
        event("node", 100, "a-participant-with-a-very-long-name-indeed", state="joined"),
        event(
            *("step", 101, "a-participant-with-a-very-long-name-indeed", "unseeded:intent_recognition:round-1"),
            step=123456,
            steps=200000,
            loss=12.5,
            tokens=9_000_000,
            seconds=100.0,
        ),
    ]
    text = shown(status_table(fold_all(Status(), events), now=101))
    assert "123456/200000" in text
    assert "12.500" in text
    assert "90000" in text
    assert max(map(len, text.splitlines())) <= 80


def test_names_are_not_taken_for_markup() -> None:
    status = fold_all(Status(), [event("node", 1, "[red]ada[/red]", state="joined")])
    assert "[red]ada[/red]" in shown(status_table(status, now=1))
    assert "[red]ada[/red]" in shown(picture(status, now=1))


def test_the_picture_has_curves_arrivals_bytes_and_the_time_left() -> None:
    text = shown(picture(STATUS, now=107), 120)
    assert "█▄▂▁▁" in text
    assert re.search(r"arrived +expert:poems +abababababab +2\.0 MB +cosine 0\.25 +1 s ago", text)
    assert "left in this stage: 10 s" in text
    assert (
        len(shown(picture(fold_all(Status(), [event("node", n, f"n{n}") for n in range(100)]), lines=5)).splitlines())
        < 15
    )


def test_curves_of_text_are_means_of_their_shares() -> None:
    assert words.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert words.sparkline([0, 2, 6, 8], 2) == "▁█"
    assert words.sparkline([5.0], 8) == "▄"
    assert words.sparkline([], 8) == ""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "unknown"), (0, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "1 h 00 min"), (90_000, "1 d 1 h")],
)
def test_durations_are_said_as_people_say_them(seconds: float | None, said: str) -> None:
    assert words.duration(seconds) == said


def test_sizes_have_three_digits_at_most() -> None:
    assert [words.size(count) for count in (0, 999, 1000, 123_456, 2_500_000_000)] == [
        *("0 B", "999 B", "1.0 kB", "123 kB"),
        "2.5 GB",
    ]


def test_a_log_tells_everything_once() -> None:
    told: list[str] = []
    status = Status(name="valley")
    for one in [*EVENTS, event("failed", 200, reason="no quorum")]:
        following = fold_all(status, [one])
        told += changes(status, following)
        status = following
    assert told == [
        "experts 0/3",
        "ada joined with sums",
        "bob joined with poems",
        "expert:sums is trained by ada",
        *(f"expert:sums {n}/10, loss {10 / n:.3f}" for n in range(1, 6)),
        "expert:poems of bob has arrived in 6 s: abababababab, 2.0 MB",
        "experts 1/3",
        "expert:lies of eve is not used: module q_proj holds 3 values that are NaN, expected 0",
        "valley has failed: no quorum",
    ]
    assert changes(status, status) == []


def looks(*statuses: Status | Exception) -> Callable[[], Status]:
    left: Iterator[Status | Exception] = iter(statuses)

    def look() -> Status:
        value = next(left)
        if isinstance(value, Exception):
            raise value
        return value

    return look


ENDED = fold_all(STATUS, [event("finished", 300)])


@pytest.mark.parametrize("terminal", [True, False])
def test_watching_ends_when_the_federation_ends_and_survives_silence(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
    silence = EnvironmentFailure("nobody there")
    assert watch(looks(STATUS, silence, silence, ENDED), console, every=0.0) is ENDED
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "nobody there" in text
    assert ("\x1b[" in text) is terminal


def test_a_first_look_that_fails_is_an_error_and_so_is_a_long_silence() -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(EnvironmentFailure):
        watch(looks(EnvironmentFailure("nobody there")), console)
    with pytest.raises(EnvironmentFailure):
        watch(looks(STATUS, EnvironmentFailure("nobody there")), console, every=0.0, patience=-1.0)


def test_leaving_with_ctrl_c_is_quiet() -> None:
    def look() -> Status:
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return STATUS

    seen: list[int] = []
    assert watch(look, Console(file=io.StringIO()), every=0.0) is STATUS
    stop = threading.Event()
    stop.set()
    assert watch(looks(STATUS), Console(file=io.StringIO()), stop=stop) is STATUS


def test_status_as_json_is_json_and_the_same_from_afar(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in EVENTS))
    console = Console(file=io.StringIO(), width=20)
    status = show_status(RunReader(tmp_path).look, console, as_json=True)
    assert isinstance(console.file, io.StringIO)
    value = json.loads(console.file.getvalue())
    assert value["counts"] == {"open": 1, "running": 1, "done": 1, "quarantined": 1}
    asked: list[str] = []
    again = remote(lambda path: (asked.append(path), json.loads(json.dumps(to_json(status, 107))))[1])()
    assert asked == ["/status.json"]
    assert shown(status_table(again, now=107)) == shown(status_table(status, now=107))
    with pytest.raises(StorageError):
        RunReader(tmp_path / "nowhere")


SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (-?[0-9.e+-]+)')


def test_metrics_are_in_the_text_format_whatever_participants_are_called() -> None:
    odd = [event("job", 108, 'a"b\\c', 'job "x"\n', state="running", steps=5)]
    text = prometheus.exposition(fold_all(STATUS, odd), now=107)
    assert text.endswith("\n")
    kinds, values = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in kinds
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert match[1] in kinds
            values[match[1], match[2] or ""] = float(match[3])
    assert values["seedbed_jobs", 'state="done"'] == 1
    assert values["seedbed_federation_state", 'federation="valley",state="running"'] == 1
    assert values["seedbed_job_loss", 'job="expert:sums",node="ada"'] == 2
    assert values["seedbed_stage_units_done", 'stage="experts"'] == 1
    assert values["seedbed_job_step", r'job="job \"x\"",node="a\"b\\c"'] == 0
    assert values["seedbed_arrivals_total", ""] == 1
