"""Mixtures put on a model and taken off it: against merged adapters, single experts, and plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from seedbed.common import algebra
from seedbed.common.adapter import Adapter
from seedbed.common.attach import AdapterSlot
from seedbed.common.errors import AdapterMismatchError, ConfigError
from seedbed.common.routing import KINDS, Mixture, MixtureSlot, Router, RouterSettings

Make = Callable[..., Any]
IDS = torch.tensor([[5, 17, 42, 8, 99, 3, 61], [7, 7, 30, 12, 4, 0, 0]])
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


@torch.inference_mode()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS, attention_mask=MASK, use_cache=False, **inputs).logits
    return result


def test_the_uniform_router_is_the_average_as_one_adapter(expert: Make) -> None:
    """To 1e-6, on one layer: routing evenly and merging by the exact mean are one thing."""
    shapes = {"layer": (32, 48)}
    experts = [expert(shapes, rank, rank) for rank in (4, 2, 8)]
    base = nn.Sequential()
    base.add_module("layer", nn.Linear(48, 32))
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0))
    slot, single = MixtureSlot(base), AdapterSlot(base)
    with torch.inference_mode():
        slot.put(Mixture(("a", "b", "c"), tuple(experts), Router(RouterSettings())))
        routed = base(x)
        slot.put(None)
        single.put(algebra.average(experts))
        torch.testing.assert_close(routed, base(x), rtol=1e-6, atol=1e-6)


def test_weighted_uniform_is_the_weighted_average(model: Any, experts: tuple[Adapter, ...]) -> None:
    slot, single = MixtureSlot(model), AdapterSlot(model)
    slot.put(Mixture(("a", "b", "c"), experts, Router(RouterSettings(weights=(1.0, 2.0, 5.0)))))
    routed = logits(model)
    slot.put(None)
    single.put(algebra.average(experts, [1.0, 2.0, 5.0]))
    averaged = logits(model)
    single.put(None)
    torch.testing.assert_close(routed, averaged, rtol=1e-4, atol=1e-4)


def test_the_oracle_is_the_chosen_expert_alone(model: Any, mixture: Make, experts: tuple[Adapter, ...]) -> None:
    slot, single = MixtureSlot(model), AdapterSlot(model)
    slot.put(mixture("oracle", expert=1))
    chosen = {1: logits(model)}
    for index in (0, 2):
        slot.select_expert(index)
        chosen[index] = logits(model)
    slot.put(None)
    for index, own in enumerate(experts):
        single.put(own)
        alone = logits(model)
        single.put(None)
        torch.testing.assert_close(chosen[index], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_a_mixture_is_what_the_definition_says(
    kind: str, model: Any, mixture: Make, reference: Make
) -> None:
    slot, made = MixtureSlot(model), mixture(kind)
    bare = logits(model)
    slot.put(made)
    got = logits(model)
    slot.put(None)
    assert (got - bare).abs().max() > 0.1, "the mixture does something"
    for row, length in ((0, 7), (1, 5)):
        expected = reference(model, made, IDS[row, :length].tolist())
        torch.testing.assert_close(got[row, :length], expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(model), bare), "without it the base model is as before"


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_model_takes_a_mixture(kind: str, expert: Make, router: Make) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).eval()
    shapes = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.1.mlp.down_proj": (16, 24)}
    experts = tuple(expert(shapes, 2, seed) for seed in range(3))
    mixture = Mixture(("a", "b", "c"), experts, router(kind, experts))
    wide, half = MixtureSlot(small), small
    wide.put(mixture)
    expected = logits(small)
    wide.put(None)
    half = small.to(torch.bfloat16)
    slot = MixtureSlot(half)
    slot.put(mixture)
    got = logits(half)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got[0].float(), expected[0], rtol=0.1, atol=0.05)


def test_a_mixture_replaces_the_one_before(model: Any, mixture: Make) -> None:
    slot = MixtureSlot(model)
    slot.put(mixture("arrow"))
    arrow = logits(model)
    slot.put(mixture("uniform"))
    slot.put(mixture("arrow"))
    assert torch.equal(logits(model), arrow)
    slot.put(None)


def test_a_refused_mixture_leaves_the_previous_one_in_place(model: Any, mixture: Make, expert: Make) -> None:
    slot = MixtureSlot(model)
    slot.put(mixture("arrow"))
    before = logits(model)
    for shapes, said in (
        ({"model.layers.0.self_attn.v_prj": (8, 8)}, "no module 'model.layers.0.self_attn.v_prj'"),
        ({"model.layers.0.self_attn.v_proj": (8, 8)}, r"\[8, 8\] \[out, in\]"),
    ):
        with pytest.raises(AdapterMismatchError, match=said):
            slot.put(Mixture(("wrong",), (expert(shapes, 1, 0),), Router(RouterSettings())))
    assert torch.equal(logits(model), before)
    slot.put(None)


def test_only_an_oracle_lets_one_choose(model: Any, mixture: Make) -> None:
    slot = MixtureSlot(model)
    with pytest.raises(ConfigError, match="only an oracle"):
        slot.select_expert(0)
    slot.put(mixture("oracle"))
    with pytest.raises(ConfigError, match="expert 3 of the oracle"):
        slot.select_expert(3)
    slot.put(None)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_lm_eval_requests_are_those_of_plain_forward_passes(
    kind: str, loaded: tuple[Any, Any], mixture: Make, reference: Make
) -> None:
    """Through prefix trees, where choices share their context, and through padded chains."""
    from seedbed.common.scoring import SeedbedLM

    model, tokenizer = loaded
    lm = SeedbedLM(model, tokenizer)
    made = mixture(kind)
    slot = MixtureSlot(model)
    slot.put(made)
    pairs = [("Q: one two\nA:", " red"), ("Q: one two\nA:", " blue"), ("Q: one two\nA:", " green"), ("the", " end")]
    scores = [value for value, _ in lm.score(pairs)]
    assert lm._can_branch(), "trees are in use"
    slot.put(None)
    for score, request in zip(scores, lm._requests(pairs), strict=True):
        rows = reference(model, made, request.inputs).log_softmax(-1)[-request.scored :]
        expected = sum(float(row[token]) for row, token in zip(rows, request.tokens[-request.scored :], strict=True))
        assert score == pytest.approx(expected, abs=2e-3)
