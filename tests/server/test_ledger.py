"""The ledger believes whole lines and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from seedbed.common.errors import ResumeError, StorageError
from seedbed.common.jobs import JobResult
from seedbed.server.ledger import Entry, Ledger


def result(name: str) -> JobResult:
    return JobResult(node="n", name=name, recipe=f"recipe-{name}", digest=f"digest-{name}", seconds=2.0)


def test_what_was_accepted_is_found_again_after_reopening(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.accept(result("a"), {"steps": 3})
    again = Ledger(tmp_path / "ledger.jsonl")
    entry = again.accepted("recipe-a")
    assert entry is not None
    assert (entry.digest, entry.seconds, entry.detail) == ("digest-a", 2.0, {"steps": 3})
    assert again.accepted("recipe-b") is None


def test_a_line_cut_short_by_a_crash_is_dropped_and_the_next_one_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.accept(result("a"), {})
    ledger.accept(result("b"), {})
    path.write_bytes(path.read_bytes()[:-5])
    again = Ledger(path)
    assert again.accepted("recipe-a") is not None
    assert again.accepted("recipe-b") is None
    again.accept(result("c"), {})
    assert [entry.name for entry in Ledger(path).entries] == ["a", "c"]


def test_damage_before_the_last_line_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"event": "start"}\n{"event": "sta\n{"event": "start"}\n')
    with pytest.raises(ResumeError, match="line 2"):
        Ledger(path)


def test_a_quarantine_is_not_an_acceptance(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.quarantine("node", "expert:a", "NaN")
    ledger.append(Entry(event="combined", key="k", digest="d"))
    assert ledger.accepted("k") is None
    assert ledger.accepted("k", "combined") is not None
    assert [entry.reason for entry in ledger.of("quarantined")] == ["NaN"]


def test_a_disk_that_is_full_in_the_middle_of_a_line_leaves_the_ledger_whole(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append(Entry(event="start", name="demo"))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))  # room for a part of the next line
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            ledger.append(Entry(event="accepted", name="expert:addition", key="k"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    ledger.append(Entry(event="failed", reason="the disk was full"))
    assert [entry.event for entry in Ledger(path).entries] == ["start", "failed"]
