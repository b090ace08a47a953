"""The algebra agrees with dense arithmetic, and with what one can do in the head."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seedbed.common import algebra
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError, ConfigError

SHAPES = {"down": (3, 5), "up": (5, 3)}


def column(*values: float, scaling: float = 1.0, dtype: torch.dtype = torch.float32) -> Adapter:
    """One module `m` of rank 1 whose update is `scaling · values` in its only column."""
    B = torch.tensor([[value] for value in values], dtype=dtype)
    return Adapter({"m": LoraFactors(torch.ones(1, 1, dtype=dtype), B, scaling)})


def dense(adapter: Adapter, name: str) -> torch.Tensor:
    return adapter[name].delta().double() if name in adapter else torch.zeros(SHAPES[name], dtype=torch.float64)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Adapters of any ranks, scalings and subsets of two modules, in float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    modules = {}
    for name in draw(st.sets(st.sampled_from(sorted(SHAPES)))):
        rank, (out, in_) = draw(st.integers(1, 7)), SHAPES[name]
        A = torch.randn(rank, in_, generator=generator, dtype=torch.float64)
        B = torch.randn(out, rank, generator=generator, dtype=torch.float64)
        modules[name] = LoraFactors(A, B, draw(st.sampled_from([0.25, 1.0, 2.0])))
    return Adapter(modules)


weights = st.floats(-2, 2).map(lambda value: round(value, 2))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(adapters(), weights), max_size=4))
def test_concatenation_is_the_dense_weighted_sum(pairs: list[tuple[Adapter, float]]) -> None:
    total = algebra.concatenate(pairs)
    for name in SHAPES:
        expected = sum((weight * dense(adapter, name) for adapter, weight in pairs), torch.zeros(SHAPES[name]))
        assert torch.allclose(dense(total, name), expected.double(), atol=1e-12)
    assert all(factors.scaling == 1.0 for factors in total.values())


@settings(max_examples=40, deadline=None)
@given(adapters(), adapters())
def test_norm_and_inner_product_are_the_dense_ones(left: Adapter, right: Adapter) -> None:
    flat = [torch.cat([dense(adapter, name).flatten() for name in SHAPES]) for adapter in (left, right)]
    assert algebra.norm(left) == pytest.approx(float(flat[0].norm()), abs=1e-12)
    assert algebra.inner(left, right) == pytest.approx(float(flat[0] @ flat[1]), abs=1e-10)
    assert -1 <= algebra.cosine(left, right) <= 1


@settings(max_examples=30, deadline=None)
@given(adapters())
def test_the_mean_of_equal_adapters_is_that_adapter(adapter: Adapter) -> None:
    mean = algebra.average([adapter] * 3)
    assert algebra.norm(algebra.subtract(mean, adapter)) <= 1e-12 * (1 + algebra.norm(adapter))


def test_rank_of_a_sum_is_the_sum_of_ranks() -> None:
    total = algebra.add(column(1.0, 2.0), algebra.add(column(1.0, 1.0), column(0.0, 1.0)))
    assert total["m"].rank == 3
    assert total["m"].delta().flatten().tolist() == [2.0, 4.0]


def test_scaling_an_adapter_scales_its_update_and_shares_its_factors() -> None:
    adapter = column(1.0, 2.0, scaling=0.5)
    tripled = algebra.scale(adapter, 3.0)
    assert tripled["m"].delta().flatten().tolist() == [1.5, 3.0]
    assert tripled["m"].A is adapter["m"].A


def test_average_counts_a_missing_module_as_zero() -> None:
    other = Adapter({"other": LoraFactors(torch.ones(1, 1), torch.ones(1, 1), 1.0)})
    mean = algebra.average([column(4.0), other])
    assert mean["m"].delta().item() == 2.0
    assert mean["other"].delta().item() == 0.5


def test_average_takes_scalings_and_weights_into_account() -> None:
    # 3/4 of 2 · 4 and 1/4 of 8
    assert algebra.average([column(4.0, scaling=2.0), column(8.0)], [3.0, 1.0])["m"].delta().item() == 8.0


def test_a_weight_of_zero_leaves_an_adapter_out() -> None:
    mean = algebra.average([column(4.0), column(100.0)], [1.0, 0.0])
    assert (mean["m"].rank, mean["m"].delta().item()) == (1, 4.0)


def test_task_scale_keeps_the_seed_and_scales_the_tasks_part() -> None:
    # seed 10; the experts moved by +1 and +3, in the mean by 2; λ = 2 gives 10 + 2 · 2
    merged = algebra.average([column(11.0), column(13.0)], seed=column(10.0), task_scale=2.0)
    assert merged["m"].delta().item() == 14.0
    assert algebra.average([column(11.0), column(13.0)])["m"].delta().item() == 12.0


def test_task_scale_without_a_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed"):
        algebra.average([column(1.0)], task_scale=2.0)


@pytest.mark.parametrize(
    ("given_weights", "sentence"),
    [
        ([1.0], "expected 2 weights"),
        ([1.0, -1.0], "negative"),
        ([0.0, 0.0], "all weights are zero"),
        ([1.0, math.nan], "not a finite number"),
    ],
)
def test_weights_that_make_no_mean_are_refused(given_weights: list[float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        algebra.average([column(1.0), column(2.0)], given_weights)


def test_the_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        algebra.average([])
    with pytest.raises(ConfigError, match="no adapter"):
        algebra.factor_mean([])


def test_half_precision_is_widened_so_that_the_sum_is_exact() -> None:
    # 256 + 1 has no bfloat16: it would become 256.
    total = algebra.add(column(256.0, dtype=torch.bfloat16), column(1.0, dtype=torch.bfloat16))
    assert total["m"].A.dtype == torch.float32
    assert total["m"].delta().item() == 257.0


def test_updates_of_different_shapes_are_refused_by_the_modules_name() -> None:
    with pytest.raises(AdapterMismatchError, match=r"module m: expected an update of shape \[1, 1\], got \[2, 1\]"):
        algebra.add(column(1.0), column(1.0, 2.0))


def pair(a: float, b: float) -> Adapter:
    """One module whose factors are the numbers a and b."""
    return Adapter({"m": LoraFactors(torch.tensor([[a]]), torch.tensor([[b]]), 1.0)})


def test_factor_mean_averages_a_and_b_apart() -> None:
    mean = algebra.factor_mean([(pair(1.0, 2.0), 1.0), (pair(3.0, 6.0), 3.0)])
    assert (mean["m"].A.item(), mean["m"].B.item()) == (2.5, 5.0)


def test_factor_mean_holds_one_adapter_at_a_time() -> None:
    import gc
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def stream() -> object:
        nonlocal most
        for _ in range(5):
            tensor = torch.ones(1, 1)
            alive.append(weakref.ref(tensor))
            yield Adapter({"m": LoraFactors(tensor, torch.ones(1, 1), 1.0)}), 1.0
            del tensor
            gc.collect()
            most = max(most, sum(reference() is not None for reference in alive))

    algebra.factor_mean(stream())  # type: ignore[arg-type]
    assert most <= 2  # the first, which says what to expect, and the one in hand


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (Adapter({}), "module m is missing"),
        (Adapter({"m": LoraFactors(torch.ones(2, 1), torch.ones(1, 2), 1.0)}), "module m: expected rank 1, got 2"),
        (algebra.scale(pair(1.0, 1.0), 0.5), r"module m: expected scaling 1\.0, got 0\.5"),
    ],
)
def test_factors_that_have_no_mean_are_refused_by_the_modules_name(other: Adapter, sentence: str) -> None:
    with pytest.raises(AdapterMismatchError, match=sentence):
        algebra.factor_mean([(pair(1.0, 1.0), 1.0), (other, 1.0)])


def test_factor_gap_is_the_covariance_of_the_factors() -> None:
    # mean of products (1·1 + 3·3)/2 = 5, product of means 2·2 = 4: one fifth is missing
    gap = algebra.factor_gap([pair(1.0, 1.0), pair(3.0, 3.0)])
    assert gap.overall == pytest.approx(0.2)
    assert gap.modules["m"] == pytest.approx(0.2)


def test_factor_gap_of_equal_adapters_is_zero_and_of_opposite_ones_is_one() -> None:
    assert algebra.factor_gap([pair(0.1, 0.7)] * 3).overall == pytest.approx(0.0, abs=1e-15)
    assert algebra.factor_gap([pair(1.0, 1.0), pair(-1.0, -1.0)]).overall == pytest.approx(1.0)


def test_the_norm_of_a_small_difference_keeps_its_digits() -> None:
    # A Gram matrix would see 1e8² − 1e8² here.
    left, right = column(1e8, dtype=torch.float64), column(1e8 + 1, dtype=torch.float64)
    assert algebra.norm(algebra.subtract(left, right)) == pytest.approx(1.0, rel=1e-6)


def test_cosine_is_one_along_minus_one_against_and_zero_for_nothing() -> None:
    assert algebra.cosine(column(3.0, 4.0), column(6.0, 8.0)) == pytest.approx(1.0)
    assert algebra.cosine(column(3.0, 4.0), column(-3.0, -4.0)) == pytest.approx(-1.0)
    assert algebra.cosine(column(3.0, 4.0), column(0.0, 0.0)) == 0.0


def test_inputs_are_left_as_they_were() -> None:
    adapter = column(1.0, 2.0)
    before = (adapter["m"].A.clone(), adapter["m"].B.clone())
    algebra.average([adapter, adapter])
    algebra.factor_mean([(adapter, 2.0), (adapter, 1.0)])
    assert torch.equal(adapter["m"].A, before[0])
    assert torch.equal(adapter["m"].B, before[1])
