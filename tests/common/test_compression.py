"""Compressed transfer: fewer bytes, and an error that is what a dense computation finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.compression import compress, quantized, transfer_error
from seedbed.common.config import LoraSettings, TrainingSettings
from seedbed.common.errors import AdapterFormatError, NonFiniteError
from seedbed.common.jobs import Job
from seedbed.common.manifest import BaseIdentity
from seedbed.common.peft_format import expand_adapter
from seedbed.common.storage import AdapterFile, DirectoryStore, read_adapter, write_adapter

BASE = BaseIdentity(name="base", digest="0" * 64)


def adapter(seed: int = 0) -> Adapter:
    drawn = torch.Generator().manual_seed(seed)

    def module(rank: int, inputs: int, outputs: int, scaling: float) -> LoraFactors:
        A, B = torch.randn(rank, inputs, generator=drawn), torch.randn(outputs, rank, generator=drawn)
        return LoraFactors(A, 0.01 * B, scaling)

    return Adapter({"a": module(4, 30, 20, 2.0), "b": module(8, 16, 40, 0.5)})


def dense_error(exact: Adapter, received: Adapter) -> float:
    def all_of(one: Adapter) -> torch.Tensor:
        return torch.cat([(f.scaling * f.B.double() @ f.A.double()).flatten() for f in one.values()])

    return float((all_of(exact) - all_of(received)).norm() / all_of(exact).norm())


# --- the error ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transfer", ["bfloat16", "int8"])
def test_the_error_is_that_of_the_dense_updates(transfer: str) -> None:
    exact = adapter()
    received = compress(exact, transfer)
    error = transfer_error(exact, received)
    assert error.total == pytest.approx(dense_error(exact, received), rel=1e-9)
    one = {"a": dense_error(Adapter({"a": exact["a"]}), Adapter({"a": received["a"]}))}
    assert error.modules["a"] == pytest.approx(one["a"], rel=1e-9)
    assert error.worst == max(error.modules.values())


def test_a_small_error_is_not_lost_beside_the_update() -> None:
    """One entry of A is off by 1e-9 of the update: a difference of two norms in float32 would say 0, or noise."""
    A, B = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    near = A.clone()
    near[0, 0] += 1e-9
    error = transfer_error(Adapter({"a": LoraFactors(A, B, 3.0)}), Adapter({"a": LoraFactors(near, B, 3.0)}))
    assert error.total == pytest.approx(1e-9 / 2**0.5, rel=1e-6)


def test_nothing_is_lost_in_float32_and_of_an_update_of_zero() -> None:
    assert transfer_error(adapter(), compress(adapter(), "float32")).total == 0.0
    fresh = adapter().map(lambda f: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling))
    assert transfer_error(fresh, compress(fresh, "int8")).total == 0.0


def test_another_scaling_is_an_error_too() -> None:
    doubled = adapter().map(lambda f: LoraFactors(f.A, f.B, 2 * f.scaling))
    assert transfer_error(adapter(), doubled).total == pytest.approx(1.0)


@pytest.mark.parametrize(("transfer", "low", "high"), [("bfloat16", 1e-3, 4e-3), ("int8", 3e-3, 2e-2)])
def test_the_error_is_as_large_as_the_rounding(transfer: str, low: float, high: float) -> None:
    assert low < transfer_error(adapter(), compress(adapter(), transfer)).total < high


# --- int8 --------------------------------------------------------------------------------------------------------------


def test_every_row_has_its_own_scale() -> None:
    small = quantized(torch.tensor([[127.0, -127.0, 1.0], [0.0127, 0.0, -0.0064], [0.0, 0.0, 0.0]]), "rows")
    assert small.values.tolist() == [[127, -127, 1], [127, 0, -64], [0, 0, 0]]
    assert torch.allclose(small.scales, torch.tensor([[1.0], [1e-4], [0.0]]))
    assert small.expanded()[2].tolist() == [0.0, 0.0, 0.0]


def test_columns_are_scaled_as_rows_of_the_transpose() -> None:
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantized(matrix, "columns").values, quantized(matrix.T, "rows").values.T)


def test_what_was_quantized_once_is_not_changed_again() -> None:
    once = compress(adapter(), "int8")
    assert transfer_error(once, compress(once, "int8")).total < 1e-6


# --- files -------------------------------------------------------------------------------------------------------------


def test_bfloat16_halves_the_file_and_is_an_ordinary_peft_directory(tmp_path: Path) -> None:
    big = adapter().map(lambda f: LoraFactors(f.A.repeat(1, 50), f.B.repeat(50, 1), f.scaling))
    write_adapter(tmp_path / "full", big, kind="expert", base=BASE)
    manifest = write_adapter(tmp_path / "half", compress(big, "bfloat16"), kind="expert", base=BASE)
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    assert manifest.dtype == "bfloat16"
    read, _ = read_adapter(tmp_path / "half")
    assert torch.equal(read["a"].A, big["a"].A.bfloat16())
    assert AdapterFile(tmp_path / "half").dtype("b") == torch.bfloat16


# --- recipes -----------------------------------------------------------------------------------------------------------


def job(**training: object) -> Job:
    return Job(
        kind="expert",
        name="expert:addition",
        base=BASE,
        tasks=("addition",),
        lora=LoraSettings(rank=2),
        training=TrainingSettings.model_validate({"steps": 2, **training}),
    )


def test_recipes_are_those_of_before_there_was_a_choice() -> None:
    """Taken from the version without it: what its runs have trained is still found in their stores."""
    assert job().recipe == RECIPE_OF_BEFORE
    assert job(transfer="float32").recipe == RECIPE_OF_BEFORE
    assert len({job(transfer=name).recipe for name in ("float32", "bfloat16", "int8")}) == 3


RECIPE_OF_BEFORE = "ad985765e4babca5aa769b044575ca5fa65e821d87a3c5ae0658c17d220ede91"


def test_a_seed_is_never_cut_to_int8_since_everybody_trains_on_from_it() -> None:
    assert job(transfer="int8").transfer == "int8"
    assert job(transfer="int8").model_copy(update={"kind": "seed"}).transfer == "bfloat16"


# --- the form of int8 on disk ------------------------------------------------------------------------------------------


def wide_adapter() -> Adapter:
    return adapter().map(lambda f: LoraFactors(f.A.repeat(1, 50), f.B.repeat(50, 1), f.scaling))


def test_int8_quarters_the_file_and_is_expanded_as_it_is_read(tmp_path: Path) -> None:
    exact = wide_adapter()
    write_adapter(tmp_path / "full", exact, kind="expert", base=BASE)
    manifest = write_adapter(tmp_path / "quarter", exact, kind="expert", base=BASE, int8=True)
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("full", "quarter")]
    assert sizes[1] < 0.3 * sizes[0]
    assert (manifest.dtype, manifest.rank, manifest.modules) == ("int8", 8, 2)
    read, again = read_adapter(tmp_path / "quarter")
    assert again == manifest
    sent = compress(exact, "int8")
    for name in exact:
        assert torch.equal(read[name].A, sent[name].A)
        assert torch.equal(read[name].B, sent[name].B)
        assert read[name].scaling == exact[name].scaling


def test_parts_of_rows_are_expanded_like_the_whole(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", adapter(), kind="expert", base=BASE, int8=True)
    file = AdapterFile(tmp_path / "a")
    whole = file.factors("b")
    assert file.dtype("b") == file.factor_dtype("b", "A") == torch.float32
    for factor, matrix in (("A", whole.A), ("B", whole.B)):
        part = torch.empty(3, matrix.shape[1])
        file.read_part("b", factor, 2, part)  # type: ignore[arg-type]
        assert torch.equal(part, matrix[2:5])


def test_a_store_takes_int8_and_the_expanded_one_loads_in_peft(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_adapter(tmp_path / "a", adapter(), kind="expert", base=BASE, task="addition", int8=True)
    store = DirectoryStore(tmp_path / "store")
    digest = store.put(tmp_path / "a")
    manifest = expand_adapter(store.open(digest), tmp_path / "ordinary")
    assert (manifest.dtype, manifest.task, manifest.parents) == ("float32", "addition", (digest,))
    tensors = load_file(tmp_path / "ordinary/adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.a.lora_A.weight"], compress(adapter(), "int8")["a"].A)
    assert all(name.endswith(".weight") for name in tensors)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base_model.model.a.lora_A.scale": None}, "needs base_model.model.a.lora_A.scale"),
        ({"base_model.model.a.lora_A.scale": torch.ones(1, 4)}, r"of dtype F32 and shape \[4, 1\]"),
        ({"base_model.model.a.lora_B.scale": torch.ones(1, 4).half()}, r"of dtype F32 and shape \[1, 4\]"),
        ({"base_model.model.a.lora_A.int8": torch.ones(4, 30)}, "has dtype F32"),
        ({"base_model.model.c.lora_A.scale": torch.ones(4, 1)}, "is not a LoRA factor"),
    ],
)
def test_int8_that_is_not_as_it_should_be_is_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], reason: str
) -> None:
    from safetensors.torch import load_file, save_file

    write_adapter(tmp_path / "a", adapter(), kind="expert", base=BASE, int8=True)
    (tmp_path / "a/seedbed.json").unlink()
    path = tmp_path / "a/adapter_model.safetensors"
    changed = {name: value for name, value in {**load_file(path), **change}.items() if value is not None}
    save_file(changed, path)
    with pytest.raises(AdapterFormatError, match=reason):
        AdapterFile(tmp_path / "a")


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    bad = adapter().map(lambda f: LoraFactors(f.A * float("inf"), f.B, f.scaling))
    with pytest.raises(NonFiniteError):
        write_adapter(tmp_path / "a", bad, kind="expert", base=BASE, int8=True)
    assert not (tmp_path / "a").exists()
