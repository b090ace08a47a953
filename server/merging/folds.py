"""The running result of an iterative merge, in each of three spaces.

A fold starts as the first update. ``add(index, share)`` folds update `index` in; in a mean it weighs `share`, and what is
there already the rest. ``cut(amount)`` keeps the leading singular values. ``result()`` is an update again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seedbed.common import algebra, lowrank
from seedbed.common.adapter import LoraFactors
from seedbed.common.partial_svd import partial_svd
from seedbed.server.merging.elementwise import keep_larger_, slices
from seedbed.server.merging.spaces import balanced, bases, core_of, cut_core, whole

Combine = Literal["max_abs", "mean"]


@dataclass(frozen=True, slots=True)
class Amount:
    """How many singular values a cut keeps: at most so many, and those from a threshold on where there is one."""

    most: int
    threshold: float | None = None

    def of(self, S: Tensor) -> int:
        if self.threshold is None:
            return min(self.most, len(S))
        # The adapter's own value at the threshold must not be lost to rounding.
        return max(1, min(self.most, int(S.ge(self.threshold * (1 - 1e-5)).sum())))


class DenseFold:
    """Entries of dW. A mean stays in factors; the larger of two entries is formed in tiles, in one buffer."""

    def __init__(self, updates: Sequence[LoraFactors], combine: Combine) -> None:
        dtype = algebra.wide(updates)
        self._updates = [update.to(dtype=dtype) for update in updates]
        self._combine = combine
        self._state: LoraFactors | Tensor = self._updates[0]
        self._hints = [self._updates[0].A]
        self._buffer: Tensor | None = None

    def add(self, index: int, share: float) -> None:
        new = self._updates[index]
        if self._combine == "mean":
            assert isinstance(self._state, LoraFactors)  # a mean never leaves the factors
            self._state = algebra.concatenate_factors("of the fold", [(self._state, 1 - share), (new, share)])
        else:
            self._hints.append(new.A)
            self._state = self._larger(self._state, new)

    def _larger(self, state: LoraFactors | Tensor, new: LoraFactors) -> Tensor:
        rows, columns = new.shape
        if self._buffer is None:
            self._buffer = new.A.new_empty(rows, columns)
        scaled = new.B * new.scaling
        other, scratch = new.A.new_empty(2, *self._buffer[next(slices(rows, columns, new.A.dtype))].shape)
        for part in slices(rows, columns, new.A.dtype):
            kept = self._buffer[part]
            if isinstance(state, LoraFactors):
                torch.mm(state.B[part] * state.scaling, state.A, out=kept)
            height = kept.shape[0]
            torch.mm(scaled[part], new.A, out=other[:height])
            keep_larger_(kept, other[:height], scratch[:height])
        return self._buffer

    def cut(self, amount: Amount) -> None:
        if isinstance(self._state, LoraFactors):
            self._state = _cut_factors(self._state, amount)
        else:
            svd = _leading(self._state, amount, torch.cat(self._hints).T)
            self._state = lowrank.factors_of(svd)
        self._hints = [self._state.A]

    def result(self) -> LoraFactors:
        return self._state if isinstance(self._state, LoraFactors) else whole(self._state)


class CoreFold:
    """Entries of the updates in bases that all share: everything but two products is of size Σ r."""

    def __init__(self, updates: Sequence[LoraFactors], combine: Combine) -> None:
        self._bases = bases(updates)
        self._cores = [core_of(update, self._bases) for update in updates]
        self._combine = combine
        self._state = self._cores[0].clone()
        self._rank = min(self._state.shape)

    def add(self, index: int, share: float) -> None:
        self._rank = min(self._state.shape)
        self._state = _joined(self._state, self._cores[index], self._combine, share)

    def cut(self, amount: Amount) -> None:
        U, S, Vh = torch.linalg.svd(self._state, full_matrices=False)
        count = amount.of(S)
        self._state = (U[:, :count] * S[:count]) @ Vh[:count]
        self._rank = count

    def result(self) -> LoraFactors:
        return cut_core(self._state, self._bases, self._rank)


class FactorFold:
    """Entries of ``√|s| A`` and ``√|s| B`` apart. Cutting projects them on singular vectors, in the basis that they have."""

    def __init__(self, updates: Sequence[LoraFactors], cut: Sequence[LoraFactors], combine: Combine) -> None:
        dtype = algebra.wide(updates)
        self._factors = [
            _projected(*balanced(update, dtype), kept.rank) for update, kept in zip(updates, cut, strict=True)
        ]
        self._combine = combine
        self._state = self._factors[0]
        self._rank: int | None = None

    def add(self, index: int, share: float) -> None:
        self._rank = None
        A, B = (
            _joined(old.clone(), new, self._combine, share)
            for old, new in zip(self._state, self._factors[index], strict=True)
        )
        self._state = A, B

    def cut(self, amount: Amount) -> None:
        A, B = self._state
        self._rank = amount.of(lowrank.svd_of_sum([LoraFactors(A, B, 1.0)]).S)
        self._state = _projected(A, B, self._rank)

    def result(self) -> LoraFactors:
        update = LoraFactors(*self._state, 1.0)
        return update if self._rank is None else lowrank.compress_sum([update], rank=self._rank)


Fold = DenseFold | CoreFold | FactorFold


def _joined(state: Tensor, new: Tensor, combine: Combine, share: float) -> Tensor:
    if combine == "mean":
        return torch.lerp(state, new, share)
    keep_larger_(state, new, torch.empty_like(state))
    return state


def _cut_factors(update: LoraFactors, amount: Amount) -> LoraFactors:
    if amount.threshold is None:
        return update if update.rank <= amount.most else lowrank.compress_sum([update], rank=amount.most)
    svd = lowrank.svd_of_sum([update])
    return lowrank.factors_of(lowrank.truncate(svd, amount.of(svd.S)))


def _leading(dense: Tensor, amount: Amount, hints: Tensor) -> lowrank.SVD:
    """The singular triples that a cut keeps; where a threshold decides, more are sought until one is below it."""
    if amount.threshold is None:
        return partial_svd(dense, amount.most, hints)
    most = min(amount.most, *dense.shape)
    sought = min(most, hints.shape[1])
    while True:
        svd = partial_svd(dense, sought, hints)
        count = amount.of(svd.S)
        if count < sought or sought == most:
            return lowrank.truncate(svd, count)
        sought = min(most, 2 * sought)


def _projected(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``A V Vᵀ`` and ``U Uᵀ B`` with the leading singular vectors of ``B A``: its best approximation, in the basis it has."""
    if rank >= A.shape[0]:
        return A, B
    U, _, Vh = lowrank.svd_of_sum([LoraFactors(A, B, 1.0)], rank=rank)
    return (A @ Vh.T) @ Vh, U @ (U.T @ B)
