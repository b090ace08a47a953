"""The leading singular triples of a dense matrix, far below the cost of all of them: block Lanczos from a good start.

    Q ← orth(D V) ,  V ← orth(Dᵀ Q) ,  …      each half step one pass over D, all blocks are kept
    E_k = Σ_{i≤k} σ_i(D V)²                    the energy that the best k directions of the basis capture, never falling

Merging makes matrices ``[out, in]`` that are dense only because a rule was applied to each entry: what is low-rank in them
lies near the inputs' own singular vectors, and those are where the search starts. Four passes are then enough.
A full decomposition of 4096 × 4096 takes over a minute, a pass some ten milliseconds.

Method: Golub and Kahan's bidiagonalization in blocks with full orthogonalization and thick restart (Baglama and Reichel,
*Augmented implicitly restarted Lanczos bidiagonalization methods*, 2005); with a random start it does not need a gap in the
spectrum (Musco and Musco, *Randomized block Krylov methods for stronger and faster approximate SVD*, 2015).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seedbed.common.errors import NonFiniteError
from seedbed.common.lowrank import SVD

_EXTRA = 6
"""Random directions beside those wanted: what the hints do not know is found through them."""
_WIDEST = 10
"""Blocks in the basis before it is restarted from its best directions: more take longer to orthogonalize than they save."""
_PASSES = 200
"""Never reached by a matrix that was not made to: only a bound on the time."""


def partial_svd(
    matrix: Float[Tensor, "m n"],
    rank: int,
    hints: Float[Tensor, "n hints"] | None = None,
    tolerance: float | None = None,
) -> SVD:
    """The leading `rank` singular triples, close to optimal in what they capture.

    With the best ``D_k`` and the result ``D̃_k``, ``‖D − D̃_k‖² ≤ ‖D − D_k‖² + tolerance · ‖D_k‖²``, as far as the gain of
    the last passes tells what further ones would gain. Where singular values k and k + 1 are apart, ``D̃_k`` itself is within
    about 1e-5 of ``D_k`` (float32); where they are equal, the best approximation is not unique, and this is one as good.
    Measured against full decompositions in float64, on spectra from one step to none at all: 1e-7 in float32 and 1e-12 in
    float64, except where dozens of values lie within 1e-4 of value k: there float32 tells them apart no better than that.

    Args:
        matrix: D, in float32 or float64; unchanged.
        rank: k, at least 1; cut to ``min(m, n)``.
        hints: directions of the right singular vectors, of any length, for instance the rows of the inputs' A.
        tolerance: relative energy that may be missed; None is 1e-7 in float32 and 1e-13 in float64.

    Returns:
        In the matrix's dtype, S falling. The same inputs give the same bits.

    Raises:
        NonFiniteError: if the matrix holds NaN or infinity, or so large numbers that their squares are.
    """
    rank = min(rank, *matrix.shape)
    width = max(rank, 0 if hints is None else hints.shape[1]) + _EXTRA
    if min(matrix.shape) <= 2 * width:
        _require_finite(matrix)
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return SVD(U[:, :rank], S[:rank], Vh[:rank])
    search = _Search(matrix, rank)
    target = tolerance if tolerance is not None else (1e-7 if matrix.dtype == torch.float32 else 1e-13)
    search.begin(_start(matrix, width, hints))
    progress = _Progress(target, torch.finfo(matrix.dtype).eps)
    for _ in range(_PASSES):
        if progress.reached(search.energy):
            break
        if search.step():
            progress.forget()  # a restart gains nothing itself, which must not look like the end
    # Energies see errors of the vectors only squared, so in float32 not below 1e-4: one pass more makes them 1e-5.
    search.step()
    return search.triples()


def _start(matrix: Tensor, width: int, hints: Tensor | None) -> Tensor:
    """The hints and random directions, `width` in all, orthonormal."""
    n = matrix.shape[1]
    known = 0 if hints is None else hints.shape[1]
    generator = torch.Generator().manual_seed(n * 1_000_003 + width)
    block = torch.randn(n, width - known, generator=generator, dtype=torch.float64).to(matrix)
    if hints is not None:
        # Columns of one length: QR must not take a short but real direction for rounding.
        unit = hints.to(matrix) / torch.linalg.vector_norm(hints, dim=0).clamp(min=1e-30).to(matrix)
        block = torch.cat([unit, block / n**0.5], dim=1)
    return orthonormal(block)


def orthonormal(columns: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Q of a thin QR decomposition."""
    Q: Tensor = torch.linalg.qr(columns).Q
    return Q


def _require_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            "a merged update holds NaN, infinity, or numbers near the largest there are",
            "Check the adapters that are merged.",
        )


class _Side:
    """An orthonormal basis of one side, its image under the matrix, and the image's Gram matrix, all growing by blocks."""

    def __init__(self, apply: Tensor) -> None:
        self.apply = apply
        self.basis = apply.new_empty(apply.shape[1], 0)
        self.image = apply.new_empty(apply.shape[0], 0)
        self.gram = torch.zeros(0, 0, dtype=torch.float64, device=apply.device)

    def extend(self, block: Tensor) -> Tensor:
        """Take what is new in a block into the basis; returns its image."""
        room = self.basis.shape[0] - self.basis.shape[1]
        new = self._orthonormal(block[:, : max(0, room)])
        image = (new.T @ self.apply.T).T  # as `apply @ new`, in the order that is faster where `apply` is transposed
        self._append(new, image)
        return image

    def restart(self, width: int) -> None:
        """Keep only the `width` best directions; no pass over the matrix."""
        vectors = self._best(width)
        basis, image = self.basis @ vectors, self.image @ vectors
        self.basis, self.image, self.gram = basis[:, :0], image[:, :0], self.gram[:0, :0]
        self._append(basis, image)

    def energy(self, rank: int) -> float:
        return float(torch.linalg.eigvalsh(self.gram)[-rank:].clamp(min=0).sum())

    def triples(self, rank: int) -> SVD:
        """Of ``image · basisᵀ``; U is on the image's side."""
        vectors = self._best(rank)
        Q, R = torch.linalg.qr(self.image @ vectors)
        u, S, vh = torch.linalg.svd(R)
        return SVD(Q @ u, S, vh @ (self.basis @ vectors).T)

    def _best(self, rank: int) -> Tensor:
        vectors: Tensor = torch.linalg.eigh(self.gram).eigenvectors
        return vectors[:, -rank:].flip(1).to(self.basis)

    def _orthonormal(self, block: Tensor) -> Tensor:
        # Twice is enough, also where a block lies all but within the basis.
        for _ in range(2):
            block = orthonormal(block - self.basis @ (self.basis.T @ block))
        return block

    def _append(self, new: Tensor, image: Tensor) -> None:
        self.basis = torch.cat([self.basis, new], dim=1)
        self.image = torch.cat([self.image, image], dim=1)
        column = self.image.double().T @ image.double()
        _require_finite(column)
        old, both = self.gram.shape[0], column.shape[0]
        gram = column.new_empty(both, both)
        gram[:old, :old], gram[:, old:], gram[old:, :old] = self.gram, column, column[:old].T
        self.gram = gram


class _Search:
    """Half steps in turn: from the right basis through D to the left one, and back through Dᵀ."""

    def __init__(self, matrix: Tensor, rank: int) -> None:
        self._rank = rank
        self._sides = (_Side(matrix), _Side(matrix.T))
        self._turn = 0

    def begin(self, block: Tensor) -> None:
        self._width = block.shape[1]
        self._image = self._sides[0].extend(block)

    def step(self) -> bool:
        """Go on by one pass; says whether it was a restart."""
        self._turn = 1 - self._turn
        side = self._sides[self._turn]
        full = side.basis.shape[1] >= _WIDEST * self._width and side.basis.shape[0] > (_WIDEST + 1) * self._width
        if full:
            self._restart()
        else:
            self._image = side.extend(self._image)
        return full

    def _restart(self) -> None:
        latest = self._sides[1 - self._turn]
        latest.restart(self._width)
        other = self._sides[self._turn]
        other.basis, other.image, other.gram = other.basis[:, :0], other.image[:, :0], other.gram[:0, :0]
        self._image = other.extend(latest.image)

    @property
    def energy(self) -> float:
        return self._sides[self._turn].energy(self._rank)

    def triples(self) -> SVD:
        U, S, Vh = self._sides[self._turn].triples(self._rank)
        return SVD(U, S, Vh) if self._turn == 0 else SVD(Vh.T, S, U.T)


class _Progress:
    """Whether further passes would gain less than the tolerance, by the last two gains and the ratio between them."""

    def __init__(self, tolerance: float, rounding: float) -> None:
        self._tolerance = tolerance
        self._rounding = rounding
        self._energies: list[float] = []

    def forget(self) -> None:
        self._energies.clear()

    def reached(self, energy: float) -> bool:
        self._energies.append(energy)
        if len(self._energies) < 3 or energy == 0:
            return energy == 0
        before, middle, last = self._energies[-3:]
        gains = (middle - before, last - middle)
        if max(gains[1], 0) <= self._rounding * energy:
            return True
        ratio = gains[1] / gains[0] if gains[0] > gains[1] else 1.0
        # A geometric series; ratios near 1 say little, so that its sum is not believed beyond 100 gains.
        ahead = gains[1] * min(100.0, ratio / (1 - ratio) if ratio < 1 else 100.0)
        return ahead <= self._tolerance * energy
