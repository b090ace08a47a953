"""The factored decomposition is the dense one, and truncation is the best there is."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

from seedbed.common import algebra, lowrank
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError, ConfigError
from seedbed.common.gram import GramSpectrum
from seedbed.common.lowrank import keep, svd_of_sum


@pytest.fixture
def as_in_production() -> Iterator[None]:
    """Without the checks of annotations that tests add, which would refuse first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def random_factors(out: int, in_: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, in_, generator=generator), torch.randn(out, rank, generator=generator)
    return LoraFactors(A.to(dtype), B.to(dtype), 0.5)


def diagonal(*values: float) -> LoraFactors:
    size = len(values)
    return LoraFactors(torch.eye(size), torch.diag(torch.tensor(values)), 1.0)


@pytest.mark.parametrize(
    ("out", "in_", "ranks"),
    [(12, 9, [2, 3]), (9, 12, [1]), (4, 6, [3, 3, 3]), (6, 4, [5, 5]), (3, 3, [1, 1]), (1, 5, [2])],
    ids=["tall", "rank 1", "more ranks than rows", "more ranks than columns", "square", "one row"],
)
def test_the_factored_svd_is_the_dense_svd(out: int, in_: int, ranks: list[int]) -> None:
    factors = [random_factors(out, in_, rank, seed) for seed, rank in enumerate(ranks)]
    weights = [1.0, -0.5, 2.0][: len(ranks)]
    dense = sum((w * f.delta() for w, f in zip(weights, factors, strict=True)), torch.zeros(out, in_).double())
    U, S, Vh = svd_of_sum(factors, weights)
    k = min(out, in_, sum(ranks))
    assert (U.shape, S.shape, Vh.shape) == ((out, k), (k,), (k, in_))
    assert torch.allclose(U * S @ Vh, dense, atol=1e-12)
    assert torch.allclose(S, torch.linalg.svdvals(dense)[:k], atol=1e-12)
    assert torch.allclose(U.T @ U, torch.eye(k).double(), atol=1e-12)
    assert torch.allclose(Vh @ Vh.T, torch.eye(k).double(), atol=1e-12)


def test_parallel_factors_of_seeded_experts_lose_nothing() -> None:
    seed = random_factors(40, 30, 4, dtype=torch.float32)
    experts = [
        LoraFactors(seed.A + 1e-4 * torch.randn(4, 30), seed.B + 1e-4 * torch.randn(40, 4), 0.5) for _ in range(6)
    ]
    exact = sum((f.to(dtype=torch.float64).delta() for f in experts), torch.zeros(40, 30).double())
    svd = svd_of_sum(experts)
    assert torch.linalg.norm(svd.U * svd.S @ svd.Vh - exact) < 1e-6 * torch.linalg.norm(exact)
    assert torch.allclose(svd.U.T @ svd.U, torch.eye(svd.U.shape[1]), atol=1e-5)


@pytest.mark.parametrize("drift", [1.0, 1e-2, 1e-4, 0.0], ids=lambda drift: f"drift {drift}")
def test_compressing_float32_is_as_good_as_the_dense_way_in_float64(drift: float) -> None:
    torch.manual_seed(0)
    seed = random_factors(40, 30, 4, dtype=torch.float32)
    experts = [
        LoraFactors(seed.A + drift * torch.randn(4, 30), seed.B + drift * torch.randn(40, 4), float(1 + index))
        for index in range(5)
    ]
    weights = [0.5, 0.25, 0.0, -0.125, 1.0]
    exact = sum(
        (w * f.to(dtype=torch.float64).delta() for f, w in zip(experts, weights, strict=True)),
        torch.zeros(40, 30).double(),
    )
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    for rank in (1, 3, 4, 20, 64):
        small = lowrank.compress_sum(experts, weights, rank)
        assert small.rank == min(rank, 20)
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        assert torch.linalg.norm(small.delta().double() - best) < 1e-6 * torch.linalg.norm(exact)


def test_singular_values_by_gram_and_by_qr_agree() -> None:
    factors = [random_factors(20, 30, 4, seed, torch.float32) for seed in range(3)]
    by_gram = GramSpectrum(factors, [0.5 * f.scaling for f in factors]).S.float()
    assert torch.allclose(by_gram, svd_of_sum(factors, [0.5] * 3).S, rtol=1e-5)


def test_compress_by_share_keeps_that_share_of_a_sum() -> None:
    factors = [random_factors(20, 30, 5, seed, torch.float32) for seed in range(2)]
    assert lowrank.compress_sum(factors, share=0.8).rank == 8
    assert lowrank.compress_sum([factors[0], factors[0]], share=0.8).rank == 4  # parallel: 5 of 10 are not zero
    double = [f.to(dtype=torch.float64) for f in factors]
    assert lowrank.compress_sum(double, share=0.8).rank == 8


def test_a_zero_update_has_zero_singular_values_and_compresses_to_zero() -> None:
    zero = LoraFactors(torch.randn(2, 4), torch.zeros(3, 2), 1.0)
    assert svd_of_sum([zero]).S.tolist() == [0.0, 0.0]
    small = lowrank.compress(Adapter({"m": zero}), share=0.5)["m"]
    assert (small.rank, small.delta().abs().max().item()) == (1, 0.0)


def test_half_precision_is_computed_in_float32() -> None:
    svd = svd_of_sum([random_factors(5, 4, 2, dtype=torch.bfloat16)])
    assert {tensor.dtype for tensor in svd} == {torch.float32}


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(AdapterMismatchError, match="shape"):
        svd_of_sum([random_factors(3, 4, 1), random_factors(4, 3, 1)])


def test_compress_is_the_best_approximation_of_its_rank() -> None:
    small = lowrank.compress(Adapter({"m": diagonal(5.0, 3.0, 4.0)}), 2)["m"]
    assert (small.rank, small.scaling) == (2, 1.0)
    assert torch.allclose(small.delta(), torch.diag(torch.tensor([5.0, 0.0, 4.0])), atol=1e-6)


def test_compress_balances_its_factors() -> None:
    small = lowrank.compress(Adapter({"m": LoraFactors(torch.eye(2), 16.0 * torch.eye(2), 1.0)}), 2)["m"]
    assert torch.linalg.norm(small.A, dim=1).tolist() == pytest.approx([4.0, 4.0])
    assert torch.linalg.norm(small.B, dim=0).tolist() == pytest.approx([4.0, 4.0])


def test_compress_to_a_large_rank_changes_nothing_but_the_factors() -> None:
    adapter = Adapter({"a": random_factors(6, 5, 2), "b": random_factors(5, 6, 4)})
    same = lowrank.compress(adapter, 64)
    assert [factors.rank for factors in same.values()] == [2, 4]
    assert algebra.norm(algebra.subtract(adapter, same)) < 1e-12


def test_the_three_rules_read_a_share_in_three_ways() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0])
    assert keep(values, 0.5, "count") == 2  # half of the four that are not zero
    assert keep(values, 0.5, "sum") == 1  # 4 of 8
    assert keep(values, 0.75, "sum") == 2  # 6 of 8
    assert keep(values, 0.9, "energy") == 2  # 20 of 22 is 0.909
    assert [keep(values, 1.0, rule) for rule in ("count", "sum", "energy")] == [4, 4, 4]
    assert keep(values, 0.01, "count") == 1


def test_shares_are_not_rounded_up_by_a_hair() -> None:
    assert 0.55 * 100 > 55  # in floating point
    assert keep(torch.ones(100), 0.55, "count") == 55
    assert [keep(torch.ones(10), share / 10, "count") for share in range(1, 11)] == list(range(1, 11))
    assert [keep(torch.ones(10), share / 10, "sum") for share in range(1, 11)] == list(range(1, 11))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_shares_outside_of_zero_to_one_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        keep(torch.ones(3), share)


@pytest.mark.usefixtures("as_in_production")
def test_an_unknown_rule_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as refusal:
        keep(torch.ones(3), 0.5, "enrgy")  # type: ignore[arg-type]
    assert "energy" in refusal.value.hint


def test_compress_wants_a_rank_or_a_share() -> None:
    adapter = Adapter({"m": diagonal(1.0, 2.0)})
    for options in ({}, {"rank": 1, "share": 0.5}, {"rank": 0}):
        with pytest.raises(ConfigError):
            lowrank.compress(adapter, **options)  # type: ignore[arg-type]
    assert lowrank.compress(adapter, share=0.5)["m"].rank == 1
