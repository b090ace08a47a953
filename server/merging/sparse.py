"""Merges that leave entries out, the small ones or random ones: TIES, DARE, magnitude pruning."""

from __future__ import annotations

from pydantic import Field

from seedbed.common.adapter import LoraFactors
from seedbed.server.merging.elementwise import Majority, Rule
from seedbed.server.merging.method import Module, Options
from seedbed.server.merging.spaces import Space, merge_in_space


class EntryOptions(Options):
    """What every rule for entries can be told."""

    space: Space = "dense"
    """Whose entries: those of the update (dense), of A and of B apart (factors), or of cores in common bases (core)."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of the result, cut to the best approximation; none is the largest that an input has."""


class PruneOptions(EntryOptions):
    density: float = Field(default=0.5, ge=0, le=1, allow_inf_nan=False)
    """Share of the entries of each adapter that is kept, those of largest magnitude."""


class TiesOptions(EntryOptions):
    density: float = Field(default=0.2, ge=0, le=1, allow_inf_nan=False)
    """Share of the entries of each adapter that is kept, those of largest magnitude; 0.2 in the paper."""
    majority_sign: Majority = "total"
    """How an entry's sign is elected: by the summed values (total) or by the number of adapters (frequency)."""


class DareOptions(EntryOptions):
    density: float = Field(default=0.5, ge=0, le=1, allow_inf_nan=False)
    """Probability with which an entry is kept; what is kept is divided by it."""
    random_seed: int = Field(default=0, ge=0)
    """Which random entries are left out."""


class DareTiesOptions(DareOptions):
    majority_sign: Majority = "total"
    """How an entry's sign is elected: by the summed values (total) or by the number of adapters (frequency)."""


def ties(module: Module, options: TiesOptions) -> LoraFactors:
    """Trim each update to its largest entries, elect each entry's sign by weighted mass, then the weighted mean of the
    entries that have it: ``Σ w_i x_i / Σ w_i`` over those.

    Trimming is by module, as PEFT does it (the paper's is over all modules at once). With equal weights this is PEFT's
    `ties` (space factors) and `ties_svd` (dense) with weights 1.

    Source: Yadav et al., *TIES-Merging: Resolving Interference When Merging Models*, NeurIPS 2023.

    Raises:
        AdapterMismatchError: in space `factors`, if ranks differ.
    """
    rule = Rule("small", "agreeing", options.density, options.majority_sign)
    return merge_in_space(module, rule, options.space, options.rank, module.generator(0))


def magnitude_prune(module: Module, options: PruneOptions) -> LoraFactors:
    """``Σ w_i prune(dW_i)``: each update keeps its largest entries.

    In space `factors` it is ``(Σ w_i prune(√s_i B_i)) (Σ w_i prune(√s_i A_i))``, which with weights w is PEFT's
    `magnitude_prune` with weights w²: N identical adapters give the adapter back.

    Source: PEFT's `magnitude_prune`, after Han et al., *Learning both Weights and Connections*, NeurIPS 2015.

    Raises:
        AdapterMismatchError: in space `factors`, if ranks differ.
    """
    rule = Rule("small", "mean", options.density)
    return merge_in_space(module, rule, options.space, options.rank, module.generator(0))


def dare_linear(module: Module, options: DareOptions) -> LoraFactors:
    """``Σ w_i m_i ∘ dW_i / density`` with random masks m_i: the exact mean, in expectation (not in space `factors`).

    Source: Yu et al., *Language Models are Super Mario* (DARE), ICML 2024.

    Raises:
        AdapterMismatchError: in space `factors`, if ranks differ.
    """
    rule = Rule("random", "mean", options.density)
    return merge_in_space(module, rule, options.space, options.rank, module.generator(options.random_seed))


def dare_ties(module: Module, options: DareTiesOptions) -> LoraFactors:
    """Random entries left out and the others rescaled, as in `dare_linear`, then elected and averaged, as in `ties`.

    Source: Yu et al., *Language Models are Super Mario* (DARE), ICML 2024.

    Raises:
        AdapterMismatchError: in space `factors`, if ranks differ.
    """
    rule = Rule("random", "agreeing", options.density, options.majority_sign)
    return merge_in_space(module, rule, options.space, options.rank, module.generator(options.random_seed))
