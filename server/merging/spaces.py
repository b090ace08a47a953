"""Where a rule for entries is applied: the dense updates, the factors A and B apart, or cores in common bases.

The rules depend on the basis, so each space gives another result, and none is the right one: see METHODS of each row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from seedbed.common import algebra, lowrank
from seedbed.common.adapter import LoraFactors
from seedbed.common.partial_svd import partial_svd
from seedbed.server.merging.elementwise import Dense, LowRank, Rule, merge_entries
from seedbed.server.merging.linear import require_one_rank
from seedbed.server.merging.method import Module

Space = Literal["dense", "factors", "core"]


class Bases(NamedTuple):
    """Orthonormal columns that span all updates' columns and rows."""

    U: Float[Tensor, "out a"]
    V: Float[Tensor, "in b"]


def merge_in_space(
    module: Module, rule: Rule, space: Space, rank: int | None, generator: torch.Generator
) -> LoraFactors:
    """Apply a rule to the entries of one module's updates.

    Args:
        module: of different ranks except in `factors`.
        rule: how entries are left out and combined.
        space: `dense`: entries of dW. `factors`: entries of ``√|s| A`` and of ``√|s| B`` apart. `core`: entries of the
            updates in common bases (see `bases`), lossless and small.
        rank: of the result; none is the largest rank of an input. What has more is cut to the best approximation.
        generator: for rules that draw.

    Raises:
        AdapterMismatchError: in `factors`, if ranks differ.
    """
    wanted = rank or max(update.rank for update in module.updates)
    if space == "factors":
        return _limited(_merge_factors(module, rule, generator), wanted)
    if space == "core":
        return cut_core(*merge_cores(module, rule, generator), wanted)
    dtype = algebra.wide(module.updates)
    matrices = [LowRank(update, dtype) for update in module.updates]
    return approximate(merge_entries(matrices, module.weights, rule, generator), wanted, directions(module, wanted))


def approximate(
    dense: Float[Tensor, "out in"], rank: int, hints: Float[Tensor, "in hints"] | None = None
) -> LoraFactors:
    """The best approximation of a dense update by `rank` (`partial_svd`); all of it where `rank` is the full one."""
    if rank >= min(dense.shape):
        return whole(dense)
    return lowrank.factors_of(partial_svd(dense, rank, hints))


def whole(dense: Float[Tensor, "out in"]) -> LoraFactors:
    """A dense update as factors, one of which is the identity: exact, of full rank."""
    rows, columns = dense.shape
    identity = torch.eye(min(rows, columns), dtype=dense.dtype, device=dense.device)
    return LoraFactors(identity, dense, 1.0) if columns <= rows else LoraFactors(dense, identity, 1.0)


def directions(module: Module, rank: int) -> Float[Tensor, "in hints"]:
    """Right singular vectors of the mean: near those of any sensible merge of the same updates."""
    mean = lowrank.compress_sum(
        module.updates, module.weights, min(rank, sum(update.rank for update in module.updates))
    )
    return mean.A.T


def bases(updates: Sequence[LoraFactors]) -> Bases:
    """Left singular vectors of ``[√|s| B_1 | … | √|s| B_N]`` and of ``[√|s| A_1ᵀ | … | √|s| A_Nᵀ]``, without null ones.

    Singular vectors rather than any basis: they do not depend on the order of the adapters. In float64, so that the small
    directions in which experts of one seed differ are told from rounding.

    Source: Core Space (Panariello et al., *Accurate and Efficient Low-Rank Model Merging in Core Space*, NeurIPS 2025).
    """
    parts = [balanced(update, torch.float64) for update in updates]
    return Bases(_span(torch.cat([B for _, B in parts], dim=1)), _span(torch.cat([A for A, _ in parts]).T))


def core_of(update: LoraFactors, common: Bases) -> Float[Tensor, "a b"]:
    """``M = Uᵀ dW V``: the update in common bases that span it, so that ``U M Vᵀ = dW``."""
    A, B = balanced(update, common.U.dtype)
    return (common.U.T @ B) @ (A @ common.V)


def merge_cores(module: Module, rule: Rule, generator: torch.Generator) -> tuple[Float[Tensor, "a b"], Bases]:
    """The rule applied to the cores, and the bases in which the result stands."""
    common = bases(module.updates)
    cores = [Dense(core_of(update, common)) for update in module.updates]
    return merge_entries(cores, module.weights, rule, generator), common


def cut_core(core: Float[Tensor, "a b"], common: Bases, rank: int) -> LoraFactors:
    """``U M Vᵀ`` cut to the best approximation of at most `rank`, in float64."""
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    kept = lowrank.SVD(common.U @ U[:, :rank], S[:rank], Vh[:rank] @ common.V.T)
    return lowrank.factors_of(kept)


def balanced(update: LoraFactors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``±√|s| A`` and ``√|s| B``: the scaling half in each, its sign in A, as PEFT has it."""
    root = math.sqrt(abs(update.scaling))
    return update.A.to(dtype) * math.copysign(root, update.scaling), update.B.to(dtype) * root


def _merge_factors(module: Module, rule: Rule, generator: torch.Generator) -> LoraFactors:
    require_one_rank(module, "space factors")
    parts = [balanced(update, algebra.wide(module.updates)) for update in module.updates]
    A = merge_entries([Dense(A) for A, _ in parts], module.weights, rule, generator)
    B = merge_entries([Dense(B) for _, B in parts], module.weights, rule, generator)
    return LoraFactors(A, B, 1.0)


def _limited(update: LoraFactors, rank: int) -> LoraFactors:
    return update if update.rank <= rank else lowrank.compress_sum([update], rank=rank)


def _span(columns: Float[Tensor, "n R"]) -> Float[Tensor, "n a"]:
    """Left singular vectors of what is above rounding; at least one, also of zeros."""
    Q, R = torch.linalg.qr(columns)
    U, S, _ = torch.linalg.svd(R, full_matrices=False)
    count = int((S.max() * max(columns.shape) * torch.finfo(S.dtype).eps < S).sum()) if len(S) else 0
    span: Tensor = Q @ U[:, : max(1, count)]
    return span * signs(span)


def signs(vectors: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """±1 for each column, that of its largest entry: with it singular vectors have a sign of their own.

    A draw between x and −x goes to the positive one, so a rule for entries must not see the signs of an SVD routine.
    """
    return torch.where(vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))[0] < 0, -1.0, 1.0).to(vectors)
