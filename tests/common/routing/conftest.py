"""Small experts, a small base model, and the routed sum in its plainest form: loops over tokens and experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.config import BaseModelConfig
from seedbed.common.routing import Mixture, Router, RouterSettings, arrow_router, by_sequence, phatgoose_router

Shapes = dict[str, tuple[int, int]]


def draw_expert(shapes: Shapes, rank: int, seed: int, *, scaling: float = 1.5, size: float = 1.0) -> Adapter:
    """Factors whose update is about as large as its input, times `size`."""
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: LoraFactors(
                torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs),
                torch.randn(outputs, rank, generator=generator) * size,
                scaling,
            )
            for name, (outputs, inputs) in shapes.items()
        }
    )


def draw_router(kind: str, experts: Sequence[Adapter], seed: int = 0, **settings: Any) -> Router:
    """A router of each kind with numbers in it, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "sequence":
        return by_sequence(draw_router("learned", experts, seed, **settings))
    wanted = RouterSettings(kind=kind, **settings)  # type: ignore[arg-type]
    if kind == "arrow":
        return arrow_router(experts, wanted)
    if kind == "phatgoose":
        gates = [{n: torch.randn(f.shape[1], generator=generator) for n, f in expert.items()} for expert in experts]
        return phatgoose_router(experts, gates, wanted)
    if kind in ("learned", "molora"):
        inputs = {name: factors.shape[1] for expert in experts for name, factors in expert.items()}
        count = len(experts)
        return Router(
            wanted,
            {
                name: {
                    "weight": torch.randn(count, size, generator=generator) / math.sqrt(size),
                    "bias": torch.randn(count, generator=generator) / 2,
                }
                for name, size in sorted(inputs.items())
            },
        )
    return Router(wanted)


def plain_probabilities(mixture: Mixture, module: str, x: Tensor) -> Tensor:
    """``p [N]`` of one token ``x [in]`` by the definition, in float64."""
    settings, tensors = mixture.router.settings, mixture.router.tensors.get(module, {})
    count, x = len(mixture.experts), x.double()
    kind = settings.base
    if kind == "uniform":
        weights = torch.tensor(settings.weights or [1.0] * count).double()
        return weights / weights.sum()
    if kind == "oracle":
        return torch.eye(count).double()[settings.expert]
    scores = []
    for index in range(count):
        if kind == "arrow":
            factors = mixture.experts[index].get(module)
            v = x * 0 if factors is None else torch.linalg.svd(factors.delta().double()).Vh[0]
            scores.append(float((v @ x).abs()))
        elif kind == "phatgoose":
            v = tensors["gates"][index].double()
            v, u = ((a - a.mean()) / a.std(correction=0) if a.any() else a for a in (v, x))
            scores.append(float(v @ u) / math.sqrt(len(x)))
        else:
            scores.append(float(tensors["weight"][index].double() @ x + tensors["bias"][index]))
    best = sorted(range(count), key=lambda index: -scores[index])[: settings.top_k or count]
    powers = [math.exp(scores[index] / settings.temperature) if index in best else 0.0 for index in range(count)]
    return torch.tensor(powers).double() / sum(powers)


def plain_update(mixture: Mixture, module: str, x: Tensor) -> Tensor:
    """``Σ_i p_i s_i B_i A_i x`` for the tokens ``x [tokens, in]`` of ONE sequence, in float64."""
    rows = [plain_probabilities(mixture, module, token) for token in x]
    if mixture.router.settings.kind == "sequence":
        rows = [torch.stack(rows[: place + 1]).mean(0) for place in range(len(rows))]
    outputs = []
    for token, p in zip(x, rows, strict=True):
        terms = [
            share * (expert[module].delta().double() @ token.double())
            for share, expert in zip(p, mixture.experts, strict=True)
            if module in expert
        ]
        outputs.append(torch.stack(terms).sum(0))
    return torch.stack(outputs)


def plain_logits(model: Any, mixture: Mixture, tokens: Sequence[int]) -> Tensor:
    """``[tokens, vocabulary]`` of one sequence without padding, packing or cache, under `plain_update`."""
    modules = dict(model.named_modules())

    def adding(name: str) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + plain_update(mixture, name, inputs[0][0])[None].to(output.dtype)

        return add

    handles = [modules[name].register_forward_hook(adding(name)) for name in mixture.shapes]
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits


@pytest.fixture
def expert() -> Callable[..., Adapter]:
    return draw_expert


@pytest.fixture
def router() -> Callable[..., Router]:
    return draw_router


@pytest.fixture
def plain() -> Callable[..., Tensor]:
    return plain_update


@pytest.fixture
def reference() -> Callable[..., Tensor]:
    return plain_logits


@pytest.fixture(scope="session")
def loaded() -> tuple[Any, Any]:
    """The embedded base model and its tokenizer."""
    from seedbed.common import basemodel

    return basemodel.load(BaseModelConfig(), "cpu")


@pytest.fixture
def model(loaded: tuple[Any, Any]) -> Any:
    return loaded[0]


@pytest.fixture
def few(model: Any) -> Shapes:
    """A few linear layers of the base model: of attention and of the network behind it, early and late."""
    chosen = (
        "layers.0.self_attn.v_proj",
        "layers.0.mlp.down_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
    )
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(chosen)
    }


@pytest.fixture
def experts(few: Shapes) -> tuple[Adapter, ...]:
    """Three experts of the base model, of ranks 2, 3 and 1; the last lacks a module."""
    drawn = [draw_expert(few, rank, seed, size=0.4) for seed, rank in enumerate((2, 3, 1))]
    lacking = Adapter({name: factors for name, factors in drawn[2].items() if "down_proj" not in name})
    return drawn[0], drawn[1], lacking


@pytest.fixture
def mixture(experts: tuple[Adapter, ...]) -> Callable[..., Mixture]:
    """A mixture of `experts` on the base model, with a router of some kind."""

    def make(kind: str, **settings: Any) -> Mixture:
        return Mixture(("ada", "bob", "cy"), experts, draw_router(kind, experts, **settings))

    return make
