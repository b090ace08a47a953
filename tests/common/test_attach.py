"""Adapters put on a model and taken off it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.attach import AdapterSlot
from seedbed.common.errors import AdapterMismatchError


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 3, bias=False)
        nn.init.eye_(self.first.weight)
        nn.init.ones_(self.second.weight)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x))


def factors(A: list[list[float]], B: list[list[float]], scaling: float = 1.0) -> LoraFactors:
    return LoraFactors(torch.tensor(A), torch.tensor(B), scaling)


ONES = torch.ones(1, 2)


@torch.inference_mode()
def test_the_update_is_scaling_times_b_a_x() -> None:
    model = Tiny()
    # A x = 1 + 1 = 2; B gives (2, 0); times 3: first(x) becomes (1 + 6, 1); second sums up.
    AdapterSlot(model).put(Adapter({"first": factors([[1.0, 1.0]], [[1.0], [0.0]], 3.0)}))
    assert model(ONES).tolist() == [[8.0, 8.0, 8.0]]


@torch.inference_mode()
def test_an_adapter_replaces_the_one_before_and_none_restores_the_base_exactly() -> None:
    model = Tiny()
    slot = AdapterSlot(model)
    slot.put(Adapter({"first": factors([[1.0, 1.0]], [[1.0], [0.0]])}))
    slot.put(Adapter({"second": factors([[1.0, 0.0]], [[1.0], [0.0], [0.0]])}))
    assert model(ONES).tolist() == [[3.0, 2.0, 2.0]]
    slot.put(None)
    assert model(ONES).tolist() == [[2.0, 2.0, 2.0]]


@torch.inference_mode()
def test_ranks_may_differ_from_module_to_module() -> None:
    model = Tiny()
    two = factors([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    AdapterSlot(model).put(Adapter({"first": factors([[1.0, 1.0]], [[0.5], [0.5]]), "second": two}))
    # first: 1 + 0.5 · 2 = 2 in each place; second: their sum 4, plus (2, 2, 0).
    assert model(ONES).tolist() == [[6.0, 6.0, 4.0]]


def test_a_bfloat16_model_takes_a_float32_adapter_and_stays_bfloat16() -> None:
    model = Tiny().to(torch.bfloat16)
    AdapterSlot(model).put(Adapter({"first": factors([[1.0, 1.0]], [[1.0], [0.0]], 3.0)}))
    with torch.inference_mode():
        output = model(ONES.to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert output.tolist() == [[8.0, 8.0, 8.0]]


def test_it_also_works_where_gradients_are_on() -> None:
    model = Tiny()
    AdapterSlot(model).put(Adapter({"first": factors([[1.0, 1.0]], [[1.0], [0.0]], 3.0)}))
    assert model(ONES).tolist() == [[8.0, 8.0, 8.0]]


def test_a_module_that_the_model_lacks_is_named_with_the_nearest() -> None:
    with pytest.raises(AdapterMismatchError, match="no module 'firsd'") as refused:
        AdapterSlot(Tiny()).put(Adapter({"firsd": factors([[1.0, 1.0]], [[1.0], [0.0]])}))
    assert "'first'" in refused.value.hint


def test_another_shape_is_refused_with_both_shapes() -> None:
    with pytest.raises(AdapterMismatchError, match=r"\[3, 2\].*\[2, 2\]"):
        AdapterSlot(Tiny()).put(Adapter({"second": factors([[1.0, 1.0]], [[1.0], [0.0]])}))


@torch.inference_mode()
def test_a_refused_adapter_leaves_the_previous_one_in_place() -> None:
    model = Tiny()
    slot = AdapterSlot(model)
    good = factors([[1.0, 1.0]], [[1.0], [0.0]], 3.0)
    slot.put(Adapter({"first": good}))
    with pytest.raises(AdapterMismatchError):
        slot.put(Adapter({"first": good, "third": good}))
    assert model(ONES).tolist() == [[8.0, 8.0, 8.0]]
