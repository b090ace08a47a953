"""`seedbed merge` as a user meets it: every form of it, what it says, and one sentence for everything it refuses."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from safetensors.torch import load_file, save_file

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import read_adapter, read_manifest, write_adapter
from seedbed.server.cli import main
from seedbed.server.merging import METHODS

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {Q: (128, 128), DOWN: (128, 352)}


def merge(*arguments: str, cwd: Path, columns: int = 200) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["seedbed", "merge", *arguments])
        patch.setenv("COLUMNS", str(columns))
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def write(path: Path, seed: int, modules: tuple[str, ...] = (Q, DOWN), base: str = "embedded") -> Path:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in modules:
        rows, columns = SHAPES[name]
        A, B = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
        found[name] = LoraFactors(A, B / 100, 1.0)
    write_adapter(path, Adapter(found), kind="expert", base=BaseIdentity(name=base))
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three experts, a seed, and an expert that lacks a module."""
    for index, name in enumerate(("a", "b", "c", "seed")):
        write(tmp_path / name, index)
    write(tmp_path / "small", 5, (Q,))
    return tmp_path


def test_one_line_says_what_was_made(place: Path) -> None:
    code, out, err = merge("a", "b", "--out", "new", cwd=place)
    assert (code, err) == (0, "")
    assert out == "average of 2 adapters: new (rank 4, 2 modules, float32)\n"
    assert merge("a", "b", "--out", "again", "--quiet", cwd=place) == (0, "", "")


def test_a_user_is_told_of_missing_modules_and_of_a_methods_catch(place: Path) -> None:
    _, out, err = merge("a", "small", "--out", "new", cwd=place)
    assert out.startswith("average of 2 adapters")
    assert err == f"Note: Modules that an adapter lacks are counted as zero: small lacks 1 module ({DOWN}) of 2.\n"
    _, _, err = merge("a", "b", "--method", "linear", "--out", "linear", cwd=place)
    assert METHODS["linear"].warning in err


def test_options_reach_the_method_and_the_manifest(place: Path) -> None:
    options = ("--opt", "density=0.5", "--opt", "majority_sign=frequency", "--rank", "3", "--weights", "1,3")
    code, out, err = merge("a", "b", "--method", "ties", *options, "--out", "new", cwd=place)
    assert code == 0, err
    assert "rank 3" in out
    settings = read_manifest(place / "new").settings
    assert settings["weights"] == [0.25, 0.75]
    assert settings["options"] | {"density": 0.5, "majority_sign": "frequency", "rank": 3} == settings["options"]


def test_the_seed_is_used_where_an_option_refers_to_it(place: Path) -> None:
    """``dW_seed + 3 · (mean − dW_seed)``."""
    code, _, err = merge("a", "b", "--opt", "task_scale=3", "--seed", "seed", "--out", "new", cwd=place)
    assert code == 0, err
    a, b, seed, new = (read_adapter(place / name)[0][Q].delta() for name in ("a", "b", "seed", "new"))
    assert torch.allclose(new, seed + 3 * ((a + b) / 2 - seed), atol=1e-5)
    manifest = read_manifest(place / "new")
    digests = [read_manifest(place / name).digest for name in ("a", "b", "seed")]
    assert list(manifest.parents) == digests
    assert manifest.settings["seed"] == digests[2]


def test_a_seed_that_cancels_is_said_to_be_unused(place: Path) -> None:
    code, _, err = merge("a", "b", "--seed", "seed", "--out", "new", cwd=place)
    assert code == 0
    assert "--seed is not used" in err
    assert len(read_manifest(place / "new").parents) == 2


@pytest.mark.parametrize(("given", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_the_result_has_the_dtype_that_was_asked_for(place: Path, given: str, dtype: torch.dtype) -> None:
    assert merge("a", "b", "--dtype", given, "--out", "new", cwd=place)[0] == 0
    adapter, manifest = read_adapter(place / "new")
    assert (adapter[Q].B.dtype, manifest.dtype, manifest.settings["dtype"]) == (dtype, given, given)


def test_halves_merged_into_float32_are_not_rounded_on_the_way(place: Path) -> None:
    for name in ("a", "b"):
        merge(name, "--dtype", "bfloat16", "--out", f"half-{name}", cwd=place)
    assert merge("half-a", "half-b", "--weights", "1,2", "--dtype", "float32", "--out", "new", cwd=place)[0] == 0
    a, b = (read_adapter(place / f"half-{name}")[0][Q].to(dtype=torch.float32).delta() for name in ("a", "b"))
    assert torch.allclose(read_adapter(place / "new")[0][Q].delta(), (a + 2 * b) / 3, atol=1e-6)


def test_an_average_is_changed_from_the_command_line(place: Path) -> None:
    merge("a", "b", "c", "--out", "all", cwd=place)
    merge("a", "c", "--out", "anew", cwd=place)
    code, out, err = merge("all", "--without", "b", "--out", "two", cwd=place)
    assert code == 0, err
    assert out == "average of 2 adapters, 1 taken out: two (rank 4, 2 modules, float32)\n"
    assert read_manifest(place / "two").parents == read_manifest(place / "anew").parents
    code, out, _ = merge("two", "--with", "b", "--with", "small", "--weights", "1,2", "--out", "more", cwd=place)
    assert out == "average of 4 adapters, 2 added: more (rank 8, 2 modules, float32)\n"
    assert read_manifest(place / "more").settings["weights"] == pytest.approx([0.2, 0.2, 0.2, 0.4])


def test_a_merge_is_folded_into_a_model_that_loads(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    code, out, err = merge("a", "b", "--fold", "embedded", "--out", "model", cwd=place)
    assert code == 0, err
    assert out == "average of 2 adapters folded into embedded: model (2 of 38 tensors changed, 4.0 MB)\n"
    AutoModelForCausalLM.from_pretrained(place / "model")


def test_the_list_names_every_method_with_its_options_and_fits(place: Path) -> None:
    code, out, _ = merge("--list", cwd=place, columns=100)
    assert code == 0
    assert max(map(cell_len, out.splitlines())) <= 100
    for name in METHODS:
        assert name in out
    for words in ("density=0.2", "OpenReview", "R = Σ r_i", "cost"):
        assert words in out
    code, out, _ = merge("--list", "--method", "ties", cwd=place, columns=100)
    assert code == 0
    assert "majority_sign" in out
    assert "iterative" not in out


def test_every_method_merges_from_the_command_line(place: Path) -> None:
    for name in METHODS:
        code, _, err = merge("a", "b", "--method", name, "--out", f"by-{name}", cwd=place)
        assert code == 0, f"{name}: {err}"
        assert set(read_adapter(place / f"by-{name}")[0]) == {Q, DOWN}


def _edit_tensors(path: Path, change: Any) -> None:
    (path / "seedbed.json").unlink()
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


def embedding(path: Path) -> None:
    _edit_tensors(path, lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9)}))


def dora(path: Path) -> None:
    (path / "seedbed.json").unlink()
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


def infinite(path: Path) -> None:
    _edit_tensors(path, lambda tensors: tensors[f"base_model.model.{Q}.lora_B.weight"][3].fill_(torch.inf))


REFUSED = {
    "no adapters": ([], 3, "merge needs adapters", "--list"),
    "no output": (["a"], 3, "merge needs --out"),
    "an unknown method": (["a", "b", "--method", "tise"], 3, "no merge method 'tise'", "Did you mean 'ties'"),
    "an unknown option": (["a", "--method", "ties", "--opt", "densty=1"], 3, "'densty'", "Did you mean 'density'"),
    "an option of no kind": (["a", "--method", "ties", "--opt", "density=much"], 3, "option 'density'", "much"),
    "an option without =": (["a", "--opt", "density"], 3, "'density' is not key=value", "density=0.3"),
    "an option given twice": (["a", "--opt", "x=1", "--opt", "x=2"], 3, "x is given twice"),
    "an option that is no YAML": (["a", "--opt", "x=[1"], 3, "not YAML"),
    "a retention above 1": (["a", "b", "--method", "iterative", "--opt", "retention=1.5"], 3, "'retention'", "1.5"),
    "a retention of 0": (["a", "b", "--method", "iterative", "--opt", "retention=0"], 3, "'retention'", "got 0"),
    "a rank given twice": (["a", "--method", "svd", "--rank", "1", "--opt", "rank=1"], 3, "given twice"),
    "a rank of none": (["a", "b", "--rank", "2"], 3, "does not take a rank"),
    "a rank too large": (["a", "b", "--method", "ties", "--rank", "129"], 3, "from 1 to 128", "got 129"),
    "a rank too large, written as 9.0": (["a", "b", "--method", "ties", "--opt", "rank=129.0"], 3, "from 1 to 128"),
    "a date that there is not": (["a", "--opt", "task_scale=2024-13-01"], 3, "not YAML"),
    "weights beyond all numbers": (["a", "b", "--weights", "1e308,1e308"], 3, "too large to be added"),
    "a missing seed": (["a", "b", "--opt", "task_scale=2"], 3, "task_scale 2 needs the seed", "--seed"),
    "a missing seed to include": (["a", "--opt", "include_seed=true"], 3, "include_seed needs the seed"),
    "a seed for nothing": (["a", "--method", "ties", "--seed", "seed"], 3, "'ties' uses no seed"),
    "a negative weight": (["a", "b", "--weights", "1,-1"], 3, "weight -1.0 is negative"),
    "no weight above zero": (["a", "b", "--weights", "0,0"], 3, "all weights are zero"),
    "a weight too few": (["a", "b", "--weights", "1"], 3, "expected 2 weights"),
    "weights of words": (["a", "b", "--weights", "1,x"], 3, "'1,x' are not numbers"),
    "weights where none are taken": (["a", "b", "--method", "tsv_m", "--weights", "1,2"], 3, "takes no weights"),
    "an unknown dtype": (["a", "b", "--dtype", "float23"], 3, "no dtype 'float23'", "Did you mean 'float32'"),
    "an unknown base model": (["a", "--fold", "no/where"], 6, "'no/where' is neither"),
    "a dtype for a folded model": (["a", "--fold", "embedded", "--dtype", "float16"], 3, "--dtype is not for --fold"),
    "two averages to change": (["a", "b", "--without", "a"], 3, "change one average, got 2"),
    "a method for a change": (["a", "--without", "a", "--method", "svd"], 3, "--method does not go with"),
    "a fold of a change": (["a", "--with", "a", "--fold", "embedded"], 3, "--fold does not go with"),
    "weights of who stays": (["a", "--without", "a", "--weights", "1"], 3, "nothing to weigh"),
    "a change of no average": (["a", "--without", "b"], 5, "is not an exact average"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(place: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, code, *words = REFUSED[case]
    before = sorted(place.rglob("*"))
    out = [] if case == "no output" else ["--out", "new"]
    assert_refused(merge(*arguments, *out, cwd=place), code, *words)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (embedding, ("embed_tokens.lora_embedding_A is not a LoRA factor", "no embeddings")),
        (dora, ("is a DoRA adapter",)),
        (infinite, (f"a: module {Q}: lora_B holds 2 values that are NaN or infinite",)),
    ],
)
@pytest.mark.parametrize("form", [("b", "a"), ("a", "--method", "svd"), ("a", "--fold", "embedded")])
def test_a_bad_adapter_is_refused_in_every_form(
    place: Path, damage: Any, words: tuple[str, ...], form: tuple[str, ...]
) -> None:
    damage(place / "a")
    before = sorted(place.rglob("*"))
    assert_refused(merge(*form, "--out", "new", cwd=place), 5, *words)
    assert sorted(place.rglob("*")) == before


def test_adapters_of_different_base_models_are_refused(place: Path) -> None:
    write(place / "foreign", 7, base="other")
    merge("a", "b", "--out", "average", cwd=place)
    for form in (("a", "foreign"), ("average", "--with", "foreign"), ("a", "--seed", "foreign")):
        assert_refused(merge(*form, "--out", "new", cwd=place), 5, "expected embedded, got other")
    assert not (place / "new").exists()


def test_an_output_that_is_there_is_refused_before_anything_is_done(place: Path) -> None:
    merge("a", "b", "--out", "average", cwd=place)
    before = sorted(place.rglob("*"))
    for form in (("a", "b"), ("average", "--without", "a"), ("a", "--fold", "embedded")):
        assert_refused(merge(*form, "--out", "c", cwd=place), 7, "c is already there")
    assert sorted(place.rglob("*")) == before


def assert_refused(outcome: tuple[int, str, str], code: int, *words: str) -> None:
    """One sentence and a next step, on the error stream."""
    got, out, err = outcome
    assert (got, out) == (code, ""), err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) <= 2
    for word in words:
        assert word in err, err
