"""A run directory that cannot be used is refused with a sentence, whatever is wrong with it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from village import BASE, Village, config, open_run

from seedbed.common.errors import ResumeError, StorageError
from seedbed.server.plan import Planner


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("inputs.json", "{"),
        ("inputs.json", "7"),
        ("inputs.json", None),
        ("config.yaml", "run: [1, 2"),
        ("config.yaml", "\x00"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str | None) -> None:
    open_run(tmp_path / "run", config(), resume=True).close()
    if content is None:
        (tmp_path / "run" / file).unlink()
    else:
        (tmp_path / "run" / file).write_text(content)
    with pytest.raises(ResumeError, match=r"config\.yaml or inputs\.json .* cannot be read"):
        open_run(tmp_path / "run", config(), resume=True)


def test_two_at_a_time_are_refused_and_one_after_the_other_are_not(tmp_path: Path) -> None:
    first = open_run(tmp_path / "run", config(), resume=True)
    with pytest.raises(ResumeError, match="another process is at work"):
        open_run(tmp_path / "run", config(), resume=True)
    first.close()
    open_run(tmp_path / "run", config(), resume=True).close()


def test_a_full_disk_when_an_adapter_is_published_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(tmp_path / "run", config(), resume=True)
    (job, *_) = Planner(run.config, BASE).experts(None, ["a"])
    made = Village(run.root / "store")._train(job)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="no space is left"):
        run.publish("expert:a", made.digest)
    assert list(run.adapters.iterdir()) == [], "nothing half-written is left"
    monkeypatch.undo()
    run.publish("expert:a", made.digest)
    assert (run.adapters / "expert-a" / "adapter_config.json").is_file()
