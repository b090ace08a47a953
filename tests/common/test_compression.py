"""Compressed transfer: fewer bytes, and an error that is what a dense computation finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.compression import compress, quantized, transfer_error
from seedbed.common.config import LoraSettings, TrainingSettings
from seedbed.common.jobs import Job
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import AdapterFile, read_adapter, write_adapter

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
