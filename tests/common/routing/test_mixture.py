"""Settings, routers and mixtures that make no sense are refused with a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from seedbed.common.errors import AdapterMismatchError, ConfigError
from seedbed.common.routing import (
    Mixture,
    Router,
    RouterSettings,
    average_routers,
    by_sequence,
    gates_of,
    phatgoose_router,
    untrained_router,
)

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "learned", "top_k": 0}, "top_k 0 of the router is not 1 or more"),
        ({"kind": "learned", "temperature": 0.0}, r"temperature 0.0 of the router is not above 0"),
        ({"kind": "learned", "temperature": -1.0}, r"temperature -1.0"),
        ({"kind": "learned", "temperature": float("nan")}, r"temperature nan"),
        ({"kind": "lerned"}, "there is no router 'lerned'"),
        ({"kind": "sequence"}, "a sequence router, and no other"),
        ({"kind": "sequence", "of": "sequence"}, "a sequence router, and no other"),
        ({"kind": "arrow", "of": "learned"}, "a sequence router, and no other"),
        ({"kind": "arrow", "weights": (1.0, 2.0)}, "'arrow' takes no weights"),
        ({"weights": (1.0, -1.0)}, "weight -1.0 is negative"),
        ({"weights": (0.0, 0.0)}, "all weights are zero"),
        ({"weights": (1.0, float("nan"))}, "weight nan"),
        ({"kind": "uniform", "top_k": 3}, "'uniform' takes no top_k"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RouterSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "learned", "top_k": 3}, "top_k 3 of the router is larger than the number of experts, 2"),
        ({"kind": "oracle", "expert": 2}, "expert 2 of the oracle is not one of the 2 experts"),
        ({"kind": "oracle", "expert": -1}, "expert -1 of the oracle"),
        ({"weights": (1.0,)}, "expected 2 weights, one for each expert, got 1"),
    ],
)
def test_settings_are_checked_against_the_number_of_experts(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RouterSettings(**settings).require(2)


def test_an_unknown_router_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as refused:
        RouterSettings.model_validate({"kind": "phatgose"})
    assert "'phatgoose'" in refused.value.hint


def test_phatgoose_uses_two_experts_unless_told_otherwise() -> None:
    assert RouterSettings(kind="phatgoose").top_k == 2
    assert RouterSettings(kind="sequence", of="phatgoose").top_k == 2
    assert RouterSettings(kind="phatgoose", top_k=1).top_k == 1
    assert RouterSettings(kind="arrow").top_k is None
    RouterSettings(kind="phatgoose").require(1)  # one is all that there are


def test_settings_survive_json() -> None:
    settings = RouterSettings(kind="sequence", of="arrow", top_k=3, temperature=0.5)
    assert RouterSettings.model_validate_json(settings.model_dump_json()) == settings


def two(expert: Make) -> tuple[Any, Any]:
    return expert({"a": (4, 3), "b": (2, 3)}, 1, 0), expert({"a": (4, 3)}, 2, 1)


def test_a_mixture_knows_the_modules_of_all_its_experts(expert: Make) -> None:
    mixture = Mixture(("x", "y"), two(expert), Router(RouterSettings()))
    assert mixture.shapes == {"a": (4, 3), "b": (2, 3)}
    assert [factors is None for factors in mixture.factors("b")] == [False, True]


@pytest.mark.parametrize(
    ("names", "said"),
    [(("x",), "got 1 for 2"), (("x", "x"), "two experts of the mixture are named 'x'")],
)
def test_names_are_one_for_each_expert(names: tuple[str, ...], said: str, expert: Make) -> None:
    with pytest.raises(ConfigError, match=said):
        Mixture(names, two(expert), Router(RouterSettings()))


def test_experts_of_other_shapes_do_not_mix(expert: Make) -> None:
    experts = expert({"a": (4, 3)}, 1, 0), expert({"a": (4, 5)}, 1, 0)
    with pytest.raises(AdapterMismatchError, match=r"module a: .*\[4, 3\], got \[4, 5\]"):
        Mixture(("x", "y"), experts, Router(RouterSettings()))


def learned(modules: dict[str, tuple[int, int]]) -> Router:
    return Router(
        RouterSettings(kind="learned"),
        {
            name: {"weight": torch.zeros(count, size), "bias": torch.zeros(count)}
            for name, (count, size) in modules.items()
        },
    )


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"a": (2, 3)}, "does not route module b"),
        ({"a": (2, 3), "b": (2, 3), "c": (2, 3)}, "routes module c, which no expert adapts"),
        ({"a": (2, 3), "b": (2, 4)}, r"module b: expected weight \[2, 3\], got \[2, 4\]"),
        ({"a": (2, 3), "b": (3, 3)}, r"module b: expected weight \[2, in\], got \[3, 3\]"),
    ],
)
def test_a_router_must_fit_the_experts(modules: dict[str, tuple[int, int]], said: str, expert: Make) -> None:
    with pytest.raises(ConfigError, match=said):
        Mixture(("x", "y"), two(expert), learned(modules))


def test_a_router_must_have_the_tensors_of_its_kind(expert: Make) -> None:
    router = Router(
        RouterSettings(kind="arrow"), {"a": {"gates": torch.zeros(2, 3)}, "b": {"gates": torch.zeros(2, 3)}}
    )
    with pytest.raises(ConfigError, match="expected tensors prototypes, got gates"):
        Mixture(("x", "y"), two(expert), router)


def test_an_untrained_router_fits_and_is_zero(expert: Make) -> None:
    experts = two(expert)
    router = untrained_router(experts, RouterSettings(kind="learned"))
    Mixture(("x", "y"), experts, router)
    assert not any(tensor.any() for module in router.tensors.values() for tensor in module.values())
    with pytest.raises(ConfigError, match="'arrow' is not learned"):
        untrained_router(experts, RouterSettings(kind="arrow"))


def test_gates_of_experts_join_into_a_phatgoose_router(expert: Make) -> None:
    gates = [{"a": torch.ones(3), "b": torch.ones(1, 3)}, {"a": torch.full((3,), 2.0)}]
    router = phatgoose_router(two(expert), gates)
    assert router.tensors["a"]["gates"].tolist() == [[1, 1, 1], [2, 2, 2]]
    assert router.tensors["b"]["gates"].tolist() == [[1, 1, 1], [0, 0, 0]]
    with pytest.raises(ConfigError, match="one gate for each of 2 experts, got 1"):
        phatgoose_router(two(expert), gates[:1])
    with pytest.raises(AdapterMismatchError, match="module c"):
        phatgoose_router(two(expert), [{"c": torch.ones(3)}, {}])
    with pytest.raises(ConfigError, match=r"gate 1, module a: expected \[3\], got \[4\]"):
        phatgoose_router(two(expert), [{}, {"a": torch.ones(4)}])


def test_the_gate_of_one_expert_is_read_as_vectors() -> None:
    router = Router(RouterSettings(kind="phatgoose", top_k=1), {"a": {"gates": torch.ones(1, 3)}})
    assert gates_of(router)["a"].tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match="not the gate of one expert"):
        gates_of(Router(RouterSettings()))


def test_learned_routers_are_averaged_by_weight() -> None:
    zeros, ones = (
        learned({"a": (2, 3)}),
        Router(RouterSettings(kind="learned"), {"a": {"weight": torch.ones(2, 3), "bias": torch.ones(2)}}),
    )
    mean = average_routers([(zeros, 1.0), (ones, 3.0)])
    assert mean.tensors["a"]["bias"].tolist() == [0.75, 0.75]
    assert mean.tensors["a"]["weight"].tolist() == [[0.75] * 3] * 2
    with pytest.raises(ConfigError, match=r"a.bias: expected \[2\], got \[3\]"):
        average_routers([(zeros, 1.0), (learned({"a": (3, 3)}), 1.0)])
    with pytest.raises(ConfigError, match="other settings"):
        average_routers([(zeros, 1.0), (Router(RouterSettings()), 1.0)])
    with pytest.raises(ConfigError):
        average_routers([])


def test_a_router_by_sequence_keeps_the_numbers_of_its_base() -> None:
    base = learned({"a": (2, 3)})
    router = by_sequence(base)
    assert (router.settings.kind, router.settings.of, router.settings.base) == ("sequence", "learned", "learned")
    assert router.tensors["a"]["weight"] is base.tensors["a"]["weight"]
