"""A hundred participants on one machine: everybody is heard, and what is kept grows as they do, not faster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1800)
SETTINGS = (
    "name=many",
    "tasks.held_out=[]",
    "lora.rank=1",
    "lora.targets=[q_proj]",
    "seed.mode=none",
    "training.steps=1",
    "training.batch_size=1",
    "training.warmup_steps=0",
    "evaluation.limit=1",
    "evaluation.drift=false",
    "combine.candidates=[base, average]",
    "run.workers=2",
)


def federation(root: Path, clients: int) -> Path:
    """A federation of so many clients, each with one example of its own task."""
    data = root / "data"
    data.mkdir(parents=True)
    names = [f"task{number:03}" for number in range(clients)]
    for number, name in enumerate(names):
        example = json.dumps({"prompt": f"What is {number}?", "choices": [str(number), str(number + 1)], "label": 0})
        for part in ("train", "test"):
            (data / f"{name}.{part}.jsonl").write_text(example + "\n", encoding="utf-8")
    settings = (*SETTINGS, f"tasks.experts=[{', '.join(names)}]")
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "seedbed.server.cli", "simulate", "embedded", "--data", str(data)]
    out = root / "run"
    done = subprocess.run(
        [*command, "--out", str(out), *options, "-q"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return out


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("many")
    return {clients: federation(root / str(clients), clients) for clients in (10, 100)}


def test_a_hundred_clients_complete_and_every_expert_is_accepted(runs: dict[int, Path]) -> None:
    entries = [json.loads(line) for line in (runs[100] / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(entry["event"] == "accepted" for entry in entries) == 100
    assert not [entry for entry in entries if entry["event"] == "quarantined"]
    assert entries[-1]["event"] == "finished"


def test_ledger_and_store_grow_linearly_with_the_clients(runs: dict[int, Path]) -> None:
    for part in ("ledger.jsonl", "store"):
        small, large = (
            (run / part).stat().st_size if part.endswith("l") else size(run / part) for run in runs.values()
        )
        assert large < 11 * small, part
