"""A control without any training in it: random updates of the size of the real ones."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from seedbed.common import algebra
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.server.merging.average import stack
from seedbed.server.merging.method import Module, Options


class RandomOptions(Options):
    match: Literal["average", "experts"] = "average"
    """What it is as large as: one random update with the norm of the exact average, or the average of random experts, each
    with the norm of its own."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of each random update; none is that of the largest input (average), or each expert's own (experts)."""
    random_seed: int = Field(default=0, ge=0)
    """Which random directions."""


def random(module: Module, options: RandomOptions) -> LoraFactors:
    """Gaussian A and B, scaled so that ``‖dW‖_F`` is that of the exact average, module by module.

    With `match: experts` as many random experts are averaged, each of its expert's norm: independent directions shrink
    each other, so that their average is about √N smaller than that of experts that agree.

    A merge that does not beat this has gained nothing by what the experts learned.

    Source: the control of *random LoRAs merge about as well* (arXiv 2602.12323).
    """
    generator = module.generator(options.random_seed)
    if options.match == "experts":
        drawn = [_draw(update, options.rank or update.rank, _norm(update), generator) for update in module.updates]
        return stack(list(zip(drawn, module.weights, strict=True)))
    rank = options.rank or max(update.rank for update in module.updates)
    return _draw(module.updates[0], rank, _norm(stack(module.terms)), generator)


def _draw(like: LoraFactors, rank: int, norm: float, generator: torch.Generator) -> LoraFactors:
    rows, columns = like.shape
    rank = min(rank, rows, columns)
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    B = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    size = (norm / _norm(LoraFactors(A, B, 1.0))) ** 0.5
    return LoraFactors(A * size, B * size, 1.0).to(dtype=algebra.wide([like]), device=like.A.device)


def _norm(update: LoraFactors) -> float:
    return algebra.norm(Adapter({"": update}))
