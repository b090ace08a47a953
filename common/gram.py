"""Truncation of a sum of low-rank updates through Gram matrices in float64, for factors in float32 or less.

    dW = Σ_i c_i B_i A_i = B A ,  R = Σ r_i ,   G_B = Bᵀ B ,  G_A = A Aᵀ = Cᵀ C     (all R × R)
    dWᵀ dW = Q (C G_B Cᵀ) Qᵀ  with orthonormal Q,  C G_B Cᵀ = V S² Vᵀ
    B_k = B · (Cᵀ V_k S_k^(-1/2)) ,   A_k = (S_k^(-3/2) V_kᵀ C G_B) · A

A Gram matrix squares the condition number, but in float64 that leaves √ε = 1.5e-8 of ‖B‖‖A‖, below float32's own
ε = 6e-8: so this is more exact than QR and SVD in float32. Neither Q nor an inverse of C is ever formed, so
parallel factors (experts that share a seed) and zero factors do no harm. Nor are all factors stacked at once: they are
stacked and widened a slice at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from seedbed.common.adapter import LoraFactors

_SLICES, _NARROWEST = 4, 256
"""A is stacked and widened in so many parts along its columns (B along its rows), none narrower than this: less memory than
all at once, and products still large enough to run at full speed."""


class GramSpectrum:
    """Singular values of ``Σ c_i B_i A_i``, and its best approximation by the first k of them.

    Args:
        factors: at least one, of one shape and device, not in float64 themselves.
        coefficients: c_i, one for each; the factors' own scalings are not looked at.

    Attributes:
        S: singular values, falling, in float64, exact to about 1.5e-8 of ``‖B‖ ‖A‖``.
    """

    S: Float[Tensor, " R"]

    def __init__(self, factors: Sequence[LoraFactors], coefficients: Sequence[float]) -> None:
        self._factors = factors
        device = factors[0].A.device
        ranks = [f.rank for f in factors]
        scales = [torch.full((rank,), c, dtype=torch.float64) for rank, c in zip(ranks, coefficients, strict=True)]
        self._scale = torch.cat(scales).to(device)
        G_A = _gram([f.A for f in factors], dim=0)
        G_B = _gram([f.B for f in factors], dim=1) * self._scale[:, None] * self._scale
        self._C = _square_root(G_A)
        self._CG = self._C @ G_B
        squares, V = torch.linalg.eigh(self._CG @ self._C.T)
        self.S = squares.clamp(min=0).sqrt().flip(0)
        self._V = V.flip(1)

    def truncated(self, rank: int) -> LoraFactors:
        """The best approximation by `rank`, balanced (``B = U √S``, ``A = √S Vh``), in float32, scaling 1."""
        S, V = self.S[:rank], self._V[:, :rank]
        # What is zero to the precision of S stays zero, rather than noise divided by noise.
        inverse = torch.where(S.gt(1e-12 * self.S[0]), 1 / S, 0)
        left = (self._C.T @ V * inverse.sqrt()) * self._scale[:, None]
        right = (V.T @ self._CG) * inverse.pow(1.5)[:, None]
        A = _product(right.float(), [f.A for f in self._factors], dim=0)
        B = _product(left.float().T, [f.B for f in self._factors], dim=1)
        return LoraFactors(A, B.T.contiguous(), 1.0)


def _slices(factors: Sequence[Tensor], dim: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the stacked factors (A along `dim` 0, B along 1), as ``[R, width]``."""
    n = factors[0].shape[1 - dim]
    width = max(_NARROWEST, -(-n // _SLICES))
    for start in range(0, n, width):
        part = slice(start, min(start + width, n))
        stacked = torch.cat([f[:, part] if dim == 0 else f[part] for f in factors], dim)
        yield part, stacked if dim == 0 else stacked.T


def _gram(factors: Sequence[Tensor], dim: int) -> Float[Tensor, "R R"]:
    """``X Xᵀ`` in float64 of the stacked factors X."""
    R = sum(f.shape[dim] for f in factors)
    total = torch.zeros(R, R, dtype=torch.float64, device=factors[0].device)
    half = (R + 1) // 2
    for _, part in _slices(factors, dim):
        wide = part.double()
        # The result is symmetric: a quarter of it need not be computed.
        total[:, :half].addmm_(wide, wide[:half].T)
        total[half:, half:].addmm_(wide[half:], wide[half:].T)
    total[:half, half:] = total[half:, :half].T
    return total


def _product(coefficients: Float[Tensor, "k R"], factors: Sequence[Tensor], dim: int) -> Float[Tensor, "k n"]:
    """``coefficients · X`` of the stacked factors X, in the coefficients' dtype."""
    product = coefficients.new_empty(len(coefficients), factors[0].shape[1 - dim])
    for part, stacked in _slices(factors, dim):
        torch.mm(coefficients, stacked.to(coefficients.dtype), out=product[:, part])
    return product


def _square_root(G: Float[Tensor, "R R"]) -> Float[Tensor, "R R"]:
    """Some C with ``CᵀC = G``: Cholesky's, or where G is singular to rounding, that of the eigenvectors."""
    C, failed = torch.linalg.cholesky_ex(G, upper=True)
    if int(failed):
        values, vectors = torch.linalg.eigh(G)
        C = values.clamp(min=0).sqrt()[:, None] * vectors.T
    root: Tensor = C
    return root
