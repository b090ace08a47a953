"""One table of conformance: every method, in every space and by every rule that it has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from seedbed.common import algebra
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError, ConfigError
from seedbed.server.merging import METHODS, Method, Options, option_rows


@dataclass(frozen=True)
class Case:
    """A method with options; `lossless` says that they leave nothing out."""

    method: str
    values: dict[str, Any] = field(default_factory=dict)
    lossless: bool = True
    ordered: bool | None = None
    weighted: bool = True

    @property
    def row(self) -> Method:
        return METHODS[self.method]

    @property
    def options(self) -> Options:
        return self.row.parse(self.values)

    @property
    def depends_on_order(self) -> bool:
        return self.row.ordered if self.ordered is None else self.ordered

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.values.items())])


def _sparse() -> list[Case]:
    cases = []
    for space in ("dense", "factors", "core"):
        for density in (0.0, 0.5, 1.0):
            given: dict[str, Any] = {"space": space, "density": density}
            whole = density == 1
            cases += [Case("ties", given | {"majority_sign": m}, whole) for m in ("total", "frequency")]
            cases.append(Case("magnitude_prune", given, whole))
            # What is never or always kept is no matter of luck, nor of the order.
            cases += [Case(name, given, whole, density == 0.5) for name in ("dare_linear", "dare_ties")]
    return cases


def _iterative() -> list[Case]:
    cases = []
    for space in ("dense", "factors", "core"):
        for combine in ("max_abs", "mean"):
            for cut in ("each", "end", "never"):
                given = {"space": space, "combine": combine, "retruncate": cut, "retention": 1.0}
                # With retention 1 the factors, which have the rank that is kept, are never cut.
                cases.append(Case("iterative", given, True, cut == "each" and space != "factors", combine == "mean"))
    rules = [{"rule": rule, "retention": 0.6} for rule in ("count", "sum", "energy")]
    cases += [Case("iterative", values, False, weighted=False) for values in rules]
    for space in ("dense", "factors", "core"):
        given = {"rule": "quantile_of_new", "retention": 0.5, "space": space}
        cases.append(Case("iterative", given, False, weighted=False))
    return [*cases, Case("iterative", {"rank": 1}, False, weighted=False)]


def _aligned() -> list[Case]:
    cases = []
    for name in ("knots", "core"):
        for rule in ("mean", "ties", "max_abs", "dare", "magnitude"):
            for density in (0.5, 1.0):
                lossless = density == 1 or rule in ("mean", "max_abs")
                cases.append(Case(name, {"rule": rule, "density": density}, lossless, rule == "dare" and density < 1))
    return cases


CASES = [
    Case("average"),
    Case("factor_mean"),
    Case("svd"),
    Case("svd", {"rank": 1}, False),
    Case("cat"),
    Case("linear"),
    *_sparse(),
    *_iterative(),
    *_aligned(),
    Case("tsv_m"),
    Case("tsv_m", {"rank": 3, "scale": 0.5}),
    Case("random"),
    Case("random", {"match": "experts"}, ordered=True),
]
LOSSLESS = [case for case in CASES if case.row.idempotent and case.lossless]
WEIGHED = [case for case in CASES if case.row.takes_weights and case.row.normalizes]
RANKED = [case for case in CASES if case.row.takes_rank and case.values.get("retruncate") != "never"]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def test_the_table_of_cases_has_every_method() -> None:
    assert {case.method for case in CASES} == set(METHODS)


def experts(count: int = 3, dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (4, 5)) -> list[Adapter]:
    """Adapters of one seed: two modules, rank 2."""
    generator = torch.Generator().manual_seed(0)
    out, width = shape

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = draw(2, width), draw(out, 2)
    return [
        Adapter(
            {
                name: LoraFactors((A + 0.1 * draw(2, width)).to(dtype), (B + 0.1 * draw(out, 2)).to(dtype), 0.5)
                for name in ("a", "b")
            }
        )
        for _ in range(count)
    ]


def distance(left: Adapter, right: Adapter) -> float:
    return algebra.norm(algebra.subtract(left, right))


@pytest.mark.parametrize("case", LOSSLESS, ids=str)
def test_identical_inputs_are_a_fixed_point(case: Case) -> None:
    expert = experts(1)[0]
    assert distance(case.row.merge([expert] * 4, None, case.options), expert) < 1e-12


@pytest.mark.parametrize("case", LOSSLESS, ids=str)
def test_one_adapter_alone_is_given_back(case: Case) -> None:
    expert = experts(1)[0]
    assert distance(case.row.merge([expert], None, case.options), expert) < 1e-12


@every_case
def test_the_order_matters_only_where_the_row_says_so(case: Case) -> None:
    # Spread out, so that what depends on the order differs visibly.
    inputs = [algebra.scale(expert, 1.0 + index) for index, expert in enumerate(experts(shape=(30, 40)))]
    if not case.row.takes_mixed:
        inputs = experts(shape=(30, 40))
    weights = [1.0, 2.0, 3.0] if case.weighted and case.row.takes_weights else None
    forward = case.row.merge(inputs, weights, case.options)
    backward = case.row.merge(inputs[::-1], weights and weights[::-1], case.options)
    gap = distance(forward, backward)
    if not case.depends_on_order:
        assert gap < 1e-9
    elif case.values.get("combine") != "mean":
        assert gap > 1e-6


@pytest.mark.parametrize("case", WEIGHED, ids=str)
def test_only_the_proportions_of_weights_matter(case: Case) -> None:
    inputs = experts()
    merged = [case.row.merge(inputs, weights, case.options) for weights in ([2.0] * 3, None)]
    assert distance(*merged) < 1e-12


@every_case
def test_the_same_inputs_give_the_same_bits_and_stay_as_they_are(case: Case) -> None:
    inputs, untouched = experts(), experts()
    one, two = (case.row.merge(inputs, None, case.options) for _ in range(2))
    for name in one:
        assert torch.equal(one[name].A, two[name].A)
        assert torch.equal(one[name].B, two[name].B)
        for before, after in zip(untouched, inputs, strict=True):
            assert torch.equal(before[name].A, after[name].A)
            assert torch.equal(before[name].B, after[name].B)


@every_case
def test_module_by_module_gives_the_same_as_whole_adapters(case: Case) -> None:
    inputs = experts()
    apart: dict[str, LoraFactors] = {}
    for name in ("b", "a"):
        apart |= case.row.merge([Adapter({name: adapter[name]}) for adapter in inputs], None, case.options)
    whole = case.row.merge(inputs, None, case.options)
    for name in whole:
        assert torch.equal(whole[name].A, apart[name].A)
        assert torch.equal(whole[name].B, apart[name].B)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_device_are_kept(case: Case, dtype: torch.dtype) -> None:
    merged = case.row.merge(experts(dtype=dtype), None, case.options)
    for factors in merged.values():
        assert (factors.A.dtype, factors.B.dtype) == (dtype, dtype)
        assert factors.A.device.type == "cpu"
        assert factors.shape == (4, 5)
        assert torch.isfinite(factors.delta()).all()


@every_case
def test_half_precision_is_computed_in_float32(case: Case) -> None:
    narrow = experts(dtype=torch.bfloat16)
    wide = [adapter.map(lambda module: module.to(dtype=torch.float32)) for adapter in narrow]
    halved, exact = (case.row.merge(inputs, None, case.options) for inputs in (narrow, wide))
    # The result is rounded once, to 8 bits.
    assert distance(halved, exact) <= 0.02 * max(algebra.norm(exact), 1e-9)


@every_case
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1), (30, 40)], ids=str)
def test_layers_of_one_row_or_column_and_larger_ones_are_merged(case: Case, shape: tuple[int, int]) -> None:
    merged = case.row.merge(experts(shape=shape), None, case.options)
    assert merged["a"].shape == shape
    assert torch.isfinite(merged["a"].delta()).all()


@every_case
def test_a_zero_adapter_is_merged_like_any_other(case: Case) -> None:
    zero = experts(1)[0].map(lambda module: LoraFactors(module.A * 0, module.B * 0, module.scaling))
    alone = case.row.merge([zero, zero], None, case.options)
    assert algebra.norm(alone) == 0
    mixed = case.row.merge([*experts(2), zero], None, case.options)
    assert all(torch.isfinite(factors.delta()).all() for factors in mixed.values())


@every_case
def test_rank_one_adapters_are_merged(case: Case) -> None:
    ones = [Adapter({"m": LoraFactors(torch.ones(1, 3) * k, torch.ones(2, 1), 1.0)}) for k in (1.0, 2.0)]
    merged = case.row.merge(ones, None, case.options)["m"]
    assert merged.shape == (2, 3)
    assert torch.isfinite(merged.delta()).all()


@every_case
def test_mixed_ranks_and_missing_modules_are_merged_or_refused_as_the_row_says(case: Case) -> None:
    low = Adapter({"m": LoraFactors(torch.ones(1, 3), torch.ones(2, 1), 1.0)})
    high = Adapter({"m": LoraFactors(torch.eye(2, 3), torch.eye(2), 2.0)})
    if not case.row.takes_mixed or case.values.get("space") == "factors":
        with pytest.raises(AdapterMismatchError, match="module m"):
            case.row.merge([low, high], None, case.options)
    else:
        merged = case.row.merge([low, high, Adapter({})], None, case.options)
        assert merged["m"].shape == (2, 3)


@pytest.mark.parametrize(
    "case",
    [
        Case("average"),
        Case("svd"),
        Case("core"),
        Case("knots", {"rule": "mean"}),
        Case("magnitude_prune", {"density": 1.0}),
        Case("dare_linear", {"density": 1.0, "space": "core"}),
        Case("iterative", {"combine": "mean", "retention": 1.0}),
    ],
    ids=str,
)
def test_an_adapter_without_the_module_is_a_zero_in_every_mean(case: Case) -> None:
    low = Adapter({"m": LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    high = Adapter({"m": LoraFactors(torch.eye(2), torch.eye(2), 2.0)})
    merged = case.row.merge([low, high, Adapter({})], None, case.options)
    assert torch.allclose(merged["m"].delta(), torch.tensor([[1.0, 1 / 3], [1 / 3, 1.0]]), atol=1e-6)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "random", "core"])
def test_another_random_seed_gives_another_result(name: str) -> None:
    rule = {"rule": "dare"} if name == "core" else {}
    merged = [METHODS[name].merge(experts(), None, METHODS[name].parse(rule | {"random_seed": n})) for n in (0, 1)]
    assert distance(*merged) > 1e-3


@pytest.mark.parametrize("name", ["dare_linear", "random"])
def test_modules_of_equal_updates_draw_different_numbers(name: str) -> None:
    same = [Adapter({"a": expert["a"], "b": expert["a"]}) for expert in experts()]
    merged = METHODS[name].merge(same)
    assert not torch.allclose(merged["a"].delta(), merged["b"].delta())


@pytest.mark.parametrize("case", RANKED, ids=str)
def test_a_rank_that_is_asked_for_is_kept_to(case: Case) -> None:
    options = case.row.parse(case.values | {"rank": 1})
    merged = case.row.merge(experts(), None, options)
    factors = merged["a"]
    limit = 3 if case.values.get("match") == "experts" else 1
    assert factors.rank <= limit
    assert torch.linalg.matrix_rank(factors.delta()) <= limit


@every_method
def test_the_row_tells_a_reader_everything(method: Method) -> None:
    assert all((method.summary, method.source, method.cost, method.rank))
    assert method.function.__doc__
    assert "Source:" in method.function.__doc__
    for name, kind, default, meaning in option_rows(method):
        assert all((kind, default)), name
        assert meaning.endswith("."), f"option {name} of {method.name} is not explained"


def test_option_rows_are_texts_for_a_reader() -> None:
    rows = {row[0]: row[1:] for row in option_rows(METHODS["iterative"])}
    assert rows["retention"][:2] == ("number", "0.8")
    assert rows["space"][:2] == ("dense | factors | core", "dense")
    assert rows["rank"][:2] == ("integer | none", "none")
    assert {row[0]: row[1:3] for row in option_rows(METHODS["average"])}["include_seed"] == ("true | false", "false")


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (2, 2), (4, 4), (6, 6), (9, 6)])
def test_tsv_m_gives_the_rank_that_is_asked_for_also_where_it_is_not_shared_out_evenly(
    rank: int, expected: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    three = [
        Adapter({"m": LoraFactors(torch.randn(2, 9, generator=generator), torch.randn(8, 2, generator=generator), 1.0)})
        for _ in range(3)
    ]
    row = METHODS["tsv_m"]
    assert row.merge(three, None, row.parse({"rank": rank}))["m"].rank == expected


def test_none_is_written_as_the_list_of_methods_writes_it_and_a_switch_is_no_number() -> None:
    assert METHODS["ties"].parse({"rank": "none"}) == METHODS["ties"].parse({"rank": None})
    for values in ({"rank": True}, {"density": True}):
        with pytest.raises(ConfigError, match="got true"):
            METHODS["ties"].parse(values)
    with pytest.raises(ConfigError, match=r"'density'.*none"):
        METHODS["ties"].parse({"density": "none"})
