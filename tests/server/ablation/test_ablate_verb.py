"""`seedbed ablate` as a command: what it prints before, what it refuses, and a whole small ablation, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from simulating import ledger, left_of

from seedbed.server.ablation.forecast import forecast
from seedbed.server.ablation.plan import load_plan

SMALL: dict[str, Any] = {
    "name": "small",
    "config": "embedded",
    "set": [
        "tasks.experts=[addition, antonym]",
        "tasks.held_out=[word_problem]",
        "training.steps=3",
        "seed.steps=2",
        "evaluation.limit=10",
        "combine.candidates=[base, experts, average]",
    ],
    "full": "average",
    "rows": [
        {"part": "seed_expert", "action": "remove"},
        {"part": "routing", "action": "replace", "with": ["uniform", "oracle", "joint"]},
        {"part": ["of", "kl_loss", "norm_loss"], "action": "replace", "with": [["tuned", 0, 0]], "label": "untuned"},
        {"part": "task_scale", "action": "replace", "with": [1.0]},
    ],
}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "seedbed.server.cli", "ablate", *arguments]


def ablate(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=500, stdin=subprocess.DEVNULL, cwd=cwd
    )


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(plan: Path, tmp_path: Path) -> None:
    done = ablate(str(plan), "--seeds", "2", "--dry-run", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    # Seed, seeded and unseeded experts of two tasks, and the joint adapter, twice; the untuned experts are plain ones.
    assert "7 cells in 3 configurations, 2 random seeds: 14 distinct trainings instead of 54 cell by cell" in told
    assert "options.task_scale=1.0 (as full)" in told
    assert "by a rule of thumb" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence", "step"),
    [
        (("seeded-lore",), 3, "there is no plan and no file named 'seeded-lore'", "Did you mean 'seeded-lora'?"),
        (("controls", "--dry-run", "--set", "seed.fracton=1"), 3, "unknown key 'seed.fracton'", "'fraction'"),
        (("controls", "--dry-run", "--set", "training.steps"), 3, "not of the form key.path=value", "training.steps"),
        (("controls", "--dry-run", "--set", "tasks.experts=[addition]"), 3, "row 'number of experts'", "not above"),
        (("controls", "--set", "base.model=/nowhere"), 6, "/nowhere", ""),
    ],
)
def test_a_refusal_is_a_sentence_with_a_next_step(
    arguments: tuple[str, ...], code: int, sentence: str, step: str, tmp_path: Path
) -> None:
    done = ablate(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr
    assert step in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is written"


def kill_when(out: Path, arguments: list[str], reached: Callable[[dict[str, Any]], bool]) -> None:
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    end = time.monotonic() + 300
    while not any(map(reached, ledger(out))):
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < end
        time.sleep(0.02)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not left_of(out, below), "something runs on"


def test_killed_and_resumed_it_trains_and_measures_everything_exactly_once(plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(plan), "--out", str(out), "--resume", "-q"]
    kill_when(out, arguments, lambda entry: entry["event"] == "accepted" and entry["name"].startswith("expert"))
    kill_when(out, arguments, lambda entry: entry["event"] == "evaluated")
    done = ablate(*arguments)
    assert done.returncode == 0, done.stderr
    assert "routing: joint" in done.stdout
    entries = ledger(out)
    before = forecast(load_plan(str(plan)), [0])
    for event, count in (("accepted", before.distinct), ("evaluated", before.scores)):
        times = Counter(entry["key"] for entry in entries if entry["event"] == event and "general" not in entry["name"])
        assert set(times.values()) == {1}, f"{event} twice"
        assert len(times) == count, f"as many {event} as the dry run counts"
    results = json.loads((out / "ablation.json").read_text())
    assert len(results["cells"]) == 7
    assert all(not cell["failures"] for cell in results["cells"].values())
    digests = {name: cell["digests"]["0"] for name, cell in results["cells"].items()}
    assert digests["of=tuned,routing_tuning.kl_weight=0,routing_tuning.norm_weight=0"] == digests["full"]
    assert digests["candidate=oracle"] is None
    assert (out / "report.html").stat().st_size > 10_000

    again = ablate(*arguments)
    assert again.stdout == done.stdout, "the same numbers"
    assert [entry["event"] for entry in ledger(out)[len(entries) :]] == ["resume", "finished"]
    after = forecast(load_plan(str(plan)), [0], out)
    assert (after.cached, after.scores_cached) == (after.distinct, after.scores) == (before.distinct, before.scores)

    other = ablate(*arguments, "--set", "training.steps=4")
    assert other.returncode == 10
    assert "then training.steps=4 was not set" in other.stderr
    report = subprocess.run(
        [sys.executable, "-m", "seedbed.server.cli", "report", str(out)], capture_output=True, text=True
    )
    assert "routing: joint" in report.stdout
    assert os.path.getsize(out / "report.md") > 100


def test_own_tasks_over_the_embedded_model_are_tuned_and_measured_and_a_cell_that_diverges_is_told(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    for name, ending in (("mine", "yes"), ("yours", "no")):
        line = json.dumps({"prompt": f"{name}?", "choices": ["yes", "no"], "label": int(ending == "no")}) + "\n"
        for split in ("train", "test"):
            data.mkdir(exist_ok=True)
            (data / f"{name}.{split}.jsonl").write_text(line * 12)
    own = {
        **SMALL,
        "set": ["tasks.experts=[mine, yours]", "tasks.held_out=[]", "training.steps=2", "seed.steps=1"],
        "full": "average_tuned",
        "rows": [{"part": "training.learning_rate", "action": "replace", "with": ["1e30"], "label": "rate"}],
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(own))
    out, scores = tmp_path / "out", tmp_path / "scores"
    arguments = (str(path), "--data", str(data), "--out", str(out), "--lm-eval", str(scores), "--quiet")
    done = ablate(*arguments, "--set", "run.random_seed=7", cwd=tmp_path)
    assert done.returncode == 8, done.stderr
    assert "1 of 2 runs of cells failed" in done.stderr
    assert "Failed: rate: 1e30, random seed 7:" in " ".join(done.stdout.split())
    results = json.loads((out / "ablation.json").read_text())
    assert {"kl", "perplexity"} <= set(results["cells"]["full"]["means"]), "measured on the embedded model's own text"
    (document,) = (json.loads(file.read_text()) for file in scores.rglob("results_*.json"))
    assert document["model_name"] == "full.seed-7"
    assert document["n-samples"]["mine"] == {"original": 12, "effective": 12}
