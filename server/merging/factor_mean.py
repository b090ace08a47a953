"""Means of A and of B apart, as federated LoRA began; kept for comparison."""

from __future__ import annotations

from seedbed.common import algebra
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.server.merging.method import Module, Options


def factor_mean(module: Module, options: Options) -> LoraFactors:
    """``A = Σ w_i A_i`` and ``B = Σ w_i B_i``: not the mean of the updates (`algebra.factor_gap` measures it).

    Source: FedIT (Zhang et al., *Towards Building the Federated GPT*, ICASSP 2024).

    Raises:
        AdapterMismatchError: if ranks or scalings differ.
    """
    pairs = ((Adapter({module.name: update}), weight) for update, weight in module.terms)
    return algebra.factor_mean(pairs)[module.name]
