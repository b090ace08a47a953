"""`seedbed inspect` as a user meets it: tables that fit a terminal, JSON in full, pictures, and refusals."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import read_manifest, write_adapter
from seedbed.server.cli import main

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def inspect(*arguments: str, cwd: Path, columns: int = 80) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["seedbed", "inspect", *arguments])
        patch.setenv("COLUMNS", str(columns))
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def write(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    names = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in KINDS]
    modules = {name: LoraFactors(torch.randn(4, 20), torch.randn(24, 4), 2.0) for name in names}
    base = BaseIdentity(name="HuggingFaceTB/SmolLM2-135M-Instruct", digest="a" * 64)
    write_adapter(path, Adapter(modules), kind="expert", base=base, parents=("b" * 64,), task="history")
    return path


@pytest.fixture
def trio(tmp_path: Path) -> Path:
    for index, name in enumerate(("history", "cooking", "chess")):
        write(tmp_path / name, index)
    return tmp_path


def test_everything_is_said_in_80_columns(trio: Path) -> None:
    code, out, err = inspect("history", "cooking", "chess", cwd=trio)
    assert (code, err) == (0, "")
    assert max(map(cell_len, out.splitlines())) <= 80
    assert "…" not in out
    digest = read_manifest(trio / "history").digest[:12]
    for words in ("SmolLM2-135M-Instruct (aaaaaaaaaaaa)", f"history: digest {digest}, from bbbbbbbbbbbb", "1.58 k"):
        assert words in out
    for words in ("down_proj", "q_proj", "Cosine", "Sign conflict", "all entries", "Factor gap"):
        assert words in out


def test_one_adapter_alone_is_shown_without_pairs(trio: Path) -> None:
    code, out, _ = inspect("chess", cwd=trio)
    assert code == 0
    assert "v_proj" in out
    assert "Cosine" not in out


def test_a_pattern_shows_every_module_in_a_row(trio: Path) -> None:
    _, out, _ = inspect("history", "chess", "--module", "q_proj", cwd=trio)
    assert all(f"{layer}.self_attn.q_proj" in out for layer in range(3))
    assert "v_proj" not in out


def test_of_many_adapters_a_mean_and_the_extremes_are_shown(trio: Path) -> None:
    many = [write(trio / f"many{index}", index).name for index in range(12)]
    code, out, _ = inspect(*many, cwd=trio)
    assert code == 0
    assert "mean of 12" in out
    assert "66 pairs" in out
    assert max(map(cell_len, out.splitlines())) <= 80


def test_json_holds_everything(trio: Path) -> None:
    code, out, _ = inspect("history", "cooking", "--json", "new/all.json", "--quiet", cwd=trio)
    assert (code, out) == (0, "")
    found = json.loads((trio / "new/all.json").read_text())
    first = found["adapters"][0]
    assert first["digest"] == read_manifest(trio / "history").digest
    assert len(first["modules"]) == 9
    assert len(first["modules"]["model.layers.0.self_attn.q_proj"]["singular_values"]) == 4
    assert len(found["pairs"]["sign_conflict"]) == 2


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_drawn_and_drawn_again_the_same(trio: Path, suffix: str, start: bytes) -> None:
    code, out, _ = inspect("history", "cooking", "--plot", f"picture.{suffix}", cwd=trio)
    assert code == 0
    assert f"Picture: picture.{suffix}" in out
    picture = (trio / f"picture.{suffix}").read_bytes()
    assert picture.startswith(start)
    inspect("history", "cooking", "--plot", f"picture.{suffix}", "--quiet", cwd=trio)
    assert (trio / f"picture.{suffix}").read_bytes() == picture
    assert not list(trio.glob(".tmp*"))


def test_a_picture_of_one_adapter_is_drawn(trio: Path) -> None:
    assert inspect("history", "--plot", "one.png", "--quiet", cwd=trio) == (0, "", "")
    assert (trio / "one.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("history", "--plot", "picture.gif"), 3, ("picture.gif", ".png", ".svg", ".pdf")),
        (("history", "--plot", "picture.pgn"), 3, ("Did you mean '.png'",)),
        (("history", "--plot", "picture"), 3, (".png",)),
        (("history", "--module", "q_prjo"), 3, ("q_prjo", "Did you mean 'q_proj'")),
        (("nowhere",), 5, ("nowhere does not exist",)),
        (("history/adapter_config.json",), 5, ("is not a directory",)),
    ],
)
def test_what_makes_no_sense_is_one_sentence_and_a_next_step(
    trio: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    before = sorted(trio.iterdir())
    got, out, err = inspect(*arguments, cwd=trio, columns=200)
    assert (got, out) == (code, "")
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) <= 2
    for word in words:
        assert word in err
    assert sorted(trio.iterdir()) == before
