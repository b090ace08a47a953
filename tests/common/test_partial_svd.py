"""Leading singular triples of dense matrices, against full decompositions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seedbed.common import partial_svd as module
from seedbed.common.errors import NonFiniteError
from seedbed.common.partial_svd import partial_svd

ROWS, COLUMNS = 150, 120
_INDEX = torch.arange(COLUMNS, dtype=torch.float64)
SPECTRA = {
    "steep": torch.exp(-_INDEX / 3),
    "slow": 1 / (1 + _INDEX).sqrt(),
    "one step, beyond the rank": torch.where(_INDEX < 26, 1.0, 0.05),
    "one step, at the rank": torch.where(_INDEX < 5, 1.0, 0.5),
    "all equal": torch.ones(COLUMNS, dtype=torch.float64),
    "straight": torch.linspace(1, 0.5, COLUMNS, dtype=torch.float64),
    "rank below that wanted": torch.where(_INDEX < 3, 1.0, 0.0),
}


def matrix_with(spectrum: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    U, V = (
        torch.linalg.qr(torch.randn(size, COLUMNS, generator=generator, dtype=torch.float64)).Q
        for size in (ROWS, COLUMNS)
    )
    return ((U * spectrum) @ V.T).to(dtype)


def missed(matrix: Tensor, result: module.SVD, rank: int) -> float:
    """Energy that the result misses, relative to what the best approximation captures."""
    exact = torch.linalg.svdvals(matrix.double())
    approximation = (result.U.double() * result.S.double()) @ result.Vh.double()
    error = torch.linalg.norm(matrix.double() - approximation) ** 2
    return float((error - exact[rank:].square().sum()) / exact[:rank].square().sum())


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-11)])
@pytest.mark.parametrize("wide", [False, True])
def test_as_much_energy_is_captured_as_the_best_there_is(
    spectrum: Tensor, dtype: torch.dtype, limit: float, wide: bool
) -> None:
    matrix = matrix_with(spectrum, dtype)
    matrix = matrix.T if wide else matrix
    result = partial_svd(matrix, 5)
    assert result.U.dtype == dtype
    assert missed(matrix, result, 5) < limit


def test_where_the_spectrum_has_a_gap_the_approximation_itself_is_exact() -> None:
    matrix = matrix_with(torch.where(_INDEX < 5, 1.0 + _INDEX.flip(0), 1.0))
    U, S, Vh = torch.linalg.svd(matrix)
    result = partial_svd(matrix, 5)
    assert torch.allclose(result.S, S[:5], atol=1e-12)
    assert torch.allclose((result.U * result.S) @ result.Vh, (U[:, :5] * S[:5]) @ Vh[:5], atol=1e-9)


@pytest.mark.parametrize("name", ["slow", "all equal"])
def test_vectors_are_orthonormal_and_values_fall(name: str) -> None:
    result = partial_svd(matrix_with(SPECTRA[name]), 5)
    assert torch.allclose(result.U.T @ result.U, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(result.Vh @ result.Vh.T, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert (result.S.diff() <= 0).all()


def test_restarts_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WIDEST", 3)
    matrix = matrix_with(SPECTRA["slow"])
    assert missed(matrix, partial_svd(matrix, 5), 5) < 1e-11


def test_hints_that_miss_the_largest_direction_do_not_hide_it() -> None:
    matrix = matrix_with(torch.where(_INDEX == 0, 10.0, torch.where(_INDEX < 6, 1.0, 0.01)))
    V = torch.linalg.svd(matrix).Vh.T
    result = partial_svd(matrix, 5, hints=V[:, 1:6])
    assert result.S[0].item() == pytest.approx(10.0)
    assert missed(matrix, result, 5) < 1e-11


def test_hints_of_any_length_even_zero_are_allowed() -> None:
    matrix = matrix_with(SPECTRA["steep"])
    V = torch.linalg.svd(matrix).Vh.T[:, :5]
    scaled = V * torch.tensor([1e9, 1.0, 1e-9, 0.0, 1.0], dtype=torch.float64)
    assert missed(matrix, partial_svd(matrix, 5, hints=scaled), 5) < 1e-11


def test_a_zero_matrix_gives_zeros() -> None:
    result = partial_svd(torch.zeros(ROWS, COLUMNS), 5)
    assert result.S.abs().max() == 0
    assert torch.isfinite(result.U).all()
    assert torch.isfinite(result.Vh).all()


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (3, 200), (200, 3)])
def test_small_sides_are_decomposed_in_full(shape: tuple[int, int]) -> None:
    matrix = torch.arange(1.0, shape[0] * shape[1] + 1).reshape(shape)
    result = partial_svd(matrix, 5)
    assert torch.allclose((result.U * result.S) @ result.Vh, matrix, atol=1e-5 * float(matrix.max()))


def test_the_same_matrix_gives_the_same_bits_and_is_not_changed() -> None:
    matrix = matrix_with(SPECTRA["slow"], torch.float32)
    before = matrix.clone()
    one, two = partial_svd(matrix, 5), partial_svd(matrix, 5)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [5, 100])
def test_what_is_no_number_is_refused(value: float, size: int) -> None:
    matrix = torch.ones(size, size)
    matrix[1, 2] = value
    with pytest.raises(NonFiniteError):
        partial_svd(matrix, 2)
