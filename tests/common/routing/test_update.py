"""The routed layer against loops over tokens and experts, for every router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.routing import KINDS, Mixture, RoutedUpdate, Router, RouterSettings, arrow_router
from seedbed.common.routing.gates import LearnedGate, SigmoidGate, make_gate, probabilities

BY_TOKEN = [kind for kind in KINDS if kind != "sequence"]
Make = Callable[..., Any]


def layer(mixture: Mixture, *, dtype: torch.dtype | None = None, **options: bool) -> RoutedUpdate:
    factors = mixture.factors("layer")
    settings, tensors = mixture.router.settings, mixture.router.tensors.get("layer", {})
    trainable = options.pop("trainable_gate", options.get("trainable_experts", False))
    gate = make_gate(settings, tensors, len(factors), dtype=dtype or torch.float32, trainable=trainable)
    return RoutedUpdate(factors, gate, dtype=dtype, **options)


def mix(expert: Make, router: Make, kind: str, ranks: tuple[int, ...] = (2, 3, 1, 2), **settings: Any) -> Mixture:
    experts = tuple(expert({"layer": (6, 5)}, rank, seed, scaling=0.5 + seed) for seed, rank in enumerate(ranks))
    return Mixture(tuple(f"e{index}" for index in range(len(ranks))), experts, router(kind, experts, **settings))


def tokens(seed: int = 9, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 7)), 5, generator=torch.Generator().manual_seed(seed))


def run(update: RoutedUpdate, x: Tensor, grad: bool) -> Tensor:
    base = torch.zeros(*x.shape[:-1], update.B.shape[0], dtype=x.dtype)
    with torch.set_grad_enabled(grad):
        result: Tensor = update(x, base)
    return result.detach()


# --- one table over every router ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (2, 3, 1, 2)], ids=["even", "mixed"])
@pytest.mark.parametrize("kind", BY_TOKEN)
def test_a_layer_is_the_sum_over_experts(
    kind: str, ranks: tuple[int, ...], grad: bool, expert: Make, router: Make, plain: Make
) -> None:
    mixture, x = mix(expert, router, kind, ranks), tokens()
    expected = torch.stack([plain(mixture, "layer", row) for row in x])
    torch.testing.assert_close(run(layer(mixture), x, grad).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["learned", "arrow", "phatgoose"])
def test_only_the_k_likeliest_take_part(kind: str, top_k: int, expert: Make, router: Make, plain: Make) -> None:
    mixture, x = mix(expert, router, kind, top_k=top_k, temperature=0.7), tokens()
    update, seen = layer(mixture), []
    update.observer = seen.append
    expected = torch.stack([plain(mixture, "layer", row) for row in x])
    torch.testing.assert_close(run(update, x, False).double(), expected, rtol=1e-5, atol=1e-5)
    assert ((seen[0] > 0).sum(-1) == top_k).all()


@pytest.mark.parametrize("kind", BY_TOKEN)
def test_probabilities_sum_to_one_and_nothing_else_changes(kind: str, expert: Make, router: Make) -> None:
    mixture, x = mix(expert, router, kind), tokens()
    before = x.clone()
    update, seen = layer(mixture), []
    update.observer = seen.append
    first, again = run(update, x, False), run(update, x, False)
    assert torch.equal(first, again), "the same input gives the same output"
    assert torch.equal(x, before), "the input is not written to"
    assert first.dtype == x.dtype
    assert first.device == x.device
    assert seen[0].shape == (2, 7, 4)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 7))
    for index, own in enumerate(mixture.experts):
        fresh = expert({"layer": (6, 5)}, (2, 3, 1, 2)[index], index)
        assert torch.equal(own["layer"].B, fresh["layer"].B), "the experts are not written to"


@pytest.mark.parametrize("experts_too", [False, True], ids=["gate alone", "experts too"])
@pytest.mark.parametrize("kind", BY_TOKEN)
def test_gradients_flow_where_they_should(kind: str, experts_too: bool, expert: Make, router: Make) -> None:
    """Against finite differences, in float64: to the input always, to experts and gate where they are trained."""
    update = layer(
        mix(expert, router, kind, top_k=None), dtype=torch.float64, trainable_experts=experts_too, trainable_gate=True
    )
    x = tokens(9, 3).double().requires_grad_()
    parameters = dict(update.named_parameters())
    assert {"A", "B"}.issubset(parameters) == experts_too
    assert ("gate.weight" in parameters) == (kind in ("learned", "molora"))

    def compute(x: Tensor, *values: Tensor) -> Tensor:
        output = torch.zeros(3, 6, dtype=torch.float64)
        result: Tensor = torch.func.functional_call(update, dict(zip(parameters, values, strict=True)), (x, output))
        return result

    # Away from the kinks of |v · x| and of top-k, which have measure zero.
    assert torch.autograd.gradcheck(compute, (x, *parameters.values()))


@pytest.mark.parametrize("kind", BY_TOKEN)
def test_frozen_experts_and_untrained_gates_have_no_parameters(kind: str, expert: Make, router: Make) -> None:
    assert not list(layer(mix(expert, router, kind)).parameters())


@pytest.mark.parametrize("kind", BY_TOKEN)
def test_a_bfloat16_output_stays_bfloat16(kind: str, expert: Make, router: Make, plain: Make) -> None:
    mixture, x = mix(expert, router, kind), tokens().bfloat16()
    update = layer(mixture)
    got = run(update, x, False)
    assert got.dtype == torch.bfloat16
    expected = torch.stack([plain(mixture, "layer", row.float()) for row in x])
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)


# --- numbers to be done in the head -----------------------------------------------------------------------------------


def test_gradients_of_several_passes_add_up(expert: Make, router: Make) -> None:
    """As where one optimizer step is cut into passes."""
    mixture = mix(expert, router, "learned")
    together, apart = layer(mixture, trainable_gate=True), layer(mixture, trainable_gate=True)
    x = tokens()
    together(x, torch.zeros(2, 7, 6)).square().sum().backward()
    losses = [apart(row, torch.zeros(7, 6)).square().sum() for row in x]
    for loss in losses:
        loss.backward()
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


def test_a_gate_that_is_trained_is_also_used_as_it_is_now_without_gradients(expert: Make, router: Make) -> None:
    update, x = layer(mix(expert, router, "learned"), trainable_gate=True), tokens()
    before = run(update, x, False)
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.mul_(2.0)
    assert not torch.allclose(run(update, x, False), before)
    torch.testing.assert_close(run(update, x, False), run(update, x, True))


def ones(scaling: float) -> LoraFactors:
    return LoraFactors(torch.ones(1, 2), torch.ones(1, 1), scaling)


def test_the_output_of_the_layer_is_added_to_in_place_without_gradients() -> None:
    # A x = 2; experts give 2·1 and 2·3; the mean is 4; on top of 10.
    update = RoutedUpdate([ones(1.0), ones(3.0)], make_gate(RouterSettings(), {}, 2, dtype=torch.float32))
    output = torch.full((1, 1), 10.0)
    with torch.inference_mode():
        assert update(torch.ones(1, 2), output) is output
    assert output.tolist() == [[14.0]]


def test_an_expert_without_the_module_adds_nothing_but_keeps_its_share() -> None:
    update = RoutedUpdate([ones(3.0), None, None], make_gate(RouterSettings(), {}, 3, dtype=torch.float32))
    assert run(update, torch.ones(1, 2), False).tolist() == [[2.0]]  # a third of 6


def test_weights_of_the_uniform_router_are_divided_by_their_sum() -> None:
    gate = make_gate(RouterSettings(weights=(1.0, 3.0)), {}, 2, dtype=torch.float32)
    assert gate(torch.ones(1, 2)).tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_a_learned_gate_starts_uniform_whatever_k_is_and_all_experts_learn(top_k: int | None) -> None:
    zeros = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    settings = RouterSettings(kind="learned", top_k=top_k)
    gate = make_gate(settings, zeros, 3, dtype=torch.float32, trainable=True)
    p = gate(torch.ones(1, 2))
    torch.testing.assert_close(p, torch.full((1, 3), 1 / 3))
    (p @ torch.tensor([0.0, 1.0, 2.0])).sum().backward()
    assert isinstance(gate, LearnedGate)
    assert (gate.weight.grad != 0).any(), "it can leave the start"
    assert gate.bias.grad is not None
    # dp_i/db_i of a uniform softmax: p_i (value_i − mean) = (−1, 0, 1) / 3.
    torch.testing.assert_close(gate.bias.grad, torch.tensor([-1.0, 0.0, 1.0]) / 3)


def test_ties_with_the_last_of_the_k_likeliest_stay() -> None:
    p = probabilities(torch.tensor([2.0, 1.0, 1.0, 0.0]), 2, 1.0)
    assert (p > 0).tolist() == [True, True, True, False]
    torch.testing.assert_close(p[1], p[2])


def test_an_expert_that_lacks_the_module_takes_no_place_from_those_that_have_it(expert: Make) -> None:
    """Prototypes of the absent ones are zero: they tie, and of four only one fills the second place."""
    held = expert({"layer": (6, 5)}, 2, 0, scaling=1.0)
    absent = [expert({"other": (6, 5)}, 2, seed, scaling=1.0) for seed in range(1, 5)]
    experts = (held, *absent)
    made = Mixture(tuple("abcde"), experts, arrow_router(experts, RouterSettings(kind="arrow", top_k=2)))
    update, seen = layer(made), []
    update.observer = seen.append
    run(update, tokens(), False)
    assert ((seen[0] > 0).sum(-1) == 2).all()
    assert (seen[0][..., 0] >= 0.5).all()


def test_a_low_temperature_sharpens() -> None:
    scores = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(probabilities(scores, None, 0.5), torch.tensor([2.0, 0.0]).softmax(-1))


def test_phatgoose_does_not_see_the_size_and_offset_of_its_input() -> None:
    gates = {"gates": torch.randn(3, 8, generator=torch.Generator().manual_seed(0))}
    gate = make_gate(RouterSettings(kind="phatgoose"), gates, 3, dtype=torch.float32)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(gate(x), gate(7 * x + 3), rtol=1e-4, atol=1e-5)


def test_phatgoose_survives_an_input_of_zeros() -> None:
    gate = make_gate(RouterSettings(kind="phatgoose"), {"gates": torch.randn(2, 4)}, 2, dtype=torch.float32)
    assert gate(torch.zeros(1, 4)).tolist() == [[0.5, 0.5]]


def test_the_gate_of_one_expert_starts_half_open_and_learns() -> None:
    update = RoutedUpdate([ones(3.0)], SigmoidGate(torch.zeros(1, 2)))
    result = update(torch.ones(1, 2), torch.zeros(1, 1))
    assert result.tolist() == [[3.0]]  # half of 6
    result.sum().backward()
    # d sigmoid(0) = 1/4, times x = 1, times the update 6.
    assert update.gate.weight.grad.tolist() == [[1.5, 1.5]]  # type: ignore[union-attr]


def test_trained_experts_keep_their_scalings_apart() -> None:
    update = RoutedUpdate([ones(1.0), None, ones(3.0)], _uniform(3), trainable_experts=True)
    assert update.B.tolist() == [[1.0, 1.0]]
    torch.testing.assert_close(run(update, torch.ones(1, 2), True), torch.tensor([[8.0 / 3]]))  # (2 + 0 + 6) / 3
    first, none, third = update.factors()
    assert none is None
    assert first is not None
    assert third is not None
    assert (first.scaling, third.scaling) == (1.0, 3.0)
    assert torch.equal(third.delta(), torch.full((1, 2), 3.0))


def test_frozen_experts_read_back_give_the_same_update(expert: Make) -> None:
    own = expert({"layer": (3, 4)}, 2, 0, scaling=0.5)["layer"]
    (back,) = RoutedUpdate([own], _uniform(1)).factors()
    assert back is not None
    torch.testing.assert_close(back.delta(), own.delta())


def test_an_output_that_is_not_contiguous_is_not_written_to() -> None:
    update = RoutedUpdate([ones(1.0)], _uniform(1))
    output = torch.zeros(2, 4)[:, ::2][:, :1]
    with torch.inference_mode():
        assert update(torch.ones(2, 2), output).tolist() == [[2.0], [2.0]]
    assert output.tolist() == [[0.0], [0.0]]


def _uniform(count: int) -> Any:
    return make_gate(RouterSettings(), {}, count, dtype=torch.float32)


def test_an_adapter_of_float64_is_computed_in_float64(expert: Make) -> None:
    own = Adapter({"layer": expert({"layer": (3, 4)}, 2, 0)["layer"].to(dtype=torch.float64)})
    mixture = Mixture(("one",), (own,), Router(RouterSettings()))
    assert layer(mixture).down.dtype == torch.float64
