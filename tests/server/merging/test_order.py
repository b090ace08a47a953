"""How far the results of other orders are, measured."""

from __future__ import annotations

import pytest
import torch

from seedbed.common.adapter import LoraFactors
from seedbed.server.merging import METHODS
from seedbed.server.merging.order import OrderSensitivity, order_sensitivity, random_orders


def updates() -> list[LoraFactors | None]:
    generator = torch.Generator().manual_seed(0)
    return [
        LoraFactors(torch.randn(2, 30, generator=generator), torch.randn(20, 2, generator=generator), 1.0)
        for _ in range(4)
    ]


def test_a_fold_that_is_cut_at_each_step_depends_on_the_order_and_one_that_never_is_does_not() -> None:
    row, shares = METHODS["iterative"], [0.25] * 4
    found = {
        cut: order_sensitivity(row, "m", updates(), shares, row.parse({"retruncate": cut}), orders=3)
        for cut in ("each", "never")
    }
    assert 0.01 < found["each"].mean <= found["each"].largest < 1
    assert found["never"].largest < 1e-6


def test_weights_go_with_their_updates() -> None:
    row = METHODS["average"]
    assert order_sensitivity(row, "m", updates(), [0.4, 0.3, 0.2, 0.1]).largest < 1e-6


def test_the_distances_of_modules_add_up_to_those_of_the_adapter() -> None:
    parts = [OrderSensitivity((9.0, 0.0), 64.0), OrderSensitivity((16.0, 4.0), 36.0)]
    assert OrderSensitivity.total(parts).distances == (0.5, 0.2)
    assert OrderSensitivity.total(parts).largest == 0.5
    assert OrderSensitivity.total(parts).mean == pytest.approx(0.35)


def test_random_orders_are_others_than_the_given_one_and_the_same_by_seed() -> None:
    orders = random_orders(2, 3, random_seed=0)
    assert orders == [[1, 0]] * 3
    assert (
        random_orders(5, 3, random_seed=1) == random_orders(5, 3, random_seed=1) != random_orders(5, 3, random_seed=2)
    )
    assert random_orders(1, 2, random_seed=0) == [[0], [0]]
