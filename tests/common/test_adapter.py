"""The value itself: what an adapter is, before anything is computed with it."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterFormatError


@pytest.fixture
def as_in_production() -> Iterator[None]:
    """Without the checks of annotations that tests add, which would refuse first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_update_is_scaling_times_b_times_a() -> None:
    factors = LoraFactors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 0.5)
    assert factors.delta().tolist() == [[1.5, 3.0], [2.0, 4.0]]
    assert (factors.rank, factors.shape) == (1, (2, 2))


@pytest.mark.usefixtures("as_in_production")
def test_factors_that_do_not_share_a_rank_are_refused() -> None:
    with pytest.raises(AdapterFormatError, match=r"A \[2, 4\] and B \[3, 1\]"):
        LoraFactors(torch.zeros(2, 4), torch.zeros(3, 1), 1.0)


def test_factors_of_two_dtypes_are_refused() -> None:
    with pytest.raises(AdapterFormatError, match="differ"):
        LoraFactors(torch.zeros(2, 4), torch.zeros(3, 2, dtype=torch.bfloat16), 1.0)


def test_modules_come_in_the_order_of_their_names_and_cannot_be_set() -> None:
    factors = LoraFactors(torch.zeros(1, 2), torch.zeros(3, 1), 1.0)
    adapter = Adapter({"b": factors, "a": factors})
    assert list(adapter) == ["a", "b"]
    assert adapter.parameters == 10
    with pytest.raises(TypeError):
        adapter.modules["c"] = factors  # type: ignore[index]


def test_map_gives_a_new_adapter_and_leaves_the_old_one() -> None:
    adapter = Adapter({"a": LoraFactors(torch.ones(1, 2), torch.ones(3, 1), 1.0)})
    half = adapter.map(lambda factors: factors.to(dtype=torch.bfloat16))
    assert half["a"].A.dtype == torch.bfloat16
    assert adapter["a"].A.dtype == torch.float32
