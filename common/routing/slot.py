"""Put a mixture on a loaded base model and take it off again, without touching the model's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from seedbed.common.adapter import LoraFactors
from seedbed.common.algebra import wide
from seedbed.common.attach import target_module
from seedbed.common.errors import ConfigError
from seedbed.common.routing.diagnostics import RoutingDiagnostics, Tally, diagnose
from seedbed.common.routing.gates import ConstantGate, make_gate
from seedbed.common.routing.mixture import Mixture
from seedbed.common.routing.passes import PassWatch, SequenceGate
from seedbed.common.routing.settings import CONSTANT
from seedbed.common.routing.update import RoutedUpdate


class MixtureSlot:
    """The place of at most one mixture on `model`. For inference; `RoutedModel` trains.

    Args:
        model: a transformers causal LM, on any device, in any dtype.
        dtype: to compute the updates in; none is float32 (or float64 if an expert has it).
    """

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        self._model, self._dtype = model, dtype
        self._handles: list[RemovableHandle] = []
        self._watch: PassWatch | None = None
        self._updates: dict[str, RoutedUpdate] = {}
        self._tallies: dict[str, Tally] = {}
        self.mixture: Mixture | None = None

    def put(self, mixture: Mixture | None) -> None:
        """Replace the mixture that is on the model; None leaves the bare base model. Recording ends.

        Raises:
            AdapterMismatchError: if a module is missing in the model or has another shape; then nothing is changed.
        """
        places = targets(self._model, mixture) if mixture is not None else {}
        self._clear()
        self.mixture = mixture
        if mixture is None:
            return
        watch = self._watch = PassWatch(self._model, carry=mixture.router.settings.kind == "sequence")
        for name, module in places.items():
            update = build_update(mixture, name, watch, dtype=self._dtype)
            self._updates[name] = update.to(device_of(module)).requires_grad_(False)
            self._handles.append(module.register_forward_hook(adding(update)))

    def select_expert(self, index: int) -> None:
        """Give every token to one expert, from now on.

        Raises:
            ConfigError: if the router is no oracle, or there is no such expert.
        """
        if self.mixture is None or self.mixture.router.settings.kind != "oracle":
            raise ConfigError("only an oracle's expert can be selected", "Put a mixture with the router 'oracle'.")
        self.mixture.router.settings.model_copy(update={"expert": index}).require(len(self.mixture.experts))
        for update in self._updates.values():
            assert isinstance(update.gate, ConstantGate)
            update.gate.select(index)

    def record(self, on: bool = True, *, padding: int | None = None) -> None:
        """Begin to record what the router does, from zero, or stop; what was recorded stays until the next beginning.

        Args:
            padding: id of the padding token, for passes that come without an attention mask by token.
        """
        if on:
            self._tallies = {name: Tally(update.experts) for name, update in self._updates.items()}
        for name, update in self._updates.items():
            update.observer = _recording(self._tallies[name], self._watch, padding) if on else None

    def diagnostics(self) -> RoutingDiagnostics:
        """What has been recorded.

        Raises:
            ConfigError: if nothing was: call `record` first.
        """
        if self.mixture is None or not self._tallies:
            raise ConfigError("nothing of the routing was recorded", "Put a mixture and call record() first.")
        settings = self.mixture.router.settings
        return diagnose(settings.kind, self.mixture.names, self._tallies, constant=settings.base in CONSTANT)

    def _clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._watch is not None:
            self._watch.remove()
        self._handles, self._watch, self._updates, self._tallies = [], None, {}, {}


def targets(model: nn.Module, mixture: Mixture) -> dict[str, nn.Module]:
    """The modules of the base model that a mixture adapts.

    Raises:
        AdapterMismatchError: if one is missing or has another shape.
    """
    modules = dict(model.named_modules())
    return {name: target_module(modules, name, _any_factors(mixture, name)) for name in mixture.shapes}


def _any_factors(mixture: Mixture, name: str) -> LoraFactors:
    return next(factors for factors in mixture.factors(name) if factors is not None)


def build_update(
    mixture: Mixture,
    name: str,
    watch: PassWatch,
    *,
    dtype: torch.dtype | None = None,
    trainable_gate: bool = False,
    trainable_experts: bool = False,
) -> RoutedUpdate:
    """The routed layer of one module, on the experts' device."""
    factors = mixture.factors(name)
    dtype = dtype or wide(own for own in factors if own is not None)
    settings = mixture.router.settings
    tensors = mixture.router.tensors.get(name, {})
    gate = make_gate(settings, tensors, len(factors), dtype=dtype, trainable=trainable_gate)
    if settings.kind == "sequence":
        gate = SequenceGate(gate, watch, name)
    return RoutedUpdate(factors, gate, dtype=dtype, trainable_experts=trainable_experts)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are. Those that ZeRO 3 has cut into slices say `meta`; they will be on this rank's device."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def adding(update: RoutedUpdate) -> Any:
    """A forward hook that adds a routed update to a linear layer's output."""

    def add_update(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        result: Tensor = update(inputs[0], output)
        return result

    return add_update


def _recording(tally: Tally, watch: PassWatch | None, padding: int | None) -> Callable[[Tensor], None]:
    def observe(p: Tensor) -> None:
        now = watch.of(p) if watch is not None else None
        tally.add(p, now.valid(padding) if now is not None else None)

    return observe
