"""The exact mean of the experts' outputs, cut to a smaller rank."""

from __future__ import annotations

from collections.abc import Sequence

from seedbed.common import algebra, lowrank
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.server.merging.method import Options


def svd(adapters: Sequence[Adapter], weights: Sequence[float] | None, options: Options) -> Adapter:
    """The best approximation of ``Σ w_i dW_i``, ``Σ w_i = 1``, by `options.rank`, with no dense update (Eckart-Young).

    Without a rank, each module has the largest that one of its inputs has.

    Source: the `svd` of PEFT's `add_weighted_adapter`; here in factored form (`lowrank.compress_sum`).

    Raises:
        ConfigError: if the weights or the rank make no sense.
        AdapterMismatchError: if a module has different shapes in two adapters.
    """
    shares = algebra.normalized(weights, len(adapters))
    names = sorted({name for adapter in adapters for name in adapter})
    return Adapter({name: _module(name, adapters, shares, options.rank) for name in names})


def _module(name: str, adapters: Sequence[Adapter], shares: Sequence[float], rank: int | None) -> LoraFactors:
    terms = [(adapter[name], share) for adapter, share in zip(adapters, shares, strict=True) if name in adapter]
    largest = max(factors.rank for factors, _ in terms)
    algebra.require_same_shape(name, [factors for factors, _ in terms])
    modules, weights = zip(*terms, strict=True)
    return lowrank.compress_sum(modules, weights, largest if rank is None else rank)
