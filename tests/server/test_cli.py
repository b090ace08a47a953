"""Bad input ends in one clear sentence, an exit code of its kind, and nothing half-written."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from seedbed.common import basemodel
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.config import BaseModelConfig
from seedbed.common.embedded import MODEL_DIR
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import write_adapter
from seedbed.server.cli import main
from seedbed.server.cli.console import command_line


@dataclass
class Outcome:
    returncode: int
    stdout: str
    stderr: str


def seedbed(*arguments: str, cwd: Path) -> Outcome:
    """Run the command line in this process, as the console script does: a process of its own costs seconds of imports."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["seedbed", *arguments])
        patch.setenv("COLUMNS", "200")
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def in_a_process(script: str, *arguments: str, cwd: Path, **environment: str) -> Outcome:
    """Run a script that calls the command line, where a test changes what cannot be changed back."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        stdin=subprocess.DEVNULL,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def assert_refused(outcome: Outcome, code: int, *words: str) -> None:
    assert outcome.returncode == code, outcome.stderr
    assert "Traceback" not in outcome.stderr + outcome.stdout
    first, *rest = outcome.stderr.strip().splitlines()
    assert first.startswith("error: ")
    assert len(rest) <= 2, "one sentence and a next step"
    for word in words:
        assert word in outcome.stderr, outcome.stderr


def jsonl(path: Path, *lines: Any) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


GOOD = {"instruction": "", "prompt": "1 plus 1?", "choices": ["2", "3"], "label": 0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two tasks, `a` with training data and `z` without."""
    directory = tmp_path / "data"
    directory.mkdir()
    for name in ("a.train", "a.test", "z.test"):
        jsonl(directory / f"{name}.jsonl", GOOD, GOOD)
    return directory


def simulate(data: Path, *settings: str) -> Outcome:
    options = ["tasks.experts=[a]", "tasks.held_out=[z]", *settings]
    return seedbed(
        "simulate", "embedded", "--data", str(data), *[part for o in options for part in ("--set", o)], cwd=data.parent
    )


def assert_nothing_written(data: Path) -> None:
    assert not (data.parent / "runs").exists()


def test_help_reads_well_and_lists_every_verb(tmp_path: Path) -> None:
    outcome = seedbed("--help", cwd=tmp_path)
    assert outcome.returncode == 0
    for verb in ("simulate", "merge", "inspect", "ablate", "evaluate", "report", "model"):
        assert verb in outcome.stdout
    for verb in (["simulate"], ["merge"], ["inspect"], ["ablate"], ["evaluate"], ["report"], ["model", "fetch"]):
        assert "--quiet" in seedbed(*verb, "--help", cwd=tmp_path).stdout


def test_an_unknown_config_key_names_the_nearest(data: Path) -> None:
    assert_refused(simulate(data, "training.step=3"), 3, "unknown key 'training.step'", "'steps'")
    assert_nothing_written(data)


def test_an_unknown_preset_names_the_nearest(tmp_path: Path) -> None:
    assert_refused(seedbed("simulate", "smolm2", cwd=tmp_path), 3, "'smolm2'", "smollm2")


def test_a_missing_data_file_is_named(data: Path) -> None:
    (data / "z.test.jsonl").unlink()
    assert_refused(simulate(data), 4, "z.test.jsonl")
    assert_nothing_written(data)


def test_a_missing_data_directory_is_named(tmp_path: Path) -> None:
    outcome = simulate(tmp_path / "nowhere")
    assert_refused(outcome, 4, "nowhere")


def test_real_tasks_without_data_ask_for_it(tmp_path: Path) -> None:
    assert_refused(seedbed("simulate", "smollm2", cwd=tmp_path), 3, "--data")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((GOOD, '{"prompt": "x", "choices": ["a", "b"], "label"\n'), ("line 2",)),
        ((GOOD, GOOD, {**GOOD, "label": 2}), ("line 3", "label")),
        ((GOOD, {**GOOD, "label": -1}), ("line 2", "label")),
        ((GOOD, {**GOOD, "choices": ["only"]}), ("line 2", "choices")),
        ((GOOD, {"question": "x"}), ("line 2",)),
        ((), ("no examples",)),
    ],
    ids=["malformed JSON", "label too large", "negative label", "one choice", "unknown shape", "empty task"],
)
def test_bad_task_data_is_refused_with_its_line(data: Path, lines: tuple[Any, ...], words: tuple[str, ...]) -> None:
    jsonl(data / "a.train.jsonl", *lines)
    assert_refused(simulate(data), 4, "a.train.jsonl", *words)
    assert_nothing_written(data)


def test_a_test_file_without_choices_cannot_be_scored(data: Path) -> None:
    jsonl(data / "z.test.jsonl", {"prompt": "x", "completion": "y"})
    assert_refused(simulate(data), 4, "z.test.jsonl", "choices")
    assert_nothing_written(data)


def test_resuming_with_a_changed_config_shows_what_changed(data: Path) -> None:
    run = data.parent / "runs" / "demo"
    run.mkdir(parents=True)
    from seedbed.common.config_file import dump_config, load_config

    overrides = [f"tasks.data={data}", "tasks.experts=[a]", "tasks.held_out=[z]"]
    (run / "config.yaml").write_text(dump_config(load_config("embedded", [*overrides, "training.steps=7"])))
    (run / "inputs.json").write_text("{}")
    outcome = seedbed(
        "simulate", "embedded", "--resume", *[part for o in overrides for part in ("--set", o)], cwd=data.parent
    )
    assert_refused(outcome, 10, "training.steps was 7")


def test_an_existing_run_is_not_overwritten(data: Path) -> None:
    run = data.parent / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "precious").write_text("x")
    assert_refused(simulate(data), 7, "already exists", "--resume")
    assert [entry.name for entry in run.iterdir()] == ["precious"]


def test_a_place_that_cannot_be_a_directory_is_refused(data: Path) -> None:
    (data.parent / "file").write_text("x")
    outcome = seedbed(
        "simulate",
        *("embedded", "--data", str(data), "--set", "tasks.experts=[a]", "--set", "tasks.held_out=[z]"),
        *("--out", str(data.parent / "file" / "run")),
        cwd=data.parent,
    )
    assert_refused(outcome, 7, "file")


def test_ray_that_cannot_start_is_one_sentence(data: Path) -> None:
    """Ray reads resources from the environment; unreadable ones stand for any failure to start."""
    settings = ("--set", "tasks.experts=[a]", "--set", "tasks.held_out=[z]", "--quiet")
    outcome = in_a_process(
        "import sys; from seedbed.server.cli import main; sys.argv[0] = 'seedbed'; main()",
        *("simulate", "embedded", "--data", str(data), *settings),
        cwd=data.parent,
        RAY_OVERRIDE_RESOURCES="not JSON",
    )
    assert_refused(outcome, 11, "simulation engine", "--resume")


def test_a_dry_run_prints_the_plan_and_writes_nothing(data: Path) -> None:
    plan = seedbed(
        "simulate",
        *("embedded", "--dry-run", "--data", str(data), "--set", "tasks.experts=[a]", "--set", "tasks.held_out=[z]"),
        *("--set", "training.steps=7", "--set", "seed.steps=3", "--out", "elsewhere"),
        cwd=data.parent,
    )
    assert plan.returncode == 0, plan.stderr
    for word in ("experts", "joint", "steps", "rank 8"):
        assert word in plan.stdout
    assert not (data.parent / "elsewhere").exists()


# -- merge ---------------------------------------------------------------------------------------------------


def adapter(rank: int = 2, rows: int = 4, fill: float = 1.0) -> Adapter:
    return Adapter({"layer": LoraFactors(torch.full((rank, 3), fill), torch.full((rows, rank), fill), 1.0)})


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    for name, fill in (("one", 1.0), ("two", 3.0)):
        write_adapter(
            tmp_path / name, adapter(fill=fill), kind="expert", base=BaseIdentity(name="tiny", digest="1" * 64)
        )
    return tmp_path / "one", tmp_path / "two"


def merge(pair: tuple[Path, Path], *options: str) -> Outcome:
    return seedbed("merge", *map(str, pair), "--out", "merged", *options, cwd=pair[0].parent)


def assert_not_merged(pair: tuple[Path, Path]) -> None:
    left = {entry.name for entry in pair[0].parent.iterdir()}
    assert not {name for name in left if "merged" in name or name.startswith(".tmp")}


def test_merge_writes_the_mean_as_one_adapter(pair: tuple[Path, Path]) -> None:
    from seedbed.common.storage import read_adapter

    outcome = merge(pair)
    assert outcome.returncode == 0, outcome.stderr
    merged, manifest = read_adapter(pair[0].parent / "merged")
    assert merged["layer"].rank == 4
    assert torch.allclose(merged["layer"].delta(), torch.full((4, 3), (2 * 1.0 + 2 * 9.0) / 2))
    assert len(manifest.parents) == 2
    again = seedbed("merge", *map(str, pair), "--out", "svd", "--method", "svd", "--rank", "1", cwd=pair[0].parent)
    assert again.returncode == 0, again.stderr
    assert read_adapter(pair[0].parent / "svd")[0]["layer"].rank == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "avrage"), ("avrage", "average")),
        (("--weights", "1"), ("weight",)),
        (("--weights", "1,x"), ("1,x",)),
        (("--weights", "1,-1"), ("weight",)),
        (("--weights", "0,0"), ("weight",)),
        (("--weights", "nan,1"), ("weight",)),
        (("--method", "average", "--rank", "2"), ("rank",)),
    ],
)
def test_merge_refuses_options_that_make_no_sense(
    pair: tuple[Path, Path], options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    outcome = merge(pair, *options)
    assert outcome.returncode not in (0, 1, 2), outcome.stderr
    assert_refused(outcome, outcome.returncode, *words)
    assert_not_merged(pair)


def test_merge_refuses_an_existing_output(pair: tuple[Path, Path]) -> None:
    (pair[0].parent / "merged").mkdir()
    assert_refused(merge(pair), 7, "merged")


def break_other_base(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    write_adapter(path, adapter(), kind="expert", base=BaseIdentity(name="big", digest="2" * 64))


def break_truncated(path: Path) -> None:
    (path / "seedbed.json").unlink()
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def break_pickle(path: Path) -> None:
    for name in ("adapter_model.safetensors", "seedbed.json"):
        (path / name).unlink()
    torch.save({}, path / "adapter_model.bin")


def _rewrite(path: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    (path / "seedbed.json").unlink()
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


def break_missing_tensor(path: Path) -> None:
    _rewrite(path, lambda tensors: tensors.pop("base_model.model.layer.lora_B.weight"))


def break_shape(path: Path) -> None:
    _rewrite(path, lambda t: t.update({"base_model.model.layer.lora_B.weight": torch.ones(4, 5)}))


def break_rank(path: Path) -> None:
    _rewrite(
        path,
        lambda t: t.update(
            {
                "base_model.model.layer.lora_B.weight": torch.ones(4, 5),
                "base_model.model.layer.lora_A.weight": torch.ones(5, 3),
            }
        ),
    )


def break_nan(path: Path) -> None:
    _rewrite(path, lambda t: t["base_model.model.layer.lora_A.weight"].fill_(float("nan")))


def break_other_shape(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    write_adapter(path, adapter(rows=5), kind="expert", base=BaseIdentity(name="tiny", digest="1" * 64))


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (break_other_base, ("tiny", "big")),
        (break_truncated, ("two",)),
        (break_pickle, ("pickle",)),
        (break_missing_tensor, ("layer", "lora_B")),
        (break_shape, ("layer",)),
        (break_rank, ("layer", "rank")),
        (break_nan, ("layer", "NaN")),
        (break_other_shape, ("layer",)),
    ],
)
def test_merge_refuses_a_bad_adapter_and_writes_nothing(
    pair: tuple[Path, Path], breakage: Any, words: tuple[str, ...]
) -> None:
    breakage(pair[1])
    assert_refused(merge(pair), 5, *words)
    assert_not_merged(pair)


def test_a_factor_mean_of_different_ranks_is_refused(pair: tuple[Path, Path]) -> None:
    write_adapter(
        pair[0].parent / "three", adapter(rank=1), kind="expert", base=BaseIdentity(name="tiny", digest="1" * 64)
    )
    outcome = merge((pair[0], pair[0].parent / "three"), "--method", "factor_mean")
    assert_refused(outcome, 5, "layer", "rank")
    assert_not_merged(pair)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(data: Path) -> None:
    """RLIMIT_FSIZE stands for a full disk: the kernel refuses the write in the same place."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200));"
        "from seedbed.server.cli import main; sys.argv = ['seedbed', *sys.argv[1:]]; main()"
    )
    # Or Python would keep its compiled modules of 200 bytes, too.
    environment = {"PYTHONDONTWRITEBYTECODE": "1"}
    outcome = in_a_process(script, "merge", "a", "b", "--out", "merged", cwd=_two_adapters(data.parent), **environment)
    assert_refused(outcome, 7, "cannot write")
    assert {entry.name for entry in (data.parent / "pair").iterdir()} == {"a", "b"}


def _two_adapters(root: Path) -> Path:
    for name in ("a", "b"):
        write_adapter(root / "pair" / name, adapter(), kind="expert", base=BaseIdentity(name="tiny", digest="1" * 64))
    return root / "pair"


# -- evaluate and report -------------------------------------------------------------------------------------


def test_evaluate_prints_a_table_and_writes_json(data: Path) -> None:
    outcome = seedbed(
        "evaluate", "embedded", "--tasks", str(data / "a.test.jsonl"), "--json", "scores.json", cwd=data.parent
    )
    assert outcome.returncode == 0, outcome.stderr
    scores = json.loads((data.parent / "scores.json").read_text())
    (result,) = scores["tasks"].values()
    assert result["n"] == 2
    assert result["value"] in (0.0, 1.0), "two equal questions"


def test_evaluate_refuses_an_adapter_of_another_base_model(data: Path) -> None:
    write_adapter(data.parent / "alien", adapter(), kind="expert", base=BaseIdentity(name="big", digest="2" * 64))
    outcome = seedbed(
        "evaluate", "embedded", "--adapter", "alien", "--tasks", str(data / "a.test.jsonl"), cwd=data.parent
    )
    assert_refused(outcome, 5, "big", "embedded")


def test_evaluate_refuses_an_adapter_whose_modules_the_model_lacks(data: Path) -> None:
    base = basemodel.identify(basemodel.resolve(BaseModelConfig()), "embedded")
    write_adapter(data.parent / "misfit", adapter(), kind="expert", base=base)
    outcome = seedbed(
        "evaluate", str(MODEL_DIR), "--adapter", "misfit", "--tasks", str(data / "a.test.jsonl"), cwd=data.parent
    )
    assert_refused(outcome, 5, "layer")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("evaluate", "embedded", "--tasks", "nothing.jsonl"), 4, ("nothing.jsonl",)),
        (("evaluate", "nowhere/model", "--tasks", "x.jsonl"), 6, ("nowhere/model",)),
        (("report", "nowhere"), 4, ("nowhere",)),
        (("model", "fetch", "smolm2"), 3, ("smollm2",)),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    jsonl(tmp_path / "x.jsonl", GOOD)
    assert_refused(seedbed(*arguments, cwd=tmp_path), code, *words)


@pytest.mark.parametrize("verb", ["status", "watch"])
def test_a_directory_that_holds_no_run_is_not_taken_for_a_host(tmp_path: Path, verb: str) -> None:
    (tmp_path / "there").mkdir()
    assert_refused(seedbed(verb, "there", cwd=tmp_path), 3, "there is no run directory", "config.yaml")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("join", "127.0.0.1:1", "--wait", "nan"), "--wait"),
        (("join", "127.0.0.1:1", "--checkpoint-seconds", "inf"), "--checkpoint-seconds"),
        (("coordinator", "embedded", "--linger", "nan"), "--linger"),
        (("coordinator", "embedded", "--port", "65536"), "--port"),
        (("coordinator", "embedded", "--registry-port", "70000"), "--registry-port"),
    ],
)
def test_numbers_that_are_none_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: tuple[str, ...], word: str
) -> None:
    outcome = seedbed(*arguments, cwd=tmp_path)
    assert outcome.returncode == 2
    assert word in outcome.stderr
    assert not list(tmp_path.iterdir())


def test_an_infinite_setting_is_refused(tmp_path: Path) -> None:
    outcome = seedbed("simulate", "embedded", "--set", "training.learning_rate=.inf", cwd=tmp_path)
    assert_refused(outcome, 3, "training.learning_rate", "finite")


def test_a_report_holds_the_command_as_it_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["seedbed", "simulate", "--set", "combine.candidates=[base, average]"])
    assert command_line() == "seedbed simulate --set 'combine.candidates=[base, average]'"


def test_scores_can_be_written_as_lm_eval_writes_them(tmp_path: Path) -> None:
    task = tmp_path / "mine.test.jsonl"
    task.write_text('{"prompt": "What is 2 plus 3?", "choices": ["5", "6"], "label": 0}\n')
    outcome = seedbed("evaluate", "embedded", "--tasks", str(task), "--lm-eval", "out", "-q", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    assert outcome.stdout.strip() == str(path.relative_to(tmp_path))
    (samples,) = json.loads(path.read_text())["n-samples"].values()
    assert samples["effective"] == 1
