"""How an expert stands among the others: the norm of its update and its cosine to the mean of theirs, exact and low-rank.

An update is what an expert adds to the seed, dW_i − dW_seed (the whole dW_i where there is no seed). All inner products come
from Gram matrices of the factors, a module at a time, in float64:

    ⟨dW_i, dW_j⟩ = s_i s_j Σ_ab (A Aᵀ)_ab (Bᵀ B)_ab   over rows a of expert i and b of expert j of the stacked factors

so N experts cost one pass over their files and R² numbers, R = Σ r_i, and no dense update is formed. Such numbers reveal a
participant that trained something else, or nothing, or with a wrong learning rate; Blanchard et al. (*Machine Learning with
Adversaries*, NeurIPS 2017) and Cao et al. (*FLTrust*, NDSS 2021) use the like against worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from seedbed.common.adapter import LoraFactors
from seedbed.common.adapter_file import AdapterFile


@dataclass(frozen=True, slots=True)
class Standing:
    """Of one expert among the others."""

    norm: float
    """Frobenius norm of its update over all modules."""
    cosine: float | None
    """To the mean of the others' updates; none where there are no others, or one of the two is zero."""


def standings(experts: Mapping[str, Path], seed: Path | None) -> dict[str, Standing]:
    """Where every expert stands.

    Args:
        experts: PEFT directories by name, of any ranks.
        seed: directory of the adapter that updates are counted from.
    """
    names = list(experts)
    files = [AdapterFile(experts[name], verify_later=True) for name in names]
    if seed is not None:
        files.append(AdapterFile(seed, verify_later=True))
    G = gram(files)
    if seed is not None:  # ⟨i − s, j − s⟩
        cross = G[-1, :-1]
        G = G[:-1, :-1] - cross[:, None] - cross[None, :] + G[-1, -1]
    return {name: _standing(G, index) for index, name in enumerate(names)}


def gram(files: Sequence[AdapterFile]) -> Float[Tensor, "N N"]:
    """Frobenius inner products of the updates of adapters, summed over modules; a module that one lacks adds nothing."""
    total = torch.zeros(len(files), len(files), dtype=torch.float64)
    for module in sorted({name for file in files for name in file.names}):
        holders = [index for index, file in enumerate(files) if module in file.names]
        total[torch.tensor(holders)[:, None], torch.tensor(holders)] += _products(
            [files[index].factors(module) for index in holders]
        )
    return total


def _products(factors: Sequence[LoraFactors]) -> Float[Tensor, "n n"]:
    A = torch.cat([one.A.double() for one in factors], dim=0)
    B = torch.cat([one.B.double() for one in factors], dim=1)
    owner = torch.zeros(len(A), len(factors), dtype=torch.float64)
    start = 0
    for index, one in enumerate(factors):
        owner[start : start + one.rank, index] = one.scaling
        start += one.rank
    products: Tensor = owner.T @ ((A @ A.T) * (B.T @ B)) @ owner
    return products


def _standing(G: Float[Tensor, "N N"], index: int) -> Standing:
    size = math.sqrt(max(0.0, float(G[index, index])))
    others = [other for other in range(len(G)) if other != index]
    if not others:
        return Standing(size, None)
    mean = math.sqrt(max(0.0, float(G[others][:, others].sum()))) / len(others)
    if size == 0 or mean == 0:
        return Standing(size, None)
    along = float(G[index, others].sum()) / len(others)
    return Standing(size, max(-1.0, min(1.0, along / (size * mean))))


def outliers(
    found: Mapping[str, Standing], *, max_norm_ratio: float | None, min_cosine: float | None
) -> dict[str, str]:
    """Experts that a gate shuts out, each with a sentence.

    Args:
        max_norm_ratio: largest norm, as a multiple of the median of the others' norms; none is no gate.
        min_cosine: smallest cosine to the mean of the others; none is no gate.
    """
    reasons = {}
    for name, standing in found.items():
        others = [other.norm for key, other in found.items() if key != name]
        usual = median(others) if others else 0.0
        if max_norm_ratio is not None and usual > 0 and standing.norm > max_norm_ratio * usual:
            reasons[name] = (
                f"the norm of its update is {standing.norm:.4g}, {standing.norm / usual:.3g} times the others' median; "
                f"expected at most {max_norm_ratio:g} times (stages.max_norm_ratio)"
            )
        elif min_cosine is not None and standing.cosine is not None and standing.cosine < min_cosine:
            reasons[name] = (
                f"the cosine of its update to the mean of the others is {standing.cosine:.3f}; "
                f"expected at least {min_cosine:g} (stages.min_cosine)"
            )
    return reasons
