"""One table of conformance over every method, then what each one is by numbers one can do in the head."""

from __future__ import annotations

import pytest
import torch

from seedbed.common import algebra
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError, ConfigError
from seedbed.server.merging import METHODS, Method, method_named
from seedbed.server.merging.svd import SvdOptions


def experts(count: int = 3, dtype: torch.dtype = torch.float64) -> list[Adapter]:
    """Adapters of one seed: two modules, rank 2."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = draw(2, 5), draw(4, 2)
    return [
        Adapter(
            {
                name: LoraFactors((A + 0.1 * draw(2, 5)).to(dtype), (B + 0.1 * draw(4, 2)).to(dtype), 0.5)
                for name in ("a", "b")
            }
        )
        for _ in range(count)
    ]


def distance(left: Adapter, right: Adapter) -> float:
    return algebra.norm(algebra.subtract(left, right))


every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


@every_method
def test_identical_inputs_are_a_fixed_point(method: Method) -> None:
    expert = experts(1)[0]
    assert distance(method.merge([expert] * 4, None), expert) < 1e-12


@every_method
def test_the_order_does_not_matter(method: Method) -> None:
    inputs, weights = experts(), [1.0, 2.0, 3.0]
    forward = method.merge(inputs, weights)
    assert distance(forward, method.merge(inputs[::-1], weights[::-1])) < 1e-12


@every_method
def test_only_the_proportions_of_weights_matter(method: Method) -> None:
    inputs = experts()
    assert distance(method.merge(inputs, [2.0] * 3), method.merge(inputs, None)) < 1e-12


@every_method
def test_the_same_inputs_give_the_same_bits_and_stay_as_they_are(method: Method) -> None:
    inputs, untouched = experts(), experts()
    one, two = (method.merge(inputs, None) for _ in range(2))
    for name in one:
        assert torch.equal(one[name].A, two[name].A)
        assert torch.equal(one[name].B, two[name].B)
        for before, after in zip(untouched, inputs, strict=True):
            assert torch.equal(before[name].A, after[name].A)
            assert torch.equal(before[name].B, after[name].B)


@every_method
def test_module_by_module_gives_the_same_as_whole_adapters(method: Method) -> None:
    inputs = experts()
    apart: dict[str, LoraFactors] = {}
    for name in ("a", "b"):
        apart |= method.merge([Adapter({name: adapter[name]}) for adapter in inputs], None)
    assert distance(method.merge(inputs, None), Adapter(apart)) < 1e-12


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_is_kept(method: Method, dtype: torch.dtype) -> None:
    merged = method.merge(experts(dtype=dtype), None)
    assert {factors.A.dtype for factors in merged.values()} == {dtype}


@every_method
def test_mixed_ranks_are_merged_exactly_or_refused_as_the_row_says(method: Method) -> None:
    low = Adapter({"m": LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    high = Adapter({"m": LoraFactors(torch.eye(2), torch.eye(2), 2.0)})
    if method.takes_mixed:
        merged = method.merge([low, high, Adapter({})], None)
        assert torch.allclose(merged["m"].delta(), torch.tensor([[1.0, 1 / 3], [1 / 3, 1.0]]), atol=1e-6)
    else:
        with pytest.raises(AdapterMismatchError, match="module m"):
            method.merge([low, high], None)


@every_method
def test_the_row_tells_a_reader_everything(method: Method) -> None:
    assert all((method.summary, method.source, method.cost, method.rank))
    assert method.function.__doc__


def test_svd_of_a_given_rank_is_the_best_there_is() -> None:
    one = Adapter({"m": LoraFactors(torch.eye(2), torch.diag(torch.tensor([8.0, 0.0])), 1.0)})
    two = Adapter({"m": LoraFactors(torch.eye(2), torch.diag(torch.tensor([0.0, 2.0])), 1.0)})
    merged = METHODS["svd"].merge([one, two], None, SvdOptions(rank=1))["m"]
    assert merged.rank == 1
    assert torch.allclose(merged.delta(), torch.diag(torch.tensor([4.0, 0.0])), atol=1e-6)


def test_factor_mean_is_not_the_mean_for_experts_that_drifted_apart() -> None:
    left, right = (
        Adapter({"m": LoraFactors(torch.tensor([[value]]), torch.tensor([[value]]), 1.0)}) for value in (1.0, -1.0)
    )
    assert METHODS["average"].merge([left, right])["m"].delta().item() == 1.0
    assert METHODS["factor_mean"].merge([left, right])["m"].delta().item() == 0.0


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no merge method 'averge'") as refusal:
        method_named("averge")
    assert refusal.value.hint == "Did you mean 'average'?"
