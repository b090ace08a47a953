"""PEFT's own merges as an oracle, where PEFT is right: small layers, several adapters, plain scaling alpha / r."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.server.merging import METHODS

OUT, IN, RANK = 20, 30, 2


def updates(scalings: tuple[float, ...]) -> list[LoraFactors]:
    generator = torch.Generator().manual_seed(3)
    return [
        LoraFactors(torch.randn(RANK, IN, generator=generator), torch.randn(OUT, RANK, generator=generator), scaling)
        for scaling in scalings
    ]


def peft_merged(inputs: list[LoraFactors], weights: list[float], kind: str, **settings: Any) -> Tensor:
    """The update of PEFT's merged adapter."""
    model = torch.nn.Sequential()
    model.add_module("layer", torch.nn.Linear(IN, OUT, bias=False))
    names = [f"expert{index}" for index in range(len(inputs))]
    configs = [LoraConfig(r=RANK, lora_alpha=int(RANK * u.scaling), target_modules=["layer"]) for u in inputs]
    wrapped = get_peft_model(model, configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        wrapped.add_adapter(name, config)
    layer = wrapped.base_model.model.layer
    for name, update in zip(names, inputs, strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = update.A.clone(), update.B.clone()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # density 1 is no mistake here
        wrapped.base_model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **settings)
    merged: Tensor = layer.get_delta_weight("merged").detach()
    return merged


def ours(method: str, inputs: list[LoraFactors], weights: list[float] | None, **values: Any) -> Tensor:
    row = METHODS[method]
    return row.merge([Adapter({"layer": u}) for u in inputs], weights, row.parse(values))["layer"].delta()


MIXED, EQUAL = (1.0, 2.0, 3.0), (2.0, 2.0, 2.0)
THIRDS, NINTHS, ONES = [1 / 3] * 3, [1 / 9] * 3, [1.0] * 3


def close(left: Tensor, right: Tensor) -> bool:
    return bool(torch.linalg.norm(left - right) <= 1e-5 * torch.linalg.norm(right))


@pytest.mark.parametrize("weights", [[0.2, 0.3, 0.5], [1.0, -1.0, 2.0]])
@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_weighted_sums_take_weights_as_peft_does(kind: str, weights: list[float]) -> None:
    inputs = updates(MIXED)
    assert close(ours(kind, inputs, weights), peft_merged(inputs, weights, kind))


@pytest.mark.parametrize("rank", [2, 4])
def test_svd_is_pefts(rank: int) -> None:
    inputs, weights = updates(MIXED), [0.2, 0.3, 0.5]
    assert close(ours("svd", inputs, weights, rank=rank), peft_merged(inputs, weights, "svd", svd_rank=rank))


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_on_dense_updates_is_pefts_ties_svd_with_weights_one(majority: str, density: float) -> None:
    inputs = updates(MIXED)
    theirs = peft_merged(inputs, ONES, "ties_svd", density=density, majority_sign_method=majority, svd_rank=5)
    assert close(ours("ties", inputs, None, density=density, majority_sign=majority, rank=5), theirs)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_on_factors_is_pefts_ties_with_weights_one(majority: str, density: float) -> None:
    inputs = updates(EQUAL)
    theirs = peft_merged(inputs, ONES, "ties", density=density, majority_sign_method=majority)
    assert close(ours("ties", inputs, None, space="factors", density=density, majority_sign=majority), theirs)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_magnitude_pruning_of_dense_updates_is_pefts_with_the_same_weights(density: float) -> None:
    inputs = updates(MIXED)
    theirs = peft_merged(inputs, THIRDS, "magnitude_prune_svd", density=density, svd_rank=5)
    assert close(ours("magnitude_prune", inputs, None, density=density, rank=5), theirs)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_magnitude_pruning_of_factors_is_pefts_with_squared_weights(density: float) -> None:
    inputs = updates(MIXED)
    theirs = peft_merged(inputs, NINTHS, "magnitude_prune", density=density)
    assert close(ours("magnitude_prune", inputs, None, space="factors", density=density), theirs)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare_that_drops_nothing_is_pefts(kind: str) -> None:
    inputs = updates(MIXED)
    weights = THIRDS if kind == "dare_linear" else ONES
    theirs = peft_merged(inputs, weights, f"{kind}_svd", density=1.0, svd_rank=5)
    assert close(ours(kind, inputs, None, density=1.0, rank=5), theirs)
