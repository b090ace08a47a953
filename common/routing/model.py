"""A base model with routed layers that can be trained: the router, a gate, or router and experts together.

One `nn.Module` holds the frozen base and everything that is trained, so that optimizers, DeepSpeed's ZeRO and checkpoints see
the parameters as those of submodules; the base model itself is called as ever, and hooks on its linear layers add the updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.attach import linear_shape
from seedbed.common.errors import AdapterMismatchError, ConfigError
from seedbed.common.routing.diagnostics import imbalance
from seedbed.common.routing.gates import SigmoidGate
from seedbed.common.routing.mixture import Mixture, Router
from seedbed.common.routing.passes import PassWatch
from seedbed.common.routing.routers import gates_of, untrained_router, zero_router
from seedbed.common.routing.settings import RouterSettings
from seedbed.common.routing.slot import adding, build_update, device_of, targets
from seedbed.common.routing.update import RoutedUpdate


class RoutedModel(nn.Module):
    """A frozen base model with trainable routed layers. Made by `learned`, `gated` or `molora`.

    Attributes:
        model: the base model; none of its parameters takes a gradient.
        updates: the routed layers; names of modules with ``:`` for ``.``, which a ModuleDict does not allow.
        padding: id of the padding token, which then does not count for the load balance in packed rows.
    """

    def __init__(self, model: nn.Module, updates: Mapping[str, RoutedUpdate], router: Router, watch: PassWatch) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.updates = nn.ModuleDict({_key(name): update for name, update in updates.items()})
        self.padding: int | None = None
        self._settings, self._watch = router.settings, watch
        self._balance: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        self._handles = [modules[name].register_forward_hook(adding(update)) for name, update in updates.items()]

    @classmethod
    def learned(
        cls, model: nn.Module, experts: Sequence[Adapter], settings: RouterSettings, start: Router | None = None
    ) -> RoutedModel:
        """Frozen experts and a gate to train, in float32.

        Args:
            settings: of kind `learned`, or `sequence` of it.
            start: the router to begin with; none begins with zeros, that is, uniform.

        Raises:
            ConfigError: if the settings or `start` do not fit the experts.
            AdapterMismatchError: if an expert does not fit the model.
        """
        untrained = untrained_router(experts, settings)
        router = untrained if start is None else Router(settings, start.tensors)
        return cls._of(model, Mixture(_names(len(experts)), tuple(experts), router), trainable_gate=True)

    @classmethod
    def molora(
        cls,
        model: nn.Module,
        modules: Sequence[str],
        *,
        experts: int,
        rank: int,
        alpha: float,
        seed: int,
        settings: RouterSettings | None = None,
    ) -> RoutedModel:
        """Fresh experts and a gate, to be trained together: MoLoRA (Zadouri et al., ICLR 2024).

        Every expert's A is uniform within ``±1/sqrt(in)``, drawn on the CPU in the order of the module names from a seed of its
        own (the first expert as a plain LoRA with that seed); B is zero, so that the model's output does not change.

        Args:
            modules: names of the linear layers to adapt.
            experts: how many.
            rank, alpha: of each expert; scaling is alpha / rank.

        Raises:
            ConfigError: if a number is below 1, or the settings are not those of `molora` (or `learned`).
            AdapterMismatchError: if a module is missing or is not linear.
        """
        settings = settings or RouterSettings(kind="molora")
        if experts < 1 or rank < 1:
            raise ConfigError(f"{experts} experts of rank {rank}: expected 1 or more of each")
        shapes = {name: _shape_of(model, name) for name in sorted(modules)}
        drawn = tuple(_fresh(shapes, rank, alpha / rank, seed + index) for index in range(experts))
        router = zero_router({name: inputs for name, (_, inputs) in shapes.items()}, experts, settings)
        if settings.base not in ("learned", "molora"):
            raise ConfigError(f"router '{settings.kind}' is not learned", "Set kind: molora.")
        mixture = Mixture(_names(experts), drawn, router)
        return cls._of(model, mixture, trainable_gate=True, trainable_experts=True)

    @classmethod
    def gated(cls, model: nn.Module, expert: Adapter) -> RoutedModel:
        """One frozen expert behind a gate to train, ``y += sigmoid(v · x) s B A x`` with v zero: PHATGOOSE's training.

        Raises:
            AdapterMismatchError: if the expert does not fit the model.
        """
        mixture = Mixture(("expert",), (expert,), Router(RouterSettings()))
        places, updates = targets(model, mixture), {}
        for name, module in places.items():
            update = RoutedUpdate([expert[name]], SigmoidGate(torch.zeros(1, expert[name].shape[1])))
            updates[name] = update.to(device_of(module))
        return cls(model, updates, Router(RouterSettings(kind="phatgoose", top_k=1)), PassWatch(model, carry=False))

    @classmethod
    def _of(
        cls, model: nn.Module, mixture: Mixture, *, trainable_gate: bool, trainable_experts: bool = False
    ) -> RoutedModel:
        places = targets(model, mixture)
        watch = PassWatch(model, carry=mixture.router.settings.kind == "sequence")
        updates = {}
        for name, module in places.items():
            update = build_update(
                mixture, name, watch, trainable_gate=trainable_gate, trainable_experts=trainable_experts
            )
            updates[name] = update.to(device_of(module))
        return cls(model, updates, mixture.router, watch)

    # --- as a model -------------------------------------------------------------------------------------------------

    def forward(self, *arguments: Any, **inputs: Any) -> Any:
        """What the base model gives, with the updates."""
        self._balance.clear()
        return self.model(*arguments, **inputs)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()  # type: ignore[operator]

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()  # type: ignore[operator]

    def remove(self) -> nn.Module:
        """Take the updates off and give the base model back."""
        for handle in self._handles:
            handle.remove()
        self._watch.remove()
        return self.model

    # --- what training reads ----------------------------------------------------------------------------------------

    def collect_balance(self, on: bool = True) -> None:
        """Begin or stop to keep what `load_balance` needs."""
        for name, update in self._named():
            update.observer = self._keeping(name) if on else None

    def load_balance(self) -> Tensor:
        """The auxiliary loss of the last forward pass, the mean of `imbalance` over the layers; 0 is even.

        Raises:
            ConfigError: if there was no pass since `collect_balance`.
        """
        if not self._balance:
            raise ConfigError("no load balance was collected", "Call collect_balance() before the forward pass.")
        values = list(self._balance.values())
        return torch.stack([value.to(values[0].device) for value in values]).mean()

    def router(self) -> Router:
        """The router as it is now, in float32 on the CPU."""
        return Router(self._settings, {name: update.gate.tensors() for name, update in self._named()})

    def gates(self) -> dict[str, Tensor]:
        """Of a `gated` model: ``module -> v [in]``, in float32 on the CPU.

        Raises:
            ConfigError: if it is not one.
        """
        return gates_of(self.router())

    def experts(self) -> list[Adapter]:
        """The experts as they are now, in float32 on the CPU."""
        count = next(update.experts for _, update in self._named())
        modules: list[dict[str, LoraFactors]] = [{} for _ in range(count)]
        for name, update in self._named():
            for index, factors in enumerate(update.factors()):
                if factors is not None:
                    modules[index][name] = factors
        return [Adapter(own) for own in modules]

    def _named(self) -> list[tuple[str, RoutedUpdate]]:
        return [(key.replace(":", "."), update) for key, update in self.updates.items()]  # type: ignore[misc]

    def _keeping(self, name: str) -> Any:
        def observe(p: Tensor) -> None:
            now = self._watch.of(p)
            self._balance[name] = imbalance(p, now.valid(self.padding) if now is not None else None)

        return observe


def _key(name: str) -> str:
    return name.replace(".", ":")


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"expert{index}" for index in range(count))


def _shape_of(model: nn.Module, name: str) -> tuple[int, int]:
    module = dict(model.named_modules()).get(name)
    shape = linear_shape(module) if module is not None else None
    if shape is None:
        what = "is not a linear layer" if module is not None else "is missing"
        raise AdapterMismatchError(f"module '{name}' {what} in the base model", "Name linear layers of the base model.")
    return shape


def _fresh(shapes: Mapping[str, tuple[int, int]], rank: int, scaling: float, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (outputs, inputs) in sorted(shapes.items()):
        A = torch.empty(rank, inputs)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        modules[name] = LoraFactors(A, torch.zeros(outputs, rank), scaling)
    return Adapter(modules)
