"""The exact mean of the experts' outputs."""

from __future__ import annotations

import torch
from pydantic import Field

from seedbed.common import algebra
from seedbed.common.adapter import LoraFactors
from seedbed.common.errors import ConfigError
from seedbed.server.merging.method import Module, Options, common_dtype


class SeedOptions(Options):
    """How a mean treats the seed that all experts share."""

    task_scale: float = Field(default=1.0, allow_inf_nan=False)
    """λ in ``dW_seed + λ Σ w_i (dW_i − dW_seed)``: 1 is the plain mean, more gives back what a mean takes from the tasks."""
    include_seed: bool = False
    """Take the seed itself for one more expert, of the mean expert's weight."""


def average(module: Module, options: SeedOptions) -> LoraFactors:
    """``dW = Σ w_i dW_i`` with ``Σ w_i = 1``, by concatenation of the factors: exact, of rank ``Σ r_i``.

    With a seed: ``dW_seed + λ Σ w_i (dW_i − dW_seed)``. Where all coefficients are equal they become the scaling and the
    factors are copied bit by bit, in half precision, too.

    Source: *Seeded LoRA: Collaborative Fine-Tuning Through Seed Initialization* (OpenReview U3UtvOYMiw, 2024).

    Raises:
        ConfigError: if an option needs the seed and there is none.
    """
    return stack(seeded_terms(module, options))


def seeded_terms(module: Module, options: SeedOptions) -> list[tuple[LoraFactors, float]]:
    """The updates and coefficients whose sum is the mean that the options describe.

    Raises:
        ConfigError: if an option needs the seed and there is none.
    """
    scale, terms = options.task_scale, module.terms
    if not options.include_seed and scale == 1.0:
        return terms
    if module.seed is None:
        what = f"task_scale {scale:g}" if scale != 1.0 else "include_seed"
        raise ConfigError(f"{what} needs the seed adapter", "Give it with --seed, or leave this option out.")
    if options.include_seed:
        # One more expert of the mean weight: N + 1 shares instead of N.
        count = len(terms)
        terms = [(update, weight * count / (count + 1)) for update, weight in terms]
        terms.append((module.seed, 1 / (count + 1)))
    terms = [(update, scale * weight) for update, weight in terms]
    return terms if scale == 1.0 else [*terms, (module.seed, 1.0 - scale)]


def stack(terms: list[tuple[LoraFactors, float]]) -> LoraFactors:
    """The exact sum of weighted updates: `algebra.concatenate_factors`, except for where the scaling stands."""
    used = [(update, weight) for update, weight in terms if weight != 0] or terms[:1]
    coefficients = {weight * update.scaling for update, weight in used}
    if len(coefficients) > 1:
        return algebra.concatenate_factors("of the sum", used)
    dtype = common_dtype(update for update, _ in used)
    A = torch.cat([update.A.to(dtype) for update, _ in used], dim=0)
    B = torch.cat([update.B.to(dtype) for update, _ in used], dim=1)
    return LoraFactors(A, B, coefficients.pop())
