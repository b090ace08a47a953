"""Merges in bases that all adapters share, without a dense update: KnOTS, Core Space, and TSV-M."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from seedbed.common import algebra, lowrank
from seedbed.common.adapter import LoraFactors
from seedbed.server.merging.elementwise import Dense, Majority, Rule, merge_entries
from seedbed.server.merging.method import Module, Options
from seedbed.server.merging.spaces import cut_core, merge_cores, signs

RuleName = Literal["mean", "ties", "max_abs", "dare", "magnitude"]


class RuleOptions(Options):
    """How entries are merged once the bases are common."""

    density: float = Field(default=0.2, ge=0, le=1, allow_inf_nan=False)
    """Share of the entries of each adapter that is kept, for the rules ties, dare and magnitude."""
    majority_sign: Majority = "total"
    """How ties elects an entry's sign: by the summed values (total) or by the number of adapters (frequency)."""
    random_seed: int = Field(default=0, ge=0)
    """Which random entries the rule dare leaves out."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of the result, cut to the best approximation; none keeps all of it."""

    def entry_rule(self, name: RuleName) -> Rule:
        return {
            "mean": Rule("nothing", "mean"),
            "max_abs": Rule("nothing", "max_abs"),
            "ties": Rule("small", "agreeing", self.density, self.majority_sign),
            "dare": Rule("random", "mean", self.density),
            "magnitude": Rule("small", "mean", self.density),
        }[name]


class KnotsOptions(RuleOptions):
    rule: RuleName = "ties"
    """How the right factors are merged: mean (the exact average), ties, max_abs, dare or magnitude."""


class CoreOptions(RuleOptions):
    rule: RuleName = "mean"
    """How the cores are merged: mean (the exact average), ties, max_abs, dare or magnitude."""


class TsvOptions(Options):
    rank: int | None = Field(default=None, ge=1)
    """Rank of the result: an equal part of it from each adapter, rounded up and cut again; none is all that fit."""
    scale: float = Field(default=1.0, allow_inf_nan=False)
    """What the merged update is multiplied by; the paper's α, 1 there when it is not tuned."""


def knots(module: Module, options: KnotsOptions) -> LoraFactors:
    """One SVD of all updates side by side gives them a common left side; the right factors are then merged by a rule.

        [dW_1 | … | dW_N] = U S [V_1ᵀ | … | V_Nᵀ] ,      dW = U S · rule(V_1, …, V_N)ᵀ

    Factored: ``[s_1 B_1 | … ] = Q R_B`` and ``A_iᵀ = Q_i R_i`` leave the SVD of a ``R × R`` matrix, R = Σ r_i, and ``V_iᵀ``
    of ``R × in``. Singular values that are rounding are left out, as their vectors are noise that a rule would count.

    Source: Stoica et al., *Model merging with SVD to tie the Knots* (KnOTS), ICLR 2025.
    """
    ranks = [update.rank for update in module.updates]
    Q_B, R_B = torch.linalg.qr(torch.cat([update.B.double() * update.scaling for update in module.updates], dim=1))
    right = [torch.linalg.qr(update.A.double().T) for update in module.updates]
    core = torch.cat([part @ R_i.T for part, (_, R_i) in zip(R_B.split(ranks, dim=1), right, strict=True)], dim=1)
    U, S, W = torch.linalg.svd(core, full_matrices=False)
    left = Q_B @ U
    turned = signs(left)
    left, W = left * turned, W * turned[:, None]
    count = max(1, int((S.max() * max(core.shape) * torch.finfo(S.dtype).eps < S).sum()))
    dtype = algebra.wide(module.updates)
    widths = [Q_i.shape[1] for Q_i, _ in right]
    parts = zip(W[:count].split(widths, dim=1), right, strict=True)
    factors = [Dense((part @ Q_i.T).to(dtype)) for part, (Q_i, _) in parts]
    rule = options.entry_rule(options.rule)
    V = merge_entries(factors, module.weights, rule, module.generator(options.random_seed))
    merged = LoraFactors(V, (left[:, :count] * S[:count]).to(dtype), 1.0)
    return merged if options.rank is None else lowrank.compress_sum([merged], rank=min(options.rank, count))


def core(module: Module, options: CoreOptions) -> LoraFactors:
    """Merge the cores ``M_i = Uᵀ dW_i V`` (R × R) by a rule, in bases U and V that span all updates: ``dW = U rule(M_i) Vᵀ``.

    Lossless: with rule `mean` it is the exact average.

    Source: Panariello et al., *Accurate and Efficient Low-Rank Model Merging in Core Space*, NeurIPS 2025.
    """
    rule = options.entry_rule(options.rule)
    merged, common = merge_cores(module, rule, module.generator(options.random_seed))
    return cut_core(merged, common, options.rank or min(merged.shape))


def tsv_m(module: Module, options: TsvOptions) -> LoraFactors:
    """Each update's leading singular vectors, side by side and made orthonormal: what interferes is pushed apart.

        dW = α · polar([U_1 | … | U_N]) · diag(S_1, …, S_N) · polar([V_1 | … | V_N])ᵀ

    `polar` is the nearest matrix with orthonormal columns (Procrustes). Updates without interference are added, not
    averaged. Directions that N adapters have in common exactly have no nearest matrix, and count once. The paper keeps
    ``size / N`` singular values of each; an adapter has no more than its rank, which is the default here.

    Source: Gargiulo et al., *Task Singular Vectors: Reducing Task Interference in Model Merging*, CVPR 2025.
    """
    size, count = min(module.updates[0].shape), len(module.updates)
    # As many of each as are needed, and then the best of what they give together.
    most = max(1, size // count) if options.rank is None else -(-min(options.rank, size) // count)
    dtype = algebra.wide(module.updates)
    parts = [lowrank.svd_of_sum([update.to(dtype=torch.float64)], rank=most) for update in module.updates]
    U, V = _polar(torch.cat([svd.U for svd in parts], dim=1)), _polar(torch.cat([svd.Vh.T for svd in parts], dim=1))
    roots = torch.cat([svd.S for svd in parts]).sqrt()
    merged = LoraFactors((V * roots).T.to(dtype), (U * roots).to(dtype), options.scale)
    if options.rank is None or merged.rank <= options.rank:
        return merged
    return lowrank.compress_sum([merged], rank=options.rank)


def _polar(columns: Float[Tensor, "n R"]) -> Float[Tensor, "n R"]:
    """``P Wᵀ`` of the SVD ``P Σ Wᵀ``, without the directions whose singular value is rounding."""
    Q, R = torch.linalg.qr(columns)
    P, S, Wh = torch.linalg.svd(R, full_matrices=False)
    real = S.max() * max(columns.shape) * torch.finfo(S.dtype).eps < S
    nearest: Tensor = (Q @ P[:, real]) @ Wh[real]
    return nearest
