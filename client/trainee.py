"""What a job trains: the model with its few trainable parameters, and how the result is read out of it.

The engines (`client.engine`) and the objective (`client.objective`) know only `Trainee`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from seedbed.client.lora import attach, extract, layers, load_factors
from seedbed.client.spec import TrainSpec
from seedbed.common import basemodel
from seedbed.common.adapter import Adapter
from seedbed.common.errors import ConfigError
from seedbed.common.routing import Mixture, RoutedModel, Router, RouterSettings
from seedbed.common.routing.router_file import read_router
from seedbed.common.storage import read_adapter
from seedbed.common.targets import selected_shapes

_PARAMETER = "parameter/"
_NOT_TUNED = ("routing tuning is set for a job that trains no LoRA", "Leave tuning out of gates and routers.")


class Trainee(ABC):
    """A model of which some parameters are trained.

    Attributes:
        model: what is called with token ids and gives logits.
        head: its output projection.
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        self.head: nn.Module | None = model.get_output_embeddings()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def state(self) -> dict[str, Tensor]:
        """Copies of the trained parameters on the CPU, by name; every one must be whole."""
        named = self.model.named_parameters()
        return {
            f"{_PARAMETER}{name}": parameter.detach().to("cpu", copy=True)
            for name, parameter in named
            if parameter.requires_grad
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the trained parameters to those of a `state` of the same job."""
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.startswith(_PARAMETER):
                    named[name.removeprefix(_PARAMETER)].copy_(tensor)

    @abstractmethod
    def result(self) -> Any:
        """What has been trained, in float32 on the CPU; every trained parameter must be whole."""

    def auxiliary(self) -> Tensor:
        """An auxiliary loss of the last forward pass, such as the load balance of a router.

        Raises:
            ConfigError: if this kind has none.
        """
        raise ConfigError("load_balance is set for a job that trains no router", "Leave load_balance out.")

    def silenced(self) -> AbstractContextManager[Any]:
        """Within the body the model computes what the bare base model does.

        Raises:
            ConfigError: if this kind cannot be silenced.
        """
        raise ConfigError(*_NOT_TUNED)

    def update_norms(self, wanted: Bool[Tensor, "rows tokens"]) -> AbstractContextManager[list[Tensor]]:
        """Within the body, ``‖s B A x‖₂`` of the wanted tokens is kept, one tensor for each adapted module.

        Raises:
            ConfigError: if this kind has no such update.
        """
        raise ConfigError(*_NOT_TUNED)


class LoraTrainee(Trainee):
    """A LoRA on a frozen base model; the result is an `Adapter`."""

    def result(self) -> Adapter:
        return extract(self.model)

    def silenced(self) -> AbstractContextManager[Any]:
        disabled: AbstractContextManager[Any] = self.model.disable_adapter()
        return disabled

    @contextmanager
    def update_norms(self, wanted: Tensor) -> Iterator[list[Tensor]]:
        found: list[Tensor] = []
        handles = []
        for _, layer in layers(self.model):
            for name, projection in layer.lora_B.items():
                handles.append(projection.register_forward_hook(_keeper(found, wanted, float(layer.scaling[name]))))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


class RoutedTrainee(Trainee):
    """A router, a gate, or experts with their router, over a frozen base model.

    Args:
        model: see `RoutedModel`.
        names: of the experts.
        whole: the result is the `Mixture` of experts and router, which were trained together; else the `Router`.
        balanced: keep what the auxiliary loss needs.
    """

    def __init__(self, model: RoutedModel, names: tuple[str, ...], *, whole: bool, balanced: bool) -> None:
        super().__init__(model)
        self._names, self._whole = names, whole
        model.collect_balance(balanced)

    def result(self) -> Router | Mixture:
        router = self.model.router()
        return Mixture(self._names, tuple(self.model.experts()), router) if self._whole else router

    def auxiliary(self) -> Tensor:
        balance: Tensor = self.model.load_balance()
        return balance


def make_trainee(spec: TrainSpec, device: torch.device) -> Trainee:
    """Load the base model and put on it what the spec trains.

    Raises:
        ConfigError: if the targets do not fit the model, or the router its experts.
        AdapterError: if an adapter or a router to start from, or an expert, does not fit.
        ModelError: if the base model cannot be loaded.
    """
    model, tokenizer = basemodel.load(spec.base, device)
    makers: dict[str, Callable[[TrainSpec, Any], Trainee]] = {"gate": _gate, "router": _router, "molora": _molora}
    trainee = makers.get(spec.kind, _lora)(spec, model)
    if isinstance(trainee.model, RoutedModel):
        trainee.model.padding = int(tokenizer.pad_token_id)
    return trainee


def _lora(spec: TrainSpec, model: Any) -> Trainee:
    peft_model = attach(model, spec.lora, spec.init_seed)
    if spec.start is not None:
        load_factors(peft_model, read_adapter(spec.start)[0])
    return LoraTrainee(peft_model)


def _gate(spec: TrainSpec, model: Any) -> Trainee:
    (expert,) = _experts(spec)
    return RoutedTrainee(RoutedModel.gated(model, expert), spec.names, whole=False, balanced=False)


def _router(spec: TrainSpec, model: Any) -> Trainee:
    start = read_router(spec.start)[0] if spec.start is not None else None
    routed = RoutedModel.learned(model, _experts(spec), spec.router or RouterSettings(kind="learned"), start)
    return RoutedTrainee(routed, spec.names, whole=False, balanced=spec.load_balance > 0)


def _molora(spec: TrainSpec, model: Any) -> Trainee:
    lora = spec.lora
    scaling = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    routed = RoutedModel.molora(
        model,
        list(selected_shapes(model, lora, spec.base.model)),
        experts=len(spec.names),
        rank=lora.rank,
        alpha=scaling * lora.rank,
        seed=spec.init_seed,
        settings=spec.router,
    )
    return RoutedTrainee(routed, spec.names, whole=True, balanced=spec.load_balance > 0)


def _experts(spec: TrainSpec) -> list[Adapter]:
    return [read_adapter(directory)[0] for directory in spec.experts]


def _keeper(found: list[Tensor], wanted: Tensor, scaling: float) -> Any:
    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        found.append(abs(scaling) * torch.linalg.vector_norm(output[wanted].float(), dim=-1))

    return keep
