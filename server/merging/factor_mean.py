"""The means of A and of B apart."""

from __future__ import annotations

from collections.abc import Sequence

from seedbed.common import algebra
from seedbed.common.adapter import Adapter
from seedbed.server.merging.method import Options


def factor_mean(adapters: Sequence[Adapter], weights: Sequence[float] | None, options: Options) -> Adapter:
    """``A = Σ w_i A_i``, ``B = Σ w_i B_i`` with ``Σ w_i = 1``: the rank stays r.

    This is not the mean of the updates. It is off by ``Cov(B_i, A_i)``: little for experts of one seed, nearly
    everything for independent ones (`algebra.factor_gap` measures it).

    Source: FedIT (Zhang et al., *Towards Building the Federated GPT*, ICASSP 2024).

    Raises:
        ConfigError: if the weights make no sense.
        AdapterMismatchError: if modules, shapes, ranks or scalings differ.
    """
    return algebra.factor_mean(zip(adapters, algebra.normalized(weights, len(adapters)), strict=True))
