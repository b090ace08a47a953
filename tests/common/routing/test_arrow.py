"""Arrow's prototypes against dense decompositions, and its layer against PEFT's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import ConfigError
from seedbed.common.routing import Mixture, MixtureSlot, RouterSettings, arrow_prototypes, arrow_router

Make = Callable[..., Any]


def test_prototypes_are_the_leading_right_singular_vectors(expert: Make) -> None:
    experts = [expert({"a": (7, 5), "b": (4, 9)}, rank, rank) for rank in (1, 2, 4)]
    prototypes = arrow_prototypes(experts)
    for name in ("a", "b"):
        assert prototypes[name].shape == (3, experts[0][name].shape[1])
        for v, own in zip(prototypes[name], experts, strict=True):
            dense = torch.linalg.svd(own[name].delta().double())
            assert abs(float(dense.Vh[0] @ v.double())) == pytest.approx(1.0, abs=1e-6)


def test_a_close_second_direction_does_not_mix_in() -> None:
    """Singular values 1 and 0.99, where 15 steps of power iteration are still far off."""
    B = torch.diag(torch.tensor([0.99, 1.0]))
    (v,) = arrow_prototypes([Adapter({"layer": LoraFactors(torch.eye(2), B, 1.0)})])["layer"]
    torch.testing.assert_close(v.abs(), torch.tensor([0.0, 1.0]))


def test_an_expert_without_a_direction_scores_zero(expert: Make) -> None:
    silent = Adapter({"layer": LoraFactors(torch.randn(2, 5), torch.zeros(6, 2), 1.0)})
    elsewhere = expert({"other": (3, 3)}, 1, 0)
    prototypes = arrow_prototypes([expert({"layer": (6, 5)}, 2, 1), silent, elsewhere])["layer"]
    assert prototypes[0].norm() == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(prototypes[1:], torch.zeros(2, 5))


def test_settings_of_another_router_are_refused(expert: Make) -> None:
    with pytest.raises(ConfigError, match="'learned' is not arrow"):
        arrow_router([expert({"layer": (6, 5)}, 2, 1)], RouterSettings(kind="learned"))


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (4, 1.0)])
def test_the_layer_equals_pefts(top_k: int, temperature: float) -> None:
    """With singular values that fall by a half, where PEFT's power iteration has converged."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import ArrowConfig

    experts = [_separated(seed) for seed in range(4)]
    base = torch.nn.Sequential()
    base.add_module("layer", torch.nn.Linear(24, 20))
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = base(x)

    slot = MixtureSlot(base)
    settings = RouterSettings(kind="arrow", top_k=top_k, temperature=temperature)
    slot.put(Mixture(("a", "b", "c", "d"), tuple(experts), arrow_router(experts, settings)))
    with torch.no_grad():
        ours = base(x) - plain
    slot.put(None)

    names = [f"task_{index}" for index in range(4)]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["layer"])
    wrapped = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    inner = wrapped.base_model.model.layer
    for name, own in zip(names, experts, strict=True):
        inner.lora_A[name].weight.data, inner.lora_B[name].weight.data = own["layer"].A, own["layer"].B
    arrow = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    arrow.task_adapter_names, arrow.gks_adapter_names = names, []
    wrapped.add_adapter("arrow_router", LoraConfig(r=3, target_modules=["layer"], arrow_config=arrow))
    wrapped.set_adapter("arrow_router")
    wrapped.eval()
    with torch.no_grad():
        theirs = wrapped(x) - plain
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def _separated(seed: int) -> Adapter:
    """An update with singular values 4, 2, 1 and scaling 2."""
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(24, 3, generator=generator)).Q
    U = torch.linalg.qr(torch.randn(20, 3, generator=generator)).Q
    root = torch.tensor([4.0, 2.0, 1.0]).sqrt() / math.sqrt(2)
    return Adapter({"layer": LoraFactors((V * root).T.contiguous(), U * root, 2.0)})
