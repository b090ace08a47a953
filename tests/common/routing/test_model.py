"""A base model with trainable routed layers: what is trained, how, and what is read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seedbed.common.adapter import Adapter
from seedbed.common.errors import AdapterMismatchError, ConfigError
from seedbed.common.routing import Mixture, MixtureSlot, RoutedModel, Router, RouterSettings, by_sequence

Make = Callable[..., Any]
IDS = torch.tensor([[5, 17, 42, 8, 99, 3, 61], [7, 7, 30, 12, 4, 0, 0]])
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
LEARNED = RouterSettings(kind="learned")


@pytest.fixture
def routed(model: Any) -> Any:
    """Makes routed models and takes their updates off the shared base model in the end."""
    made: list[RoutedModel] = []

    def make(name: str, *arguments: Any, **options: Any) -> RoutedModel:
        made.append(getattr(RoutedModel, name)(model, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.remove()


def mixed(model: Any, mixture: Mixture) -> Tensor:
    slot = MixtureSlot(model)
    slot.put(mixture)
    with torch.no_grad():
        logits: Tensor = model(**INPUTS).logits
    slot.put(None)
    return logits


def trained(one: RoutedModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in one.named_parameters() if parameter.requires_grad}


def test_a_learned_router_starts_as_the_uniform_mixture(routed: Make, model: Any, experts: tuple[Adapter, ...]) -> None:
    expected = mixed(model, Mixture(("a", "b", "c"), experts, Router(RouterSettings())))
    one = routed("learned", experts, LEARNED)
    torch.testing.assert_close(one(**INPUTS).logits, expected, rtol=1e-4, atol=1e-4)


def test_only_the_gates_of_a_learned_router_are_trained(routed: Make, experts: tuple[Adapter, ...]) -> None:
    one = routed("learned", experts, LEARNED)
    assert len(trained(one)) == 2 * 4
    assert all(name.endswith((".gate.weight", ".gate.bias")) for name in trained(one))
    one(**INPUTS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trained(one).values())


def test_training_lowers_the_loss_and_the_router_read_back_is_the_one_that_was_trained(
    routed: Make, model: Any, experts: tuple[Adapter, ...]
) -> None:
    one = routed("learned", experts, LEARNED)
    optimizer = torch.optim.Adam(trained(one).values(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = one(**INPUTS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    with torch.no_grad():
        after = one(**INPUTS).logits
    one.remove()
    router = one.router()
    assert router.settings == LEARNED
    torch.testing.assert_close(mixed(model, Mixture(("a", "b", "c"), experts, router)), after, rtol=1e-4, atol=1e-4)
    again = routed("learned", experts, LEARNED, start=router)
    torch.testing.assert_close(again(**INPUTS).logits, after, rtol=1e-4, atol=1e-4)


def test_a_router_by_sequence_is_trained_the_same_way(
    routed: Make, model: Any, experts: tuple[Adapter, ...], router: Make
) -> None:
    start = by_sequence(router("learned", experts))
    expected = mixed(model, Mixture(("a", "b", "c"), experts, start))
    one = routed("learned", experts, start.settings, start=start)
    logits = one(**INPUTS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trained(one).values())
    assert one.router().settings == start.settings


def test_gradients_are_those_of_finite_differences(routed: Make, experts: tuple[Adapter, ...], router: Make) -> None:
    one = routed("learned", experts, LEARNED, start=router("learned", experts))

    def loss() -> Tensor:
        result: Tensor = one(**INPUTS, labels=IDS).loss
        return result

    loss().backward()
    for name, parameter in trained(one).items():
        if not name.endswith("weight"):
            continue
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        step, values = 1e-2, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                values.append(float(loss()))
                parameter.sub_(direction, alpha=sign * step)
        assert parameter.grad is not None
        slope = float((parameter.grad * direction).sum())
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.05, abs=2e-3)


def test_a_gate_is_trained_over_one_frozen_expert(routed: Make, model: Any, experts: tuple[Adapter, ...]) -> None:
    half = Adapter({name: type(f)(f.A, f.B, f.scaling / 2) for name, f in experts[0].items()})
    expected = mixed(model, Mixture(("half",), (half,), Router(RouterSettings())))
    one = routed("gated", experts[0])
    logits = one(**INPUTS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # sigmoid(0) = 1/2
    logits.sum().backward()
    assert [name.rpartition(".")[2] for name in trained(one)] == ["weight"] * 4
    gates = one.gates()
    assert {name: v.shape for name, v in gates.items()} == {n: (f.shape[1],) for n, f in experts[0].items()}
    assert (one.router().settings.kind, one.router().settings.top_k) == ("phatgoose", 1)
    Mixture(("one",), (experts[0],), one.router())


def test_molora_begins_as_the_base_model_with_experts_of_their_own(routed: Make, model: Any, few: Any) -> None:
    with torch.no_grad():
        bare = model(**INPUTS).logits
    one = routed("molora", list(few), experts=3, rank=2, alpha=4.0, seed=7)
    torch.testing.assert_close(one(**INPUTS).logits, bare)
    first, second, third = one.experts()
    assert {name: f.shape for name, f in first.items()} == few
    for name, factors in first.items():
        assert not torch.equal(factors.A, second[name].A)
        assert not torch.equal(second[name].A, third[name].A)
        assert factors.A.abs().max() <= factors.shape[1] ** -0.5
        assert not factors.B.any()
        assert (factors.rank, factors.scaling) == (2, 2.0)


def test_moloras_first_expert_starts_as_a_plain_lora_of_that_seed(routed: Make, few: Any) -> None:
    from seedbed.client.lora import attach, extract
    from seedbed.common import basemodel
    from seedbed.common.config import BaseModelConfig, LoraSettings

    plain = attach(basemodel.load(BaseModelConfig(), "cpu")[0], LoraSettings(rank=2, alpha=4, targets=tuple(few)), 7)
    first = routed("molora", list(few), experts=2, rank=2, alpha=4.0, seed=7).experts()[0]
    for name, factors in extract(plain).items():
        assert torch.equal(first[name].A, factors.A)


def test_molora_trains_experts_and_router_together(routed: Make, model: Any, few: Any) -> None:
    one = routed("molora", list(few), experts=2, rank=2, alpha=4.0, seed=7)
    optimizer = torch.optim.Adam(trained(one).values(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        one(**INPUTS, labels=IDS).loss.backward()
        optimizer.step()
    assert {name.rpartition(".")[2] for name, p in trained(one).items() if p.grad.any()} == {"A", "B", "weight", "bias"}
    with torch.no_grad():
        after = one(**INPUTS).logits
    one.remove()
    mixture = Mixture(("a", "b"), tuple(one.experts()), one.router())
    torch.testing.assert_close(mixed(model, mixture), after, rtol=1e-3, atol=1e-3)


def test_the_load_balance_is_zero_where_the_load_is_even_and_has_a_gradient(
    routed: Make, experts: tuple[Adapter, ...], router: Make
) -> None:
    even = routed("learned", experts, LEARNED)
    with pytest.raises(ConfigError, match="no load balance was collected"):
        even.load_balance()
    even.collect_balance()
    even(**INPUTS)
    assert float(even.load_balance().detach()) == pytest.approx(0.0, abs=1e-5)
    even.remove()
    uneven = routed("learned", experts, LEARNED, start=router("learned", experts))
    uneven.collect_balance()
    uneven(**INPUTS)
    balance = uneven.load_balance()
    assert float(balance.detach()) > 0.01
    balance.backward()
    assert all(parameter.grad is not None for parameter in trained(uneven).values())


def test_padding_does_not_count_for_the_load(routed: Make, experts: tuple[Adapter, ...], router: Make) -> None:
    one = routed("learned", experts, LEARNED, start=router("learned", experts))
    one.collect_balance()
    values = []
    for width in (5, 7):
        one(input_ids=IDS[1:, :width], attention_mask=MASK[1:, :width], use_cache=False)
        values.append(float(one.load_balance().detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(
    routed: Make, model: Any, experts: tuple[Adapter, ...], router: Make
) -> None:
    start = by_sequence(router("learned", experts))
    one = routed("learned", experts, start.settings, start=start)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        one.zero_grad()
        one(**INPUTS, labels=IDS).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in trained(one).items()})
    model.activation_checkpointing_disable()
    model.eval()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_it_passes_for_the_model_that_it_wraps(routed: Make, model: Any, experts: tuple[Adapter, ...]) -> None:
    one = routed("learned", experts, LEARNED)
    assert one.config is model.config
    assert one.get_output_embeddings() is model.get_output_embeddings()
    assert one.device == model.device
    positional = one(IDS, MASK).logits
    torch.testing.assert_close(positional, one(**INPUTS).logits)


def test_what_does_not_fit_is_refused(routed: Make, experts: tuple[Adapter, ...], router: Make, expert: Make) -> None:
    with pytest.raises(ConfigError, match="'arrow' is not learned"):
        routed("learned", experts, RouterSettings(kind="arrow"))
    with pytest.raises(ConfigError, match="top_k 4"):
        routed("learned", experts, RouterSettings(kind="learned", top_k=4))
    with pytest.raises(ConfigError, match="expected"):
        routed("learned", experts[:2], LEARNED, start=router("learned", experts))
    with pytest.raises(AdapterMismatchError, match="no module 'nowhere'"):
        routed("gated", expert({"nowhere": (2, 2)}, 1, 0))
    with pytest.raises(AdapterMismatchError, match="'nowhere' is missing"):
        routed("molora", ["nowhere"], experts=2, rank=2, alpha=4.0, seed=0)
    with pytest.raises(AdapterMismatchError, match=r"'model\.layers\.0' is not a linear layer"):
        routed("molora", ["model.layers.0"], experts=2, rank=2, alpha=4.0, seed=0)
    with pytest.raises(ConfigError, match="0 experts of rank 2"):
        routed("molora", ["lm_head"], experts=0, rank=2, alpha=4.0, seed=0)
    with pytest.raises(ConfigError, match="not the gate of one expert"):
        routed("learned", experts, LEARNED).gates()
