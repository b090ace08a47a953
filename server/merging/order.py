"""How much a merge depends on the order of the adapters, module by module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from seedbed.common import algebra
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.server.merging.method import Method, Options


@dataclass(frozen=True, slots=True)
class OrderSensitivity:
    """Squared Frobenius distances of results in other orders from that in the given one; they add up over modules."""

    squares: tuple[float, ...]
    """``‖dW_order − dW_given‖²``, one for each order."""
    reference: float
    """``‖dW_given‖²``."""

    @property
    def distances(self) -> tuple[float, ...]:
        """Relative distance of each order: 0 is the same result."""
        return tuple(math.sqrt(square / self.reference) if self.reference else 0.0 for square in self.squares)

    @property
    def mean(self) -> float:
        return math.fsum(self.distances) / len(self.squares)

    @property
    def largest(self) -> float:
        return max(self.distances)

    @staticmethod
    def total(modules: Iterable[OrderSensitivity]) -> OrderSensitivity:
        """Of whole adapters, from that of their modules, all measured with the same orders."""
        parts = list(modules)
        columns = zip(*(part.squares for part in parts), strict=True)
        return OrderSensitivity(tuple(math.fsum(c) for c in columns), math.fsum(part.reference for part in parts))


def random_orders(count: int, orders: int, random_seed: int) -> list[list[int]]:
    """Random permutations of `count` adapters, the same in every module; the given order is not among them, if others are."""
    generator = torch.Generator().manual_seed(random_seed)
    found: list[list[int]] = []
    while len(found) < orders:
        order = torch.randperm(count, generator=generator).tolist()
        if count < 2 or order != sorted(order):
            found.append(order)
    return found


def order_sensitivity(
    method: Method,
    name: str,
    updates: Sequence[LoraFactors | None],
    shares: Sequence[float],
    options: Options | None = None,
    *,
    orders: int = 4,
    random_seed: int = 0,
) -> OrderSensitivity:
    """Merge one module in random orders and measure how far the results are from that in the given order.

    For whole adapters call it for each module and take `OrderSensitivity.total`: the orders depend on `random_seed` only.

    Args:
        method: a row of the table.
        name: of the module; the same random numbers are drawn in every order.
        updates: as in `Method.merge_module`.
        shares: as in `Method.merge_module`; they go with their updates.
        options: of the row's own kind; none are the defaults.
        orders: how many orders, at least 1.
        random_seed: which orders.
    """
    given = Adapter({name: method.merge_module(name, updates, shares, options)})
    squares = []
    for order in random_orders(len(updates), orders, random_seed):
        moved, weights = [updates[index] for index in order], [shares[index] for index in order]
        other = Adapter({name: method.merge_module(name, moved, weights, options)})
        squares.append(algebra.norm(algebra.subtract(other, given)) ** 2)
    return OrderSensitivity(tuple(squares), algebra.norm(given) ** 2)
