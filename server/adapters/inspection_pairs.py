"""How adapters stand to each other: angles, conflicts of sign, and what averaging their factors would get wrong.

With x and y the entries of two dense updates,

    cosine             = Σ x y / (‖x‖ ‖y‖)                                           exact, from the factors
    sign conflict      = #(x y < 0) / #(x y ≠ 0)                                     0.5 for unrelated updates
    weighted conflict  = Σ_{x y < 0} |x y| / Σ |x y| = (Σ |x y| − Σ x y) / (2 Σ |x y|)   large entries count more

Signs need the entries: those are computed in tiles of rows, of all adapters at once, and all pairs are then one matrix
product. Up to `EXACT` entries all rows are looked at, beyond that a sample of every module's rows, the same every time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from seedbed.common import algebra
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError

EXACT = 1 << 28
"""Entries of all adapters' updates together up to which signs are counted in all rows."""
_TILE = 1 << 22
"""Entries of all adapters' updates that are in memory at once."""
_FEWEST_ROWS = 16
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Pairs:
    """All pairs of N adapters: matrices of ``N × N``."""

    cosine: Matrix
    conflict: Matrix
    """Share of entries whose signs differ, of those that are zero in neither."""
    weighted: Matrix
    """The same, by the size of the entries' product."""
    rows: float
    """Share of the rows in which signs were compared; 1 is all, which is exact."""
    factor_gap: float | None
    """Relative error of averaging A and B apart; see `algebra.factor_gap`."""
    no_gap: str
    """Why there is no such number."""


class PairSums:
    """Sums over modules, fed one module at a time.

    Args:
        shapes: ``(out, in)`` of every module that will come.
        count: number of adapters.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], count: int) -> None:
        self._count = count
        entries = count * sum(rows * columns for rows, columns in shapes.values())
        self._share = min(1.0, EXACT / entries)
        self._looked = self._rows = 0
        zeros = torch.zeros(count, count, dtype=torch.float64)
        self._inner, self._signed, self._sizes = zeros, zeros.clone(), zeros.clone()
        self._differ, self._both = zeros.clone(), zeros.clone()
        self._gap = self._mean = 0.0
        self._no_gap = ""

    def add(self, name: str, updates: Sequence[LoraFactors | None]) -> None:
        """Take one module in; None where an adapter does not have it."""
        present = [(index, update) for index, update in enumerate(updates) if update is not None]
        where = torch.tensor([index for index, _ in present])
        found = [update for _, update in present]
        inner = _inner_products(found)
        self._inner[where[:, None], where] += inner
        self._add_gap(name, updates, inner)
        if len(found) > 1:
            self._add_signs(name, found, where)

    def result(self) -> Pairs:
        norms = self._inner.diagonal().clamp(min=0).sqrt()
        scale = norms[:, None] * norms
        cosine = torch.where(scale > 0, self._inner / scale, 0.0).clamp(-1, 1)
        gap = math.sqrt(self._gap / self._mean) if self._mean and not self._no_gap else None
        return Pairs(
            _matrix(cosine),
            _matrix(_ratio(self._differ, self._both)),
            _matrix(_ratio((self._sizes - self._signed) / 2, self._sizes)),
            self._looked / self._rows if self._rows else 1.0,
            gap,
            self._no_gap or ("" if gap is not None else "the mean is zero"),
        )

    def _add_gap(self, name: str, updates: Sequence[LoraFactors | None], inner: Tensor) -> None:
        if self._no_gap:
            return
        try:
            adapters = [Adapter({name: update} if update is not None else {}) for update in updates]
            ratio = algebra.factor_gap(adapters).modules[name]
        except (AdapterMismatchError, KeyError) as error:
            self._no_gap = error.message if isinstance(error, AdapterMismatchError) else f"module {name} is missing"
            return
        mean = max(0.0, float(inner.sum())) / self._count**2
        self._mean += mean
        self._gap += ratio**2 * mean

    def _add_signs(self, name: str, updates: Sequence[LoraFactors], where: Tensor) -> None:
        rows, columns = updates[0].shape
        chosen = self._sample(name, rows)
        self._looked, self._rows = self._looked + len(chosen), self._rows + rows
        factors = [(update.B.float() * update.scaling, update.A.float()) for update in updates]
        for part in torch.split(chosen, max(1, _TILE // (columns * len(updates)))):
            values = torch.stack([(B[part] @ A).reshape(-1) for B, A in factors])
            products = values @ values.T
            signs = values.sign()
            agree_less_differ = (signs @ signs.T).double()
            both = (signs.abs() @ signs.abs().T).double()
            sizes = values.abs_()
            for total, term in (
                (self._signed, products.double()),
                (self._sizes, (sizes @ sizes.T).double()),
                (self._differ, (both - agree_less_differ) / 2),
                (self._both, both),
            ):
                total[where[:, None], where] += term

    def _sample(self, name: str, rows: int) -> Tensor:
        if self._share >= 1:
            return torch.arange(rows)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        count = min(rows, max(_FEWEST_ROWS, math.floor(rows * self._share)))
        chosen: Tensor = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count]
        return chosen


def _inner_products(updates: Sequence[LoraFactors]) -> Float[Tensor, "N N"]:
    """``⟨dW_i, dW_j⟩ = s_i s_j Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ)``, all at once, in float64."""
    A = torch.cat([update.A.double() for update in updates])
    B = torch.cat([update.B.double() for update in updates], dim=1)
    of_rank = torch.zeros(len(A), len(updates), dtype=torch.float64)
    start = 0
    for index, update in enumerate(updates):
        of_rank[start : start + update.rank, index] = update.scaling
        start += update.rank
    return of_rank.T @ ((B.T @ B) * (A @ A.T)) @ of_rank


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0.0).clamp(0, 1)


def _matrix(values: Tensor) -> Matrix:
    return tuple(tuple(float(value) for value in row) for row in values)
