"""Routers made from experts: untrained ones, and those that need no training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.algebra import normalized
from seedbed.common.errors import ConfigError
from seedbed.common.lowrank import svd_of_sum
from seedbed.common.routing.mixture import Router, require_module, shapes_of
from seedbed.common.routing.settings import RouterSettings


def untrained_router(experts: Sequence[Adapter], settings: RouterSettings) -> Router:
    """A learned gate of zeros, which starts uniform.

    Raises:
        ConfigError: if the settings are not those of a learned router, or do not fit the experts.
    """
    if settings.base not in ("learned", "molora"):
        raise ConfigError(f"router '{settings.kind}' is not learned", "Set kind: learned.")
    return zero_router({name: inputs for name, (_, inputs) in shapes_of(experts).items()}, len(experts), settings)


def zero_router(inputs: Mapping[str, int], count: int, settings: RouterSettings) -> Router:
    """`untrained_router` from the number of inputs of every module."""
    settings.require(count)
    return Router(
        settings,
        {name: {"weight": torch.zeros(count, size), "bias": torch.zeros(count)} for name, size in inputs.items()},
    )


def arrow_router(experts: Sequence[Adapter], settings: RouterSettings | None = None) -> Router:
    """The router of Arrow (Ostapenko et al., *Towards Modular LLMs by Building and Routing a Library of LoRAs*, ICML 2024),
    which needs no training; see `arrow_prototypes`.

    Raises:
        ConfigError: if the settings are not Arrow's, or do not fit the experts.
    """
    settings = settings or RouterSettings(kind="arrow")
    if settings.base != "arrow":
        raise ConfigError(f"router '{settings.kind}' is not arrow", "Set kind: arrow.")
    settings.require(len(experts))
    return Router(settings, {name: {"prototypes": v} for name, v in arrow_prototypes(experts).items()})


def arrow_prototypes(experts: Sequence[Adapter]) -> dict[str, Tensor]:
    """Per module ``[N, in]``: the unit input direction that each expert's update stretches most.

    From the exact factored SVD: power iteration, as usual for Arrow, is inaccurate where the two largest singular values are
    close. Signs are arbitrary (the router takes the absolute value). An expert without the module, or with a zero update,
    has no direction: zeros, so that its score is 0.
    """
    return {
        name: torch.stack(_directions([expert.get(name) for expert in experts], inputs))
        for name, (_, inputs) in shapes_of(experts).items()
    }


def _directions(module: Sequence[LoraFactors | None], inputs: int) -> list[Tensor]:
    device = next(factors.A.device for factors in module if factors is not None)
    found = []
    for factors in module:
        v = torch.zeros(inputs, device=device)
        if factors is not None and factors.rank:
            svd = svd_of_sum([factors], rank=1)
            v = torch.where(svd.S[0] > 0, svd.Vh[0].float(), v)
        found.append(v)
    return found


def phatgoose_router(
    experts: Sequence[Adapter], gates: Sequence[Mapping[str, Tensor]], settings: RouterSettings | None = None
) -> Router:
    """The router of PHATGOOSE (Muqeeth et al., *Learning to Route Among Specialized Experts for Zero-Shot Generalization*,
    ICML 2024), from the gates that were trained for each expert alone.

    Args:
        experts: in order.
        gates: for each expert ``module -> v [in]``, or the ``[1, in]`` of a gate file; a module that is missing is zeros.

    Raises:
        ConfigError: if the settings are not PHATGOOSE's or do not fit, or there are not as many gates as experts.
        AdapterMismatchError: if a gate is of a module that no expert adapts.
    """
    settings = settings or RouterSettings(kind="phatgoose")
    if settings.base != "phatgoose":
        raise ConfigError(f"router '{settings.kind}' is not phatgoose", "Set kind: phatgoose.")
    if len(gates) != len(experts):
        raise ConfigError(f"expected one gate for each of {len(experts)} experts, got {len(gates)}")
    shapes = shapes_of(experts)
    stacked = {name: torch.zeros(len(experts), inputs) for name, (_, inputs) in shapes.items()}
    for index, own in enumerate(gates):
        for name, v in own.items():
            inputs = require_module(shapes, name)[1]
            if v.numel() != inputs:
                raise ConfigError(f"gate {index}, module {name}: expected [{inputs}], got {list(v.shape)}")
            stacked[name][index] = v.detach().float().reshape(-1)
    router = Router(settings, {name: {"gates": rows} for name, rows in stacked.items()})
    router.require_count(len(experts))
    return router


def average_routers(pairs: Iterable[tuple[Router, float]]) -> Router:
    """The weighted mean of learned routers' tensors, as when every participant trains one on its own data (FedAvg).

    Args:
        pairs: routers and weights, which are divided by their sum; consumed one at a time.

    Raises:
        ConfigError: if there is none, the routers differ in settings, modules or shapes, or the weights make no sense.
    """
    first: Router | None = None
    sums: dict[str, dict[str, Tensor]] = {}
    weights: list[float] = []
    for router, weight in pairs:
        first = router if first is None else first
        _require_alike(first, router)
        weights.append(weight)
        for name, module in router.tensors.items():
            own = sums.setdefault(name, {})
            for key, tensor in module.items():
                own[key] = own.get(key, 0.0) + weight * tensor.float()
    normalized(weights, len(weights))
    total = math.fsum(weights)
    assert first is not None  # normalized() refuses an empty list
    return Router(
        first.settings, {name: {key: t / total for key, t in module.items()} for name, module in sums.items()}
    )


def _require_alike(expected: Router, got: Router) -> None:
    if expected.settings != got.settings:
        raise ConfigError(f"routers of other settings cannot be averaged: {expected.settings} and {got.settings}")
    shapes = [
        {f"{name}.{key}": list(t.shape) for name, module in router.tensors.items() for key, t in module.items()}
        for router in (expected, got)
    ]
    for name in sorted({*shapes[0], *shapes[1]}):
        if shapes[0].get(name) != shapes[1].get(name):
            raise ConfigError(f"router tensor {name}: expected {shapes[0].get(name)}, got {shapes[1].get(name)}")


def gates_of(router: Router) -> dict[str, Tensor]:
    """``module -> v [in]`` of a router of kind `phatgoose` with one expert, as a gate job leaves it.

    Raises:
        ConfigError: if it is another kind of router.
    """
    if router.settings.kind != "phatgoose" or any(len(own["gates"]) != 1 for own in router.tensors.values()):
        raise ConfigError(f"router '{router.settings.kind}' is not the gate of one expert")
    return {name: own["gates"][0] for name, own in router.tensors.items()}


def by_sequence(router: Router) -> Router:
    """The router that averages another one's probabilities over the sequence so far, with the same tensors."""
    settings = router.settings.model_dump() | {"kind": "sequence", "of": router.settings.base}
    return Router(RouterSettings.model_validate(settings), router.tensors)
