"""How an expert stands among the others, against dense updates and by numbers one can do in the head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import write_adapter
from seedbed.server.cohort import Standing, outliers, standings

BASE = BaseIdentity(name="tiny", digest="1" * 64)


def written(root: Path, experts: Mapping[str, Adapter]) -> dict[str, Path]:
    for name, value in experts.items():
        write_adapter(root / name, value, kind="expert", base=BASE)
    return {name: root / name for name in experts}


def along(x: float, y: float) -> Adapter:
    """The update [[x, y]]."""
    return Adapter({"layer": LoraFactors(torch.tensor([[x, y]], dtype=torch.float32), torch.ones(1, 1), 1.0)})


def test_norms_and_cosines_of_arrows_in_the_plane(tmp_path: Path) -> None:
    found = standings(written(tmp_path, {"east": along(2, 0), "north": along(0, 1), "west": along(-4, 0)}), None)
    assert [one.norm for one in found.values()] == pytest.approx([2, 1, 4])
    # east: the others' mean is (-2, 1/2); north: (-1, 0); west: (1, 1/2)
    assert found["east"].cosine == pytest.approx(-2 / math.hypot(2, 0.5))
    assert found["north"].cosine == pytest.approx(0)
    assert found["west"].cosine == pytest.approx(-1 / math.hypot(1, 0.5))


def test_updates_are_counted_from_the_seed(tmp_path: Path) -> None:
    seed = written(tmp_path, {"seed": along(10, 10)})["seed"]
    found = standings(written(tmp_path, {"east": along(11, 10), "west": along(9, 10)}), seed)
    assert [one.norm for one in found.values()] == pytest.approx([1, 1])
    assert found["east"].cosine == pytest.approx(-1), "as whole updates they would look alike"


def test_alone_or_without_any_update_there_is_no_cosine(tmp_path: Path) -> None:
    assert standings(written(tmp_path, {"one": along(3, 4)}), None) == {"one": Standing(pytest.approx(5), None)}
    found = standings(written(tmp_path / "two", {"nothing": along(0, 0), "one": along(3, 4)}), None)
    assert found == {"nothing": Standing(0, None), "one": Standing(pytest.approx(5), None)}


def test_low_rank_arithmetic_gives_what_dense_updates_give(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def random(ranks: Mapping[str, int]) -> Adapter:
        return Adapter({name: LoraFactors(torch.randn(r, 7), torch.randn(5, r), 0.5 * r) for name, r in ranks.items()})

    experts = {"x": random({"p": 2, "q": 3}), "y": random({"p": 4, "q": 1}), "z": random({"p": 1})}
    seed = random({"p": 2, "q": 2})

    def dense(value: Adapter) -> torch.Tensor:
        zero = torch.zeros(5, 7)
        return torch.cat([value[name].delta() if name in value else zero for name in ("p", "q")]).double().flatten()

    write_adapter(tmp_path / "seed", seed, kind="seed", base=BASE)
    found = standings(written(tmp_path, experts), tmp_path / "seed")
    updates = {name: dense(value) - dense(seed) for name, value in experts.items()}
    for name, update in updates.items():
        mean = torch.stack([other for key, other in updates.items() if key != name]).mean(0)
        assert found[name].norm == pytest.approx(float(update.norm()), rel=1e-5)
        assert found[name].cosine == pytest.approx(float(torch.cosine_similarity(update, mean, dim=0)), abs=1e-5)


def test_gates_are_closed_only_where_they_are_asked_for() -> None:
    found = {
        "a": Standing(1.0, 0.9),
        "b": Standing(1.2, 0.8),
        "huge": Standing(30.0, 0.7),
        "backwards": Standing(1.1, -0.6),
    }
    assert outliers(found, max_norm_ratio=None, min_cosine=None) == {}
    by_norm = outliers(found, max_norm_ratio=10, min_cosine=None)
    assert set(by_norm) == {"huge"}
    assert "30" in by_norm["huge"], "the others' median is 1.1"
    by_angle = outliers(found, max_norm_ratio=None, min_cosine=0.0)
    assert set(by_angle) == {"backwards"}
    assert "-0.600" in by_angle["backwards"]
