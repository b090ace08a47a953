"""Whole federations through the command line, with real training processes under Flower's simulation engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from simulating import ledger, left_of, processes_of, wait_until

SMALL = (
    "tasks.experts=[addition, antonym]",
    "tasks.held_out=[word_problem]",
    "training.steps=4",
    "seed.steps=2",
    "evaluation.limit=20",
    "combine.candidates=[base, seed, experts, average, compressed, factor_mean, unseeded, joint]",
)


def command(out: Path, *options: str) -> list[str]:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    return [sys.executable, "-m", "seedbed.server.cli", "simulate", "embedded", "--out", str(out), *settings, *options]


def simulate(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *options), capture_output=True, text=True, timeout=500, stdin=subprocess.DEVNULL)


def digests(out: Path) -> dict[str, str]:
    results = json.loads((out / "results.json").read_text())
    return {name: candidate["digest"] for name, candidate in results["candidates"].items()}


def accuracies(out: Path) -> dict[str, dict[str, float]]:
    results = json.loads((out / "results.json").read_text())
    return {
        name: {task: score["value"] for task, score in candidate["tasks"].items()}
        for name, candidate in results["candidates"].items()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = simulate(out)
    assert done.returncode == 0, done.stderr
    assert "average" in done.stdout
    return out


def test_a_run_leaves_results_report_and_published_adapters(undisturbed: Path) -> None:
    for name in ("results.json", "report.md", "report.html", "config.yaml", "ledger.jsonl"):
        assert (undisturbed / name).stat().st_size > 0, name
    published = {entry.name for entry in (undisturbed / "adapters").iterdir()}
    assert published == {
        "seed",
        "expert-addition",
        "expert-antonym",
        "average",
        "compressed",
        "factor_mean",
        "unseeded",
        "joint",
    }
    assert not processes_of(undisturbed), "nothing is left running"


def test_results_hold_every_candidate_on_every_task(undisturbed: Path) -> None:
    results = json.loads((undisturbed / "results.json").read_text())
    own = results["candidates"].pop("experts:own")
    assert set(own["tasks"]) == {"addition", "antonym"}, "each task answered by its own expert"
    for name, candidate in results["candidates"].items():
        assert set(candidate["tasks"]) == {"addition", "antonym", "word_problem"}, name
        for task, score in candidate["tasks"].items():
            assert set(score) >= {"value", "metric", "n", "stderr", "held_in"}
            assert score["n"] == 20
            assert score["held_in"] == (task != "word_problem")
            assert 0 <= score["value"] <= 1


def test_the_published_average_gives_the_mean_of_the_experts_outputs(undisturbed: Path) -> None:
    """Logits of PeftModel with the average against a loop over experts, module by module, written independently."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from seedbed.common.embedded import MODEL_DIR

    tokens = AutoTokenizer.from_pretrained(MODEL_DIR)(
        ["Q: What is 3 plus 4?\nA: 7", "Q: What is the opposite of hot?\nA: cold"], return_tensors="pt", padding=True
    )
    experts = []
    for task in ("addition", "antonym"):
        directory = undisturbed / "adapters" / f"expert-{task}"
        config = json.loads((directory / "adapter_config.json").read_text())
        scaling = config["lora_alpha"] / config["r"]
        experts.append((scaling, load_file(directory / "adapter_model.safetensors")))
    reference = AutoModelForCausalLM.from_pretrained(MODEL_DIR).double()

    def hook(name: str) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
        def add_mean(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            for scaling, tensors in experts:
                A = tensors[f"base_model.model.{name}.lora_A.weight"].double()
                B = tensors[f"base_model.model.{name}.lora_B.weight"].double()
                output = output + scaling * (x @ A.T @ B.T) / len(experts)
            return output

        return add_mean

    adapted = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in experts[0][1]}
    assert len(adapted) > 10
    for name, module in reference.named_modules():
        if name in adapted:
            module.register_forward_hook(hook(name))
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(MODEL_DIR), str(undisturbed / "adapters" / "average")
    )
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    with torch.no_grad():
        expected = reference(**tokens).logits
        got = merged(**tokens).logits
        without = base(**tokens).logits
    mask = tokens["attention_mask"].bool()
    assert (got[mask] - without[mask]).abs().max() > 1e-2, "the average does something"
    assert (got[mask].double() - expected[mask]).abs().max() < 1e-5 * expected[mask].abs().max()


STAGES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "hello": lambda entry: entry["event"] == "hello",
    "seed": lambda entry: entry["event"] == "accepted" and entry["name"].startswith("seed:"),
    "experts": lambda entry: entry["event"] == "accepted" and entry["name"].startswith("expert:"),
    "references": lambda entry: entry["event"] == "accepted" and entry["name"].startswith(("unseeded:", "joint")),
    "combine": lambda entry: entry["event"] == "combined" and entry["name"] == "average",
    "evaluate": lambda entry: entry["event"] == "evaluated",
}


def test_killed_in_every_stage_a_run_resumes_to_the_same_result_and_redoes_nothing(
    undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for stage, reached in STAGES.items():
        process = subprocess.Popen(
            command(out, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        here = wait_until(lambda: any(map(reached, ledger(out))) or process.poll() is not None, 200)  # noqa: B023
        assert here, f"stage {stage} was not reached"
        assert process.poll() is None, (
            f"the run ended before stage {stage}: {process.stderr and process.stderr.read()!r}"
        )
        below = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        left = left_of(out, below)
        assert not left, f"killed in {stage}, something runs on: {left}"
    done = simulate(out, "--resume")
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(undisturbed)
    assert accuracies(out) == accuracies(undisturbed)
    entries = ledger(out)
    for event in ("accepted", "combined", "evaluated"):
        times = Counter(entry["key"] for entry in entries if entry["event"] == event)
        assert set(times.values()) == {1}, f"{event} twice: {times}"


def test_a_finished_run_resumes_in_no_time_and_asks_nobody(undisturbed: Path) -> None:
    before = len(ledger(undisturbed))
    done = simulate(undisturbed, "--resume")
    assert done.returncode == 0, done.stderr
    assert [entry["event"] for entry in ledger(undisturbed)[before:]] == ["resume"]


def test_ctrl_c_ends_a_run_at_once_with_a_word_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    assert wait_until(lambda: any(entry["event"] == "hello" for entry in ledger(out)), 200)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert not left_of(out, below)
