"""A trainable LoRA on a frozen base model: put on by PEFT, filled from an `Adapter` or drawn anew, and read back.

Factors are float32 whatever the dtype of the base model: AdamW's small steps would be lost in bfloat16's 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.config import LoraSettings
from seedbed.common.errors import AdapterMismatchError, ConfigError

_NAME = "default"
_PREFIX = "base_model.model."


def attach(model: nn.Module, lora: LoraSettings, init_seed: int) -> Any:
    """Put a fresh LoRA on a base model: A drawn from `init_seed`, B zero, so that the model's output does not change.

    A is uniform within ``±1/sqrt(in)`` (He et al.'s initialization with a = sqrt(5), as in PEFT), drawn on the CPU in
    the order of the module names: the same numbers on every machine, device and version of PEFT.

    Raises:
        ConfigError: if `lora.targets` selects no linear layer of this model.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"lora.targets {lora.targets} does not fit the base model: {str(error).splitlines()[0]}",
            "Use all-linear, or endings of the names of its linear layers.",
        ) from None
    generator = torch.Generator().manual_seed(init_seed)
    with torch.no_grad():
        for _, layer in sorted(layers(peft_model)):
            A, B = _weights(layer)
            drawn = torch.empty(A.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            A.copy_(drawn)
            B.zero_()
    return peft_model


def layers(peft_model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every adapted layer with the name that its module has in the base model."""
    from peft.tuners.lora import LoraLayer

    for name, module in peft_model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix(_PREFIX), module


def load_factors(peft_model: nn.Module, adapter: Adapter) -> None:
    """Set A and B from an adapter, as the starting point of training.

    Raises:
        AdapterMismatchError: if the adapter has other modules, shapes, ranks or scalings than the model's LoRA; then
            nothing is changed.
    """
    found = dict(layers(peft_model))
    for name in sorted(found.keys() ^ adapter.keys()):
        where = "the adapter to start from" if name in found else "the LoRA that is to be trained"
        raise AdapterMismatchError(
            f"module '{name}' is missing in {where}", "Set lora.targets as the adapter has them."
        )
    for name, factors in adapter.items():
        A, B = _weights(found[name])
        got = (tuple(factors.A.shape), tuple(factors.B.shape), factors.scaling)
        expected = (tuple(A.shape), tuple(B.shape), float(found[name].scaling[_NAME]))
        if got[:2] != expected[:2] or not math.isclose(got[2], expected[2], rel_tol=1e-6):
            raise AdapterMismatchError(
                f"module '{name}': expected {_told(expected)}, but the adapter to start from has {_told(got)}",
                "Set lora.rank, lora.alpha and lora.rslora as the adapter has them.",
            )
    with torch.no_grad():
        for name, factors in adapter.items():
            A, B = _weights(found[name])
            A.copy_(factors.A)
            B.copy_(factors.B)


def _told(values: tuple[tuple[int, ...], tuple[int, ...], float]) -> str:
    return f"A {list(values[0])}, B {list(values[1])}, scaling {values[2]:g}"


def extract(peft_model: nn.Module) -> Adapter:
    """Read the trained factors, in float32 on the CPU, detached from the model."""
    return Adapter(
        {
            name: LoraFactors(_copied(A), _copied(B), float(layer.scaling[_NAME]))
            for name, layer in layers(peft_model)
            for A, B in (_weights(layer),)
        }
    )


def _weights(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight


def _copied(weight: nn.Parameter) -> torch.Tensor:
    return weight.detach().to(device="cpu", dtype=torch.float32, copy=True)
