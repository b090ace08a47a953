"""The exact mean of the experts' outputs."""

from __future__ import annotations

from collections.abc import Sequence

from seedbed.common import algebra
from seedbed.common.adapter import Adapter
from seedbed.server.merging.method import Options


def average(adapters: Sequence[Adapter], weights: Sequence[float] | None, options: Options) -> Adapter:
    """``dW = Σ w_i dW_i`` with ``Σ w_i = 1``, by concatenation of the factors: exact, of rank ``Σ r_i``.

    Source: *Seeded LoRA: Collaborative Fine-Tuning Through Seed Initialization* (OpenReview U3UtvOYMiw, 2024).

    Raises:
        ConfigError: if the weights make no sense.
        AdapterMismatchError: if a module has different shapes in two adapters.
    """
    return algebra.average(adapters, weights)
