"""The exact singular value decomposition of a sum of low-rank updates, and what follows from it: truncation.

    Σ_i w_i s_i B_i A_i = B A ,   B [out, R], A [R, in], R = Σ r_i
    B = Q_B R_B ,  Aᵀ = Q_A R_A ,  R_B R_Aᵀ = U_c S V_cᵀ    =>    U = Q_B U_c ,  V = Q_A V_c

Two thin QR decompositions and the SVD of an R × R core: O((out + in) R² + R³) operations instead of O(out · in ·
min(out, in)), and no dense update in memory. The QR stays in its Householder form, and Q is applied only to the vectors
that are kept. QR rather than Gram matrices: experts that share a seed have nearly parallel factors, whose Gram matrix
squares a condition number that is large already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.algebra import concatenate_factors, require_same_shape, wide
from seedbed.common.errors import ConfigError, nearest
from seedbed.common.gram import GramSpectrum

Rule = Literal["count", "sum", "energy"]
RULES: tuple[str, ...] = get_args(Rule)


class SVD(NamedTuple):
    """``dW = U · diag(S) · Vh`` with orthonormal columns of U and rows of Vh, and S falling."""

    U: Float[Tensor, "out rank"]
    S: Float[Tensor, " rank"]
    Vh: Float[Tensor, "rank in"]


def svd_of_sum(
    factors: Sequence[LoraFactors], weights: Sequence[float] | None = None, *, rank: int | None = None
) -> SVD:
    """The SVD of ``Σ w_i s_i B_i A_i`` of one module, exact.

    Args:
        factors: at least one; ranks may differ, shapes may not.
        weights: one for each, used as they are; None is 1 each.
        rank: compute only so many leading singular triples; None is all ``min(Σ r_i, out, in)``.

    Returns:
        In float32, or float64 if a factor has it (half precision is widened).

    Raises:
        AdapterMismatchError: if shapes differ.
    """
    terms = list(zip(factors, weights or [1.0] * len(factors), strict=True))
    total = concatenate_factors("of the sum", terms)
    left, right = _Householder(total.B), _Householder(total.A.T)
    U, S, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    k = len(S) if rank is None else min(rank, len(S))
    return SVD(left.apply(U[:, :k]), S[:k], right.apply(Vh[:k].T).T)


class _Householder:
    """``Q R`` of a matrix ``[n, R]``, with Q as reflectors: forming it would cost as much again."""

    def __init__(self, matrix: Tensor) -> None:
        self.reflectors, self.tau = torch.geqrf(matrix)
        self.R = self.reflectors[: len(self.tau)].triu()

    def apply(self, columns: Tensor) -> Tensor:
        """``Q @ columns`` for columns ``[min(n, R), k]``."""
        padded = columns.new_zeros(self.reflectors.shape[0], columns.shape[1])
        padded[: columns.shape[0]] = columns
        return torch.ormqr(self.reflectors[:, : len(self.tau)], self.tau, padded)


def truncate(svd: SVD, rank: int) -> SVD:
    """The leading `rank` singular triples: the best approximation of that rank (Eckart-Young)."""
    _require_rank(rank)
    return SVD(svd.U[:, :rank], svd.S[:rank], svd.Vh[:rank])


def keep(S: Float[Tensor, " rank"], share: float, rule: Rule = "count") -> int:
    """How many singular values are "a share of them": the paper of I-LoRA leaves open which of three readings.

    Args:
        S: singular values, falling.
        share: in (0, 1].
        rule: `count`: that share of the nonzero singular values, rounded up. `sum`: the fewest that hold that share of
            their sum. `energy`: the fewest that hold that share of the sum of their squares.

    Returns:
        At least 1, also for a zero update, since an adapter has a rank.

    Raises:
        ConfigError: if the share is outside of (0, 1] or the rule is unknown.
    """
    if rule not in RULES:
        raise ConfigError(f"there is no rule '{rule}' to keep singular values", nearest(rule, RULES))
    if not 0 < share <= 1:
        raise ConfigError(f"share {share} of the singular values is not in (0, 1]", "Give a share such as 0.8.")
    values = S.detach().double()
    nonzero = int((values > values.max() * max(len(S), 10) * torch.finfo(S.dtype).eps).sum()) if len(S) else 0
    if rule == "count" or not nonzero:
        return max(1, math.ceil(share * nonzero - 1e-9))
    held = torch.cumsum(values[:nonzero] ** (1 if rule == "sum" else 2), dim=0)
    # The comparison must not be decided by the rounding of the running sum.
    return min(nonzero, int((held < held[-1] * share * (1 - 1e-12)).sum()) + 1)


def factors_of(svd: SVD) -> LoraFactors:
    """``B = U √S``, ``A = √S Vh``, scaling 1: factors of equal size, as training and half precision like them."""
    root = svd.S.sqrt()
    return LoraFactors(root[:, None] * svd.Vh, svd.U * root, 1.0)


def compress_sum(
    factors: Sequence[LoraFactors],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    *,
    share: float | None = None,
    rule: Rule = "count",
) -> LoraFactors:
    """The best approximation of ``Σ w_i s_i B_i A_i`` by fewer ranks, for one module; see `compress`.

    For factors in float32 or less by `gram`, which takes less memory and is closer to float64 than `svd_of_sum` in float32.

    Args:
        factors: at least one; ranks may differ, shapes may not.
        weights: one for each, used as they are; None is 1 each.
        rank, share, rule: as in `compress`.

    Raises:
        ConfigError: unless exactly one of `rank` and `share` is given, and makes sense.
        AdapterMismatchError: if shapes differ.
    """
    _require_one(rank, share)
    require_same_shape("of the sum", factors)
    if _gram_suffices(factors):
        scales = [w * f.scaling for f, w in zip(factors, weights or [1.0] * len(factors), strict=True)]
        spectrum = GramSpectrum(factors, scales)
        return spectrum.truncated(rank or keep(spectrum.S.float(), share or 1.0, rule))
    svd = svd_of_sum(factors, weights, rank=rank)
    return factors_of(svd if share is None else truncate(svd, keep(svd.S, share, rule)))


def compress(adapter: Adapter, rank: int | None = None, *, share: float | None = None, rule: Rule = "count") -> Adapter:
    """The best approximation of every module by fewer ranks, with balanced factors and scaling 1.

    Args:
        adapter: of any ranks; each module's new rank is at most ``min(r, out, in)``.
        rank: the new rank, or
        share: the share of each module's singular values to keep, as `rule` reads it (see `keep`).

    Raises:
        ConfigError: unless exactly one of `rank` (1 or more) and `share` (in (0, 1]) is given.
    """
    return adapter.map(lambda factors: compress_sum([factors], rank=rank, share=share, rule=rule))


def _gram_suffices(factors: Sequence[LoraFactors]) -> bool:
    """Not for float64 (half of its digits would go), nor where the sum of ranks is above the size of the update."""
    total, device = sum(f.rank for f in factors), factors[0].A.device
    return wide(factors) == torch.float32 and 0 < total <= min(factors[0].shape) and device.type != "mps"


def _require_one(rank: int | None, share: float | None) -> None:
    if (rank is None) == (share is None):
        raise ConfigError("give either a rank or a share of singular values to keep, not both and not neither")
    if rank is not None:
        _require_rank(rank)


def _require_rank(rank: int) -> None:
    if rank < 1:
        raise ConfigError(f"rank {rank} is not 1 or more", "Give a rank such as 8.")
