"""What a method refuses, and what it says then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError, ConfigError, NonFiniteError
from seedbed.server.merging import METHODS, method_named

ONE = Adapter({"m": LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)})


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no merge method 'averge'") as refusal:
        method_named("averge")
    assert refusal.value.hint == "Did you mean 'average'?"


def test_an_unknown_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'ties' has no option 'densty'") as refusal:
        METHODS["ties"].parse({"densty": 0.5})
    assert refusal.value.hint == "Did you mean 'density'?"


@pytest.mark.parametrize(
    ("method", "values", "says"),
    [
        ("iterative", {"retention": 0.0}, "'retention': Input should be greater than 0"),
        ("iterative", {"retention": 1.1}, "'retention': Input should be less than or equal to 1"),
        ("iterative", {"retention": float("nan")}, "'retention'"),
        ("iterative", {"rule": "most"}, "'rule': Input should be 'count'"),
        ("iterative", {"retruncate": "never", "rank": 2}, "retruncate 'never' cuts to no rank"),
        ("iterative", {"retruncate": "never", "rule": "quantile_of_new"}, "'never' forbids"),
        ("ties", {"density": -0.1}, "'density': Input should be greater than or equal to 0"),
        ("dare_linear", {"density": 1.5}, "'density': Input should be less than or equal to 1"),
        ("magnitude_prune", {"density": "much"}, "'density': Input should be a valid number"),
        ("ties", {"space": "fourier"}, "'space': Input should be 'dense', 'factors' or 'core'"),
        ("svd", {"rank": 0}, "'rank': Input should be greater than or equal to 1"),
        ("dare_ties", {"random_seed": -1}, "'random_seed'"),
        ("tsv_m", {"scale": float("inf")}, "'scale': Input should be a finite number"),
    ],
)
def test_a_wrong_value_is_named_with_its_option(method: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        METHODS[method].parse(values)
    assert refusal.value.hint


@pytest.mark.parametrize(
    "method", [row for row in METHODS.values() if row.takes_weights and row.normalizes], ids=lambda row: row.name
)
@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1.0, -1.0], "negative"),
        ([0.0, 0.0], "all weights are zero"),
        ([1.0, float("nan")], "finite"),
        ([1.0], "expected 2 weights"),
    ],
)
def test_weights_that_make_no_shares_are_refused(method: Any, weights: list[float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        method.merge([ONE, ONE], weights)


@pytest.mark.parametrize("name", ["cat", "linear"])
def test_weights_that_are_taken_as_given_may_be_negative_but_not_all_zero(name: str) -> None:
    METHODS[name].merge([ONE, ONE], [1.0, -0.5])
    with pytest.raises(ConfigError, match="all weights are zero"):
        METHODS[name].merge([ONE, ONE], [0.0, 0.0])


def test_weights_are_refused_where_a_method_would_not_look_at_them() -> None:
    with pytest.raises(ConfigError, match="'tsv_m' takes no weights"):
        METHODS["tsv_m"].merge([ONE, ONE], [1.0, 2.0])
    with pytest.raises(ConfigError, match="'max_abs' takes no weights"):
        METHODS["iterative"].merge([ONE, ONE], [1.0, 2.0])


@pytest.mark.parametrize("values", [{"task_scale": 2.0}, {"include_seed": True}])
@pytest.mark.parametrize("name", ["average", "svd"])
def test_an_option_that_needs_the_seed_is_refused_without_it(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))}.* needs the seed"):
        METHODS[name].merge([ONE, ONE], None, METHODS[name].parse(values))


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties", "magnitude_prune", "iterative"])
def test_factors_of_different_ranks_are_refused_with_a_way_out(name: str) -> None:
    two = Adapter({"m": LoraFactors(torch.ones(2, 2), torch.ones(2, 2), 1.0)})
    with pytest.raises(
        AdapterMismatchError, match="module m: 'space factors' needs one rank, expected 1, got 2"
    ) as refusal:
        METHODS[name].merge([ONE, two], None, METHODS[name].parse({"space": "factors"}))
    assert "dense" in refusal.value.hint


def test_linear_refuses_a_missing_module_and_another_rank() -> None:
    two = Adapter({"m": LoraFactors(torch.ones(2, 2), torch.ones(2, 2), 1.0)})
    with pytest.raises(AdapterMismatchError, match="module m"):
        METHODS["linear"].merge([ONE, two])
    with pytest.raises(AdapterMismatchError, match="module m is missing"):
        METHODS["linear"].merge([ONE, Adapter({})])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_updates_of_different_layers_are_refused(method: Any) -> None:
    other = Adapter({"m": LoraFactors(torch.ones(1, 3), torch.ones(2, 1), 1.0)})
    with pytest.raises(AdapterMismatchError, match="module m"):
        method.merge([ONE, other])
    with pytest.raises(ConfigError, match="no adapter to merge"):
        method.merge([])


@pytest.mark.parametrize("name", ["ties", "magnitude_prune", "iterative"])
def test_updates_that_hold_no_numbers_are_refused(name: str) -> None:
    broken = Adapter({"m": LoraFactors(torch.full((1, 2), float("nan")), torch.ones(2, 1), 1.0)})
    with pytest.raises(NonFiniteError, match="NaN"):
        METHODS[name].merge([ONE, broken], None, METHODS[name].parse({"rank": 1}))
