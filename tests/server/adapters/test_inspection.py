"""What is said of adapters are numbers that one can do in the head, or that the dense updates give."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from seedbed.common import algebra
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError, ConfigError
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import read_adapter, write_adapter
from seedbed.server.adapters import inspection_pairs
from seedbed.server.adapters.inspection import Inspection, inspect_adapters, kind_of_module, layer_of
from seedbed.server.adapters.inspection_pairs import Pairs

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def write(path: Path, modules: dict[str, LoraFactors], base: str = "tiny") -> Path:
    write_adapter(path, Adapter(modules), kind="expert", base=BaseIdentity(name=base), task="chess")
    return path


def diagonal(*values: float, size: int = 4, scaling: float = 1.0) -> LoraFactors:
    """An update with these entries on its diagonal and nothing else."""
    A = torch.eye(size)[: len(values)]
    return LoraFactors(A, torch.eye(size)[:, : len(values)] * torch.tensor(values), scaling)


def random(seed: int, rank: int = 3, rows: int = 40, columns: int = 30) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(
        torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator), 0.5
    )


def pairs(*directories: Path) -> Pairs:
    found = inspect_adapters(list(directories)).pairs
    assert found is not None
    return found


def test_the_spectrum_of_a_diagonal_update_is_its_diagonal(tmp_path: Path) -> None:
    found = inspect_adapters([write(tmp_path / "one", {Q: diagonal(1.5, 2.0, scaling=2.0)})])
    module = found.adapters[0].modules[Q]
    assert module.singular_values == pytest.approx([4.0, 3.0])
    assert (module.rank, module.scaling, module.norm) == (2, 2.0, pytest.approx(5.0))
    assert module.stable_rank == pytest.approx(25 / 16)
    assert module.effective_rank == pytest.approx(math.exp(-(4 / 7) * math.log(4 / 7) - (3 / 7) * math.log(3 / 7)))


def test_equal_singular_values_are_as_many_directions(tmp_path: Path) -> None:
    module = inspect_adapters([write(tmp_path / "one", {Q: diagonal(7, 7, 7)})]).adapters[0].modules[Q]
    assert (module.effective_rank, module.stable_rank) == (pytest.approx(3), pytest.approx(3))


def test_a_direction_held_twice_counts_once(tmp_path: Path) -> None:
    twice = LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    module = inspect_adapters([write(tmp_path / "one", {Q: twice})]).adapters[0].modules[Q]
    assert module.singular_values == pytest.approx([2 * math.sqrt(12), 0.0])
    assert module.effective_rank == pytest.approx(1)


def test_a_zero_update_is_no_error(tmp_path: Path) -> None:
    zero = LoraFactors(torch.ones(1, 3), torch.zeros(3, 1), 1.0)
    paths = [write(tmp_path / name, {Q: zero}) for name in ("one", "two")]
    found = inspect_adapters(paths)
    module = found.adapters[0].modules[Q]
    assert (module.norm, module.effective_rank, module.stable_rank) == (0, 0, 0)
    assert found.pairs is not None
    assert found.pairs.cosine[0][1] == found.pairs.conflict[0][1] == found.pairs.weighted[0][1] == 0
    assert (found.pairs.factor_gap, found.pairs.no_gap) == (None, "the mean is zero")


def test_one_adapter_alone_has_no_pairs_but_all_else(tmp_path: Path) -> None:
    found = inspect_adapters([write(tmp_path / "one", {Q: diagonal(3.0), V: diagonal(4.0)})])
    adapter = found.adapters[0]
    assert found.pairs is None
    assert (adapter.norm, adapter.parameters, adapter.ranks) == (pytest.approx(5.0), 16, [1])
    assert (adapter.manifest.task, adapter.label) == ("chess", "one")


def test_angles_between_the_same_the_opposite_and_unrelated_updates(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {Q: diagonal(1, 2)})
    opposite = write(tmp_path / "opposite", {Q: diagonal(1, 2, scaling=-3.0)})
    other = write(tmp_path / "other", {Q: diagonal(0, 0, 5)})
    found = pairs(one, opposite, other)
    assert found.cosine[0] == pytest.approx((1.0, -1.0, 0.0))
    assert found.conflict[0] == pytest.approx((0.0, 1.0, 0.0))  # no entry is nonzero in both of the last pair
    assert found.weighted[1][0] == pytest.approx(1.0)


def test_a_conflict_is_a_share_of_entries_and_weighted_by_their_product(tmp_path: Path) -> None:
    """Entries (1, 2, 3) and (1, 2, −3): one of three differs, and 9 of 1 + 4 + 9."""
    one = write(tmp_path / "one", {Q: diagonal(1, 2, 3)})
    two = write(tmp_path / "two", {Q: diagonal(1, 2, -3)})
    found = pairs(one, two)
    assert found.conflict[0][1] == pytest.approx(1 / 3)
    assert found.weighted[0][1] == pytest.approx(9 / 14)
    assert found.cosine[0][1] == pytest.approx((1 + 4 - 9) / 14)
    assert found.rows == 1


def test_matrices_are_those_of_the_dense_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection_pairs, "_TILE", 1000)  # several tiles
    modules = [{Q: random(0), V: random(1)}, {Q: random(2, rank=1)}, {Q: random(3), V: random(4, rank=2)}]
    paths = [write(tmp_path / f"a{index}", found) for index, found in enumerate(modules)]
    zero = torch.zeros(40, 30)
    dense = [torch.cat([m[name].delta() if name in m else zero for name in (Q, V)]) for m in modules]
    found = pairs(*paths)
    for i, x in enumerate(dense):
        for j, y in enumerate(dense):
            product, both = x * y, (x * y) != 0
            assert found.cosine[i][j] == pytest.approx(float(product.sum() / x.norm() / y.norm()), abs=1e-6)
            assert found.conflict[i][j] == pytest.approx(float((product < 0).sum() / both.sum()), abs=1e-6)
            wrong = product[product < 0].abs().sum() / product.abs().sum()
            assert found.weighted[i][j] == pytest.approx(float(wrong), abs=1e-6)


def test_of_large_updates_a_fixed_sample_of_rows_is_looked_at_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path / str(i), {Q: random(i, rows=2000), V: random(9 + i, rows=2000)}) for i in range(2)]
    exact = pairs(*paths)
    monkeypatch.setattr(inspection_pairs, "EXACT", 60_000)  # a quarter of 2 × 2 × 2000 × 30
    sampled = pairs(*paths)
    assert sampled.rows == pytest.approx(0.25)
    assert sampled.conflict[0][1] != exact.conflict[0][1]
    assert sampled.conflict[0][1] == pytest.approx(exact.conflict[0][1], abs=0.03)
    assert sampled.cosine == exact.cosine
    assert pairs(*paths) == sampled


def test_the_factor_gap_is_that_of_the_whole_adapters(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(i), {Q: random(i), V: random(10 + i)}) for i in range(3)]
    expected = algebra.factor_gap([read_adapter(path)[0] for path in paths]).overall
    assert pairs(*paths).factor_gap == pytest.approx(expected, rel=1e-9)
    assert pairs(paths[0], paths[0]).factor_gap == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("other", "reason"), [({Q: random(1, rank=2)}, "rank 3, got 2"), ({V: random(1)}, "missing")])
def test_there_is_no_factor_gap_of_other_shapes_and_the_reason_is_said(
    tmp_path: Path, other: dict[str, LoraFactors], reason: str
) -> None:
    found = pairs(write(tmp_path / "one", {Q: random(0)}), write(tmp_path / "two", other))
    assert found.factor_gap is None
    assert reason in found.no_gap


def names(found: Inspection) -> set[str]:
    return set(found.adapters[0].modules)


def test_a_pattern_chooses_modules(tmp_path: Path) -> None:
    paths = [write(tmp_path / "one", {Q: random(0), V: random(1)})]
    assert names(inspect_adapters(paths, "q_proj")) == {Q}
    assert names(inspect_adapters(paths, "*.layers.1.*")) == {V}
    assert names(inspect_adapters(paths, "self_attn")) == {Q, V}
    with pytest.raises(ConfigError, match="no module fits --module 'k_prj'"):
        inspect_adapters(paths, "k_prj")


def test_modules_are_known_by_kind_and_layer() -> None:
    assert (kind_of_module(Q), layer_of(Q)) == ("self_attn.q_proj", 0)
    assert (kind_of_module("lm_head"), layer_of("lm_head")) == ("lm_head", None)
    assert (kind_of_module("h.11.mlp.c_fc"), layer_of("h.11.mlp.c_fc")) == ("mlp.c_fc", 11)


def test_adapters_of_one_directory_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write(tmp_path / run / "adapter", {Q: random(0)}) for run in ("a", "b")]
    assert [adapter.label for adapter in inspect_adapters(paths).adapters] == ["a/adapter", "b/adapter"]
    assert [a.label for a in inspect_adapters([paths[0]] * 2).adapters] == ["1:adapter", "2:adapter"]


def test_looking_changes_nothing_and_trusts_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "one", {Q: random(0)})
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}
    inspect_adapters([path])
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()} == before
    tensors = path / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AdapterMismatchError, match="tensors_sha256"):
        inspect_adapters([path])


def test_adapters_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {Q: random(0)})
    with pytest.raises(AdapterMismatchError, match="another base model"):
        inspect_adapters([one, write(tmp_path / "two", {Q: random(0)}, base="other")])
    with pytest.raises(AdapterMismatchError, match="expected shape"):
        inspect_adapters([one, write(tmp_path / "three", {Q: random(0, rows=8)})])
    with pytest.raises(ConfigError, match="no adapter to inspect"):
        inspect_adapters([])
