"""The exact mean of the experts' outputs, cut to a smaller rank."""

from __future__ import annotations

from pydantic import Field

from seedbed.common import lowrank
from seedbed.common.adapter import LoraFactors
from seedbed.server.merging.average import SeedOptions, seeded_terms
from seedbed.server.merging.method import Module


class SvdOptions(SeedOptions):
    rank: int | None = Field(default=None, ge=1)
    """Rank of the result, at most what the inputs have together; none is the largest that one of them has."""


def svd(module: Module, options: SvdOptions) -> LoraFactors:
    """The best approximation of ``Σ w_i dW_i``, ``Σ w_i = 1``, by `options.rank`, with no dense update (Eckart-Young).

    Source: the `svd` of PEFT's `add_weighted_adapter`; here in factored form (`lowrank.compress_sum`).
    """
    updates, weights = zip(*seeded_terms(module, options), strict=True)
    rank = options.rank or max(update.rank for update in module.updates)
    return lowrank.compress_sum(updates, weights, min(rank, sum(u.rank for u in updates), *updates[0].shape))
