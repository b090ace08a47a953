"""What is recorded of a router, in numbers that one can do in the head."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from seedbed.common.errors import ConfigError
from seedbed.common.routing import MixtureSlot, RoutingDiagnostics
from seedbed.common.routing.diagnostics import LayerDiagnostics, Tally, diagnose, has_collapsed, imbalance

Make = Callable[..., Any]


def of(*rows: list[float], valid: list[bool] | None = None) -> LayerDiagnostics:
    tally = Tally(len(rows[0]))
    tally.add(torch.tensor([list(rows)]), None if valid is None else torch.tensor([valid]))
    names = [f"e{index}" for index in range(len(rows[0]))]
    return diagnose("learned", names, {"layer": tally}, constant=False).layers["layer"]


def test_means_over_the_tokens() -> None:
    found = of([0.5, 0.5], [1.0, 0.0])
    assert found.tokens == 2
    assert found.entropy == pytest.approx(math.log(2) / 2)
    assert found.relative_entropy == pytest.approx(0.5)
    assert found.max_probability == pytest.approx(0.75)
    assert found.load == pytest.approx((0.75, 0.25))
    assert found.likeliest == pytest.approx((0.75, 0.25)), "the tie of the first token is divided"


def test_padding_does_not_count() -> None:
    found = of([1.0, 0.0], [0.0, 1.0], [0.0, 1.0], valid=[True, True, False])
    assert found.tokens == 2
    assert found.load == pytest.approx((0.5, 0.5))


def test_passes_add_up() -> None:
    tally = Tally(2)
    tally.add(torch.tensor([[[1.0, 0.0]]]), None)
    tally.add(torch.tensor([[[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]]), None)
    assert diagnose("learned", ["a", "b"], {"x": tally}, constant=False).overall.load == pytest.approx((0.25, 0.75))


@pytest.mark.parametrize(
    ("likeliest", "collapsed"),
    [
        ([0.95, 0.05], True),
        ([0.9, 0.1], False),
        ([0.5, 0.5, 0.0, 0.0], True),
        ([0.5, 0.4, 0.1, 0.0], False),
        ([0.6, 0.4, 0.0], False),
        ([1.0], False),
    ],
)
def test_a_collapse_is_one_expert_for_all_or_many_for_none(likeliest: list[float], collapsed: bool) -> None:
    assert has_collapsed(likeliest) is collapsed


def test_the_whole_has_collapsed_if_most_layers_have() -> None:
    def layer(p: list[float]) -> Tally:
        tally = Tally(2)
        tally.add(torch.tensor([p, p[::-1] if p[0] < 1 else p]), None)
        return tally

    gone, fine = layer([1.0, 0.0]), layer([0.6, 0.4])
    most = diagnose("learned", ["a", "b"], {"x": gone, "y": gone, "z": fine}, constant=False)
    assert (most.overall.collapsed, most.layers["z"].collapsed) == (True, False)
    assert not diagnose("learned", ["a", "b"], {"x": gone, "y": fine}, constant=False).overall.collapsed
    assert not diagnose("oracle", ["a", "b"], {"x": gone}, constant=True).overall.collapsed


def test_nothing_recorded_is_zeros_not_a_division_by_zero() -> None:
    found = diagnose("learned", ["a", "b"], {"x": Tally(2)}, constant=False)
    assert (found.overall.tokens, found.overall.entropy, found.overall.collapsed) == (0, 0.0, False)


def test_imbalance_is_zero_when_even_and_n_less_one_when_one_has_all() -> None:
    assert float(imbalance(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), None)) == pytest.approx(0.0)
    assert float(imbalance(torch.tensor([[1.0, 0.0, 0.0]] * 2), None)) == pytest.approx(2.0)
    masked = imbalance(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[True, False]]))
    assert float(masked) == pytest.approx(1.0)


IDS = torch.tensor([[5, 17, 42, 8], [7, 7, 0, 0]])


def test_a_slot_records_what_its_mixture_does(model: Any, mixture: Make, few: Any) -> None:
    slot = MixtureSlot(model)
    with pytest.raises(ConfigError, match="nothing of the routing was recorded"):
        slot.diagnostics()
    slot.put(mixture("learned"))
    slot.record()
    with torch.inference_mode():
        model(input_ids=IDS, attention_mask=torch.tensor([[1] * 4, [1, 1, 0, 0]]), use_cache=False)
    slot.record(False)
    with torch.inference_mode():
        model(input_ids=IDS, use_cache=False)
    found = slot.diagnostics()
    slot.put(None)
    assert found.names == ("ada", "bob", "cy")
    assert set(found.layers) == set(few)
    assert {layer.tokens for layer in found.layers.values()} == {6}
    assert found.overall.tokens == 6 * 4
    for layer in found.layers.values():
        assert sum(layer.load) == pytest.approx(1.0)
        assert sum(layer.likeliest) == pytest.approx(1.0)
        assert 0 < layer.relative_entropy < 1
    assert RoutingDiagnostics.model_validate(json.loads(found.model_dump_json())) == found


def test_the_uniform_router_is_even_and_has_not_collapsed(model: Any, mixture: Make) -> None:
    slot = MixtureSlot(model)
    slot.put(mixture("uniform"))
    slot.record()
    with torch.inference_mode():
        model(input_ids=IDS, use_cache=False)
    overall = slot.diagnostics().overall
    slot.put(None)
    assert overall.entropy == pytest.approx(math.log(3), rel=1e-6)
    assert overall.likeliest == pytest.approx((1 / 3,) * 3)
    assert not overall.collapsed


def count_tokens(model: Any, mixture: Make, padding: int | None, **inputs: Any) -> int:
    slot = MixtureSlot(model)
    slot.put(mixture("learned"))
    slot.record(padding=padding)
    with torch.inference_mode():
        model(use_cache=False, **inputs)
    (tokens,) = {layer.tokens for layer in slot.diagnostics().layers.values()}
    slot.put(None)
    return tokens


def test_padding_without_a_mask_is_known_by_its_id(model: Any, mixture: Make) -> None:
    ids = torch.tensor([[5, 0, 42, 8], [7, 7, 0, 0]])
    assert count_tokens(model, mixture, None, input_ids=ids) == 8
    assert count_tokens(model, mixture, 0, input_ids=ids) == 6, "a padding token inside of a text counts"


def test_padding_of_trees_is_known_by_its_mask(model: Any, mixture: Make) -> None:
    seen = torch.eye(4, dtype=torch.bool)
    seen[1, 0] = seen[2, 0] = True
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "position_ids": torch.tensor([[0, 1, 1, 0]])}
    assert count_tokens(model, mixture, None, attention_mask=seen[None, None], **inputs) == 3
