"""Every method against its definition: dense, naive, in float64, written down again from the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seedbed.common import algebra
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.server.merging import METHODS
from seedbed.server.merging.elementwise import Dense, Rule, keep_larger_, merge_entries

OUT, IN, RANK = 40, 60, 3
WEIGHTS = [0.5, 0.3, 0.2]


def updates(mixed: bool = False) -> list[LoraFactors]:
    """Three updates of one seed with different scalings; with `mixed` of different ranks, too."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = draw(RANK, IN), draw(OUT, RANK)
    found = [LoraFactors(A + 0.5 * draw(RANK, IN), B + 0.5 * draw(OUT, RANK), s) for s in (0.5, 1.0, 2.0)]
    if mixed:
        found[1] = LoraFactors(draw(2, IN), draw(OUT, 2), 1.0)
    return found


def merged(method: str, inputs: list[LoraFactors], weights: list[float] | None = None, **options: Any) -> Tensor:
    row = METHODS[method]
    return row.merge([Adapter({"m": update}) for update in inputs], weights, row.parse(options))["m"].delta()


def cut(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def dense(inputs: list[LoraFactors]) -> list[Tensor]:
    return [update.scaling * update.B @ update.A for update in inputs]


def trimmed(matrix: Tensor, density: float) -> Tensor:
    kept = int(density * matrix.numel())
    order = matrix.abs().flatten().argsort(descending=True)
    result = torch.zeros(matrix.numel(), dtype=matrix.dtype)
    result[order[:kept]] = matrix.flatten()[order[:kept]]
    return result.reshape(matrix.shape)


def mean(matrices: list[Tensor]) -> Tensor:
    return sum((w * m for w, m in zip(WEIGHTS, matrices, strict=True)), torch.zeros_like(matrices[0]))


def agreeing(matrices: list[Tensor]) -> Tensor:
    result = torch.zeros_like(matrices[0])
    for index in torch.cartesian_prod(*(torch.arange(n) for n in result.shape)).tolist():
        values = [float(m[tuple(index)]) for m in matrices]
        sign = 1 if sum(w * v for w, v in zip(WEIGHTS, values, strict=True)) >= 0 else -1
        agree = [(w, v) for w, v in zip(WEIGHTS, values, strict=True) if v * sign > 0]
        if agree:
            result[tuple(index)] = sum(w * v for w, v in agree) / sum(w for w, _ in agree)
    return result


def larger(matrices: list[Tensor]) -> Tensor:
    result = matrices[0]
    for other in matrices[1:]:
        result = torch.where(other.abs() > result.abs(), other, result)
    return result


RULES: dict[str, tuple[str, dict[str, Any], Callable[[list[Tensor]], Tensor]]] = {
    "ties": ("ties", {"density": 0.3}, lambda ms: agreeing([trimmed(m, 0.3) for m in ms])),
    "magnitude_prune": ("magnitude_prune", {"density": 0.3}, lambda ms: mean([trimmed(m, 0.3) for m in ms])),
    "nothing dropped": ("dare_linear", {"density": 1.0}, mean),
    "nothing dropped, elected": ("dare_ties", {"density": 1.0}, agreeing),
    "all dropped": ("dare_ties", {"density": 0.0}, lambda ms: torch.zeros_like(ms[0])),
}
every_rule = pytest.mark.parametrize(("method", "options", "rule"), RULES.values(), ids=RULES.keys())


@every_rule
@pytest.mark.parametrize("rank", [3, 10, 40])
def test_a_rule_on_dense_updates(
    method: str, options: dict[str, Any], rule: Callable[[list[Tensor]], Tensor], rank: int
) -> None:
    inputs = updates(mixed=True)
    expected = cut(rule(dense(inputs)), rank)
    assert torch.allclose(merged(method, inputs, WEIGHTS, rank=rank, **options), expected, atol=1e-6)


@every_rule
def test_a_rule_on_the_factors_apart(
    method: str, options: dict[str, Any], rule: Callable[[list[Tensor]], Tensor]
) -> None:
    inputs = updates()
    A, B = ([u.scaling**0.5 * getattr(u, side) for u in inputs] for side in "AB")
    assert torch.allclose(merged(method, inputs, WEIGHTS, space="factors", **options), rule(B) @ rule(A), atol=1e-10)


@every_rule
def test_a_rule_on_the_cores(method: str, options: dict[str, Any], rule: Callable[[list[Tensor]], Tensor]) -> None:
    inputs = updates(mixed=True)
    U = torch.linalg.svd(torch.cat([u.scaling**0.5 * u.B for u in inputs], 1), full_matrices=False).U
    V = torch.linalg.svd(torch.cat([u.scaling**0.5 * u.A for u in inputs], 0), full_matrices=False).Vh.T
    expected = U @ rule([U.T @ m @ V for m in dense(inputs)]) @ V.T
    assert torch.allclose(merged(method, inputs, WEIGHTS, space="core", rank=8, **options), expected, atol=1e-10)


def test_what_dare_keeps_is_divided_by_the_density_and_all_else_is_zero() -> None:
    matrix = torch.ones(200, 300, dtype=torch.float64)
    rule = Rule("random", "mean", 0.25)
    result = merge_entries([Dense(matrix)], [1.0], rule, torch.Generator().manual_seed(0))
    assert set(result.unique().tolist()) == {0.0, 4.0}
    assert result.mean().item() == pytest.approx(1.0, abs=0.03)


def test_ties_by_frequency_lets_two_small_votes_win_against_a_large_one() -> None:
    matrices = [Dense(torch.tensor([[value]])) for value in (1.0, 3.0, -9.0)]
    shares, generator = [1 / 3] * 3, torch.Generator()
    by = {
        how: merge_entries(matrices, shares, Rule("nothing", "agreeing", 1.0, how), generator).item()
        for how in ("total", "frequency")
    }
    assert by == {"total": pytest.approx(-9.0), "frequency": pytest.approx(2.0)}


def test_an_elected_mean_is_over_the_weights_of_those_that_agree() -> None:
    matrices = [Dense(torch.tensor([[value]])) for value in (1.0, 4.0, -1.0)]
    result = merge_entries(matrices, [0.5, 0.25, 0.25], Rule("nothing", "agreeing"), torch.Generator())
    assert result.item() == 2.0


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999])
def test_the_threshold_of_a_large_matrix_is_exact(density: float) -> None:
    """Rows of very different size, so that the sample's quantile is far off."""
    matrix = torch.randn(600, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix[::2] *= torch.linspace(0, 9, 300, dtype=torch.float64).exp()[:, None]
    result = merge_entries([Dense(matrix)], [1.0], Rule("small", "mean", density), torch.Generator())
    assert torch.equal(result, trimmed(matrix, density))


def test_of_two_entries_the_larger_is_kept_with_its_sign() -> None:
    kept, other = torch.tensor([3.0, -3.0, 1.0, 2.0, -2.0, 0.0]), torch.tensor([-1.0, 1.0, -4.0, -2.0, 2.0, 0.0])
    keep_larger_(kept, other, torch.empty(6))
    assert kept.tolist() == [3.0, -3.0, -4.0, 2.0, 2.0, 0.0]


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("shape", [(120, 90), (90, 120)])
def test_iterative_merging_with_full_decompositions(shape: tuple[int, int], rank: int) -> None:
    """Large enough that the leading triples are searched for, not computed in full."""
    generator = torch.Generator().manual_seed(2)
    inputs = [
        LoraFactors(
            torch.randn(4, shape[1], generator=generator, dtype=torch.float64),
            torch.randn(shape[0], 4, generator=generator, dtype=torch.float64),
            0.5,
        )
        for _ in range(4)
    ]
    fold = cut(dense(inputs)[0], rank)
    for matrix in dense(inputs)[1:]:
        # ⌈0.75 · 4⌉ = 3 values of each adapter are kept.
        fold = cut(larger([fold, cut(matrix, 3)]), rank)
    if rank == 4:
        fold = cut(cut(dense(inputs)[0], 3), 4)
        for matrix in dense(inputs)[1:]:
            fold = cut(larger([fold, cut(matrix, 3)]), 4)
    result = merged("iterative", inputs, retention=0.75, rank=rank)
    assert torch.linalg.norm(result - fold) / torch.linalg.norm(fold) < 1e-5


def test_iterative_merging_cut_once_at_the_end_or_never() -> None:
    inputs = updates(mixed=True)
    whole = larger(dense(inputs))
    assert torch.allclose(merged("iterative", inputs, retention=1.0, retruncate="never"), whole, atol=1e-12)
    at_end = merged("iterative", inputs, retention=1.0, retruncate="end")
    assert torch.allclose(at_end, cut(whole, 3), atol=1e-6)


def test_an_iterative_mean_without_cuts_is_the_exact_average() -> None:
    inputs = updates(mixed=True)
    for space in ("dense", "core"):
        result = merged("iterative", inputs, WEIGHTS, combine="mean", retention=1.0, retruncate="never", space=space)
        assert torch.allclose(result, mean(dense(inputs)), atol=1e-12)


def test_an_iterative_merge_in_factors_projects_them_on_what_is_kept() -> None:
    inputs = [LoraFactors(torch.eye(2, 4), torch.diag(torch.tensor([size, 1.0])), 1.0) for size in (4.0, 2.0)]
    # Of diag(4, 1) and diag(2, 1) the values 4 and 2 are kept; of A's and B's entries the larger ones.
    result = merged("iterative", inputs, space="factors", retention=0.5)
    assert torch.allclose(result, torch.tensor([[4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), atol=1e-6)


def test_quantile_of_new_keeps_of_the_merged_what_is_as_large_as_the_newest_has() -> None:
    old = LoraFactors(torch.eye(3, 5), torch.diag(torch.tensor([9.0, 5.0, 2.0])), 1.0)
    new = LoraFactors(torch.eye(3, 5), torch.diag(torch.tensor([1.0, 3.0, 6.0])), 1.0)
    # Merged 9, 5, 6; the newest adapter's median is 3, its largest value 6.
    by_median = merged("iterative", [old, new], rule="quantile_of_new", retention=0.5)
    by_largest = merged("iterative", [old, new], rule="quantile_of_new", retention=1.0)
    assert torch.allclose(by_median.diag(), torch.tensor([9.0, 5.0, 6.0]), atol=1e-5)
    assert torch.allclose(by_largest.diag(), torch.tensor([9.0, 0.0, 6.0]), atol=1e-5)


@pytest.mark.parametrize(("rule", "kept"), [("count", 3), ("sum", 2), ("energy", 1)])
def test_the_three_readings_of_a_share_keep_different_numbers(rule: str, kept: int) -> None:
    # 8, 4, 1, 1: of four values, of the sum 14, of the energy 82.
    update = LoraFactors(torch.eye(4, 6), torch.diag(torch.tensor([8.0, 4.0, 1.0, 1.0])), 1.0)
    result = merged("iterative", [update], rule=rule, retention=0.7)
    assert int(torch.linalg.matrix_rank(result)) == kept


def test_knots_merges_right_factors_of_one_common_decomposition() -> None:
    inputs = updates(mixed=True)
    U, S, Vh = torch.linalg.svd(torch.cat(dense(inputs), dim=1), full_matrices=False)
    keep = 8  # the ranks 3, 2, 3 together
    parts = [part.clone() for part in Vh[:keep].split(IN, dim=1)]
    for rule, reference in (
        ("mean", mean),
        ("max_abs", larger),
        ("ties", lambda m: agreeing([trimmed(x, 0.4) for x in m])),
    ):
        expected = (U[:, :keep] * S[:keep]) @ reference(parts)
        assert torch.allclose(merged("knots", inputs, WEIGHTS, rule=rule, density=0.4), expected, atol=1e-10)


def test_core_with_rule_mean_is_lossless() -> None:
    inputs = updates(mixed=True)
    assert torch.allclose(merged("core", inputs, WEIGHTS), mean(dense(inputs)), atol=1e-12)
    assert torch.allclose(merged("core", inputs, WEIGHTS, rank=2), cut(mean(dense(inputs)), 2), atol=1e-12)


def test_tsv_m_makes_all_singular_vectors_orthonormal() -> None:
    inputs = updates()
    found = [torch.linalg.svd(matrix, full_matrices=False) for matrix in dense(inputs)]
    U, V = (torch.cat(parts, dim=1) for parts in ([f.U[:, :3] for f in found], [f.Vh[:3].T for f in found]))
    S = torch.cat([f.S[:3] for f in found])

    def polar(matrix: Tensor) -> Tensor:
        P, _, Wh = torch.linalg.svd(matrix, full_matrices=False)
        return P @ Wh

    expected = 0.5 * (polar(U) * S) @ polar(V).T
    assert torch.allclose(merged("tsv_m", inputs, scale=0.5), expected, atol=1e-10)
    assert torch.allclose(polar(U).T @ polar(U), torch.eye(9, dtype=torch.float64), atol=1e-10)


def test_tsv_m_adds_updates_that_have_nothing_in_common() -> None:
    one = LoraFactors(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]), 1.0)
    two = LoraFactors(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [3.0]]), 1.0)
    assert torch.allclose(merged("tsv_m", [one, two]), torch.diag(torch.tensor([2.0, 3.0])), atol=1e-6)


def test_random_has_the_size_of_the_exact_average_and_nothing_else_of_it() -> None:
    inputs = updates(mixed=True)
    average = mean(dense(inputs))
    result = merged("random", inputs, WEIGHTS)
    assert torch.linalg.norm(result).item() == pytest.approx(torch.linalg.norm(average).item())
    cosine = (result * average).sum() / torch.linalg.norm(result) / torch.linalg.norm(average)
    assert abs(cosine) < 0.1
    assert torch.linalg.matrix_rank(result) == 3


def test_random_experts_have_each_its_experts_size() -> None:
    inputs = updates(mixed=True)
    result = merged("random", inputs[:1], match="experts")
    assert torch.linalg.norm(result).item() == pytest.approx(torch.linalg.norm(dense(inputs)[0]).item())
    together = merged("random", inputs, match="experts")
    assert torch.linalg.matrix_rank(together) == 8


def test_cat_takes_weights_as_they_are_also_negative_ones() -> None:
    inputs = updates(mixed=True)
    one, two, three = dense(inputs)
    assert torch.allclose(merged("cat", inputs, [1.0, -2.0, 0.5]), one - 2 * two + 0.5 * three)
    assert torch.allclose(merged("cat", inputs), one + two + three)


def test_linear_of_identical_adapters_with_shares_is_n_times_too_large() -> None:
    update = updates()[0]
    assert torch.allclose(merged("linear", [update] * 4, [0.25] * 4), 4 * update.delta())


def test_svd_of_a_given_rank_is_the_best_there_is() -> None:
    one = LoraFactors(torch.eye(2), torch.diag(torch.tensor([8.0, 0.0])), 1.0)
    two = LoraFactors(torch.eye(2), torch.diag(torch.tensor([0.0, 2.0])), 1.0)
    assert torch.allclose(merged("svd", [one, two], rank=1), torch.diag(torch.tensor([4.0, 0.0])), atol=1e-6)


def test_factor_mean_is_not_the_mean_for_experts_that_drifted_apart() -> None:
    left, right = (LoraFactors(torch.tensor([[v]]), torch.tensor([[v]]), 1.0) for v in (1.0, -1.0))
    assert merged("average", [left, right]).item() == 1.0
    assert merged("factor_mean", [left, right]).item() == 0.0


def test_a_seed_is_one_more_expert_and_tasks_are_given_back_their_size() -> None:
    def scalar(value: float) -> Adapter:
        return Adapter({"m": LoraFactors(torch.tensor([[value]]), torch.ones(1, 1), 1.0)})

    row, experts, seed = METHODS["average"], [scalar(4.0), scalar(6.0)], scalar(2.0)
    with_seed = row.merge(experts, None, row.parse({"include_seed": True}), seed)
    doubled = row.merge(experts, None, row.parse({"task_scale": 2.0}), seed)
    assert with_seed["m"].delta().item() == pytest.approx(4.0)
    # 2 + 2 · ((4 + 6) / 2 − 2)
    assert doubled["m"].delta().item() == pytest.approx(8.0)


def test_merging_never_forms_what_it_need_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factored methods work on a layer whose dense update would have 10^12 entries."""
    generator = torch.Generator().manual_seed(0)
    side = 1_000_000
    inputs = [
        Adapter(
            {
                "m": LoraFactors(
                    torch.randn(1, side, generator=generator), torch.randn(side, 1, generator=generator), 1.0
                )
            }
        )
        for _ in range(2)
    ]
    for name, row in METHODS.items():
        fields = row.options.model_fields
        values: dict[str, Any] = {"space": "core"} if "space" in fields else {}
        result = row.merge(inputs, None, row.parse(values))
        assert result["m"].shape == (side, side), name
        assert algebra.norm(result) >= 0
