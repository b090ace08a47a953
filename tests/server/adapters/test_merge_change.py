"""An expert taken out of an average, or added to it, gives what averaging anew gives, without the others' files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterFormatError, AdapterMismatchError, ConfigError, SeedbedError
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import read_adapter, read_manifest, write_adapter
from seedbed.server.adapters.change import change_average
from seedbed.server.adapters.files import merge_directories
from seedbed.server.adapters.layout import decode_ranks, encode_ranks

SHAPES = {"layers.0.q": (4, 6), "layers.1.q": (4, 6), "layers.1.v": (5, 3)}


def expert(path: Path, seed: int, ranks: dict[str, int], scaling: float = 2.0, dtype: Any = torch.float32) -> Path:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, rank in ranks.items():
        rows, columns = SHAPES[name]
        A, B = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        modules[name] = LoraFactors(A.to(dtype), B.to(dtype), scaling)
    write_adapter(path, Adapter(modules), kind="expert", base=BaseIdentity(name="tiny", digest="1" * 64))
    return path


def alike(root: Path, dtype: Any = torch.float32) -> list[Path]:
    return [expert(root / f"e{i}", i, dict.fromkeys(SHAPES, 2), dtype=dtype) for i in range(3)]


def mixed(root: Path) -> list[Path]:
    """Different ranks, scalings and sets of modules; only the third has ``layers.1.v``."""
    return [
        expert(root / "e0", 0, {"layers.0.q": 1, "layers.1.q": 2}, scaling=1.0),
        expert(root / "e1", 1, {"layers.1.q": 3}, scaling=0.1),
        expert(root / "e2", 2, dict.fromkeys(SHAPES, 2), scaling=4.0),
    ]


def deltas(path: Path) -> dict[str, torch.Tensor]:
    return {name: factors.to(dtype=torch.float64).delta() for name, factors in read_adapter(path)[0].items()}


def assert_as_if_anew(changed: Path, anew: Path, tolerance: float = 1e-6) -> None:
    got, expected = deltas(changed), deltas(anew)
    assert set(got) == set(expected)
    for name, delta in expected.items():
        assert (got[name] - delta).abs().max() < tolerance, name
    one, other = read_manifest(changed), read_manifest(anew)
    assert (one.parents, one.kind, one.base) == (other.parents, other.kind, other.base)
    assert one.settings["weights"] == pytest.approx(other.settings["weights"], abs=1e-12)
    for key in ("method", "options", "ranks"):
        assert one.settings[key] == other.settings[key]


@pytest.mark.parametrize("make", [alike, mixed])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 2.0, 5.0]])
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_without_an_expert_it_is_the_average_of_the_others(
    tmp_path: Path, make: Any, weights: list[float], gone: int
) -> None:
    experts = make(tmp_path)
    merge_directories(experts, "average", tmp_path / "all", weights=weights)
    change_average(tmp_path / "all", tmp_path / "changed", without=[str(experts[gone])])
    left = [index for index in range(3) if index != gone]
    merge_directories(
        [experts[i] for i in left], "average", tmp_path / "anew", weights=[weights[index] for index in left]
    )
    assert_as_if_anew(tmp_path / "changed", tmp_path / "anew")


@pytest.mark.parametrize("make", [alike, mixed])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 3.0]])
def test_with_a_late_expert_it_is_the_average_of_all(tmp_path: Path, make: Any, weights: list[float]) -> None:
    experts = make(tmp_path)
    merge_directories(experts[:2], "average", tmp_path / "two", weights=weights)
    change_average(tmp_path / "two", tmp_path / "changed", added=[experts[2]])
    mean = sum(weights) / 2
    merge_directories(experts, "average", tmp_path / "anew", weights=[*weights, mean])
    assert_as_if_anew(tmp_path / "changed", tmp_path / "anew")


def test_a_late_expert_of_weight_three_counts_as_three_of_the_others(tmp_path: Path) -> None:
    experts = alike(tmp_path)
    merge_directories(experts[:2], "average", tmp_path / "two")
    manifest = change_average(tmp_path / "two", tmp_path / "changed", added=[experts[2]], weights=[3.0])
    assert manifest.settings["weights"] == pytest.approx([0.2, 0.2, 0.6])
    merge_directories(experts, "average", tmp_path / "anew", weights=[1.0, 1.0, 3.0])
    assert_as_if_anew(tmp_path / "changed", tmp_path / "anew")


def test_one_can_go_while_another_comes(tmp_path: Path) -> None:
    experts = mixed(tmp_path)
    merge_directories(experts[:2], "average", tmp_path / "two", weights=[1.0, 3.0])
    change_average(tmp_path / "two", tmp_path / "changed", without=[str(experts[0])], added=[experts[2]])
    merge_directories(experts[1:], "average", tmp_path / "anew")
    assert_as_if_anew(tmp_path / "changed", tmp_path / "anew")


def test_an_average_can_be_changed_again_without_the_others_files(tmp_path: Path) -> None:
    experts = mixed(tmp_path)
    digests = [read_manifest(path).digest for path in experts]
    merge_directories(experts, "average", tmp_path / "anew")
    merge_directories(experts[:2], "average", tmp_path / "two")
    for path in experts[:2]:
        shutil.rmtree(path)
    change_average(tmp_path / "two", tmp_path / "three", added=[experts[2]])
    assert_as_if_anew(tmp_path / "three", tmp_path / "anew")
    change_average(tmp_path / "three", tmp_path / "one", without=[digests[0][:8], digests[1]])
    assert read_manifest(tmp_path / "one").parents == (digests[2],)
    for name, delta in deltas(experts[2]).items():
        assert (deltas(tmp_path / "one")[name] - delta).abs().max() < 1e-6


def test_in_half_precision_what_stays_is_not_rounded_again(tmp_path: Path) -> None:
    experts = alike(tmp_path, torch.bfloat16)
    merge_directories(experts, "average", tmp_path / "all")
    change_average(tmp_path / "all", tmp_path / "changed", without=[str(experts[1])])
    merge_directories([experts[0], experts[2]], "average", tmp_path / "anew")
    assert_as_if_anew(tmp_path / "changed", tmp_path / "anew")
    merge_directories(experts, "average", tmp_path / "uneven", weights=[1.0, 2.0, 5.0])
    change_average(tmp_path / "uneven", tmp_path / "less", without=[str(experts[0])])
    before, after = read_adapter(tmp_path / "uneven")[0], read_adapter(tmp_path / "less")[0]
    for name, factors in after.items():
        assert factors.B.dtype == torch.bfloat16
        assert torch.equal(factors.B, before[name].B[:, 2:])


def test_an_average_in_float32_of_halves_is_changed_exactly(tmp_path: Path) -> None:
    experts = alike(tmp_path, torch.bfloat16)
    merge_directories(experts, "average", tmp_path / "all", weights=[1.0, 2.0, 5.0], dtype="float32")
    change_average(tmp_path / "all", tmp_path / "changed", without=[str(experts[2])])
    merge_directories(experts[:2], "average", tmp_path / "anew", weights=[1.0, 2.0], dtype="float32")
    assert_as_if_anew(tmp_path / "changed", tmp_path / "anew")


def test_a_module_that_only_the_expert_had_goes_with_it(tmp_path: Path) -> None:
    experts = mixed(tmp_path)
    merge_directories(experts, "average", tmp_path / "all")
    change_average(tmp_path / "all", tmp_path / "changed", without=[str(experts[2])])
    assert set(read_adapter(tmp_path / "changed")[0]) == {"layers.0.q", "layers.1.q"}


def test_an_expert_of_weight_zero_has_no_place_and_can_go(tmp_path: Path) -> None:
    experts = alike(tmp_path)
    manifest = merge_directories(experts, "average", tmp_path / "all", weights=[1.0, 0.0, 1.0])
    assert manifest.settings["ranks"] == [2, 0, 2]
    change_average(tmp_path / "all", tmp_path / "changed", without=[str(experts[1])])
    merge_directories([experts[0], experts[2]], "average", tmp_path / "anew")
    assert_as_if_anew(tmp_path / "changed", tmp_path / "anew")
    with pytest.raises(ConfigError, match="only experts of weight 0"):
        change_average(tmp_path / "all", tmp_path / "out", without=[str(experts[0]), str(experts[2])])


def refusal(average: Path, **change: Any) -> SeedbedError:
    with pytest.raises(SeedbedError) as caught:
        change_average(average, average.parent / "out", **change)
    assert not (average.parent / "out").exists()
    return caught.value


def test_what_cannot_be_changed_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    experts = alike(tmp_path)
    merge_directories(experts, "average", tmp_path / "all")
    stranger = expert(tmp_path / "stranger", 9, {"layers.0.q": 1})
    unknown = refusal(tmp_path / "all", without=[str(stranger)])
    assert isinstance(unknown, AdapterMismatchError)
    assert all(read_manifest(path).digest[:12] in unknown.hint for path in experts)
    assert "is not an expert" in refusal(tmp_path / "all", without=["abc"]).message  # too short a prefix
    everyone = [str(path) for path in experts]
    assert "no expert would be left" in refusal(tmp_path / "all", without=everyone).message
    assert "is not an expert" in refusal(tmp_path / "all", without=[everyone[0]] * 2).message
    for weights, words in (([1.0, 2.0], "expected 1 weights"), ([0.0], "not above 0"), ([-1.0], "not above 0")):
        assert words in refusal(tmp_path / "all", added=[stranger], weights=weights).message


def test_only_an_exact_average_can_be_changed(tmp_path: Path) -> None:
    experts = alike(tmp_path)
    merge_directories(experts, "svd", tmp_path / "svd")
    merge_directories(experts, "average", tmp_path / "scaled", options={"task_scale": 2.0}, seed=experts[0])
    words = {experts[0]: "expert", tmp_path / "svd": "method 'svd'", tmp_path / "scaled": "a part of the seed"}
    for path, word in words.items():
        error = refusal(path, without=[str(experts[1])])
        assert isinstance(error, AdapterFormatError)
        assert word in error.message


def test_an_average_that_was_damaged_is_not_believed(tmp_path: Path) -> None:
    experts = alike(tmp_path)
    merge_directories(experts, "average", tmp_path / "all")
    path = tmp_path / "all" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "tensors_sha256" in refusal(tmp_path / "all", without=[str(experts[0])]).message


@pytest.mark.parametrize("ranks", [[(2, 2, 2)], [(2, 0, 1), (3, 3, 3)], [(0, 0, 4), (1, 0, 4), (1, 1, 0)]])
def test_ranks_of_parents_are_kept_in_little_space(ranks: list[tuple[int, ...]]) -> None:
    names = ["a", "b", "c"]
    blocks = {name: tuple(column[index] for column in ranks) for index, name in enumerate(names)}
    assert decode_ranks(encode_ranks(blocks), names) == blocks
    assert encode_ranks({name: (8, int(name != "b")) for name in names}) == [8, "1 0 1"]
    assert encode_ranks({str(index): (int(index > 2),) for index in range(9)}) == ["0*3 1*6"]


@pytest.mark.parametrize("entry", ["x", "1*2", "1*", "2 2 2 2"])
def test_ranks_that_make_no_sense_are_refused(entry: str) -> None:
    with pytest.raises(AdapterFormatError, match="ranks"):
        decode_ranks([entry], ["a", "b", "c"])
