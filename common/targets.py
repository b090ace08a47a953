"""Which modules of a base model a LoRA adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from seedbed.common.config import LoraSettings
from seedbed.common.errors import ModelError


def target_shapes(directory: Path, lora: LoraSettings) -> dict[str, tuple[int, int]]:
    """`selected_shapes` of the model in a directory, without loading any weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return selected_shapes(model, lora, directory.name)


def selected_shapes(model: Any, lora: LoraSettings, name: str) -> dict[str, tuple[int, int]]:
    """Names and ``(out, in)`` of the linear modules that `lora.targets` selects.

    `all-linear` is every linear layer except the output head, as in PEFT; otherwise a name is selected when it equals a
    target or ends in one after a dot.

    Args:
        name: of the model, for messages.

    Raises:
        ModelError: if no module is selected, or a target selects none.
    """
    head = model.get_output_embeddings()
    linear = {
        module_name: (module.out_features, module.in_features)
        for module_name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if lora.targets == "all-linear":
        return linear
    for target in lora.targets:
        if not any(_selected(linear_name, target) for linear_name in linear):
            endings = sorted({linear_name.rsplit(".", 1)[-1] for linear_name in linear})
            raise ModelError(
                f"lora.targets: '{target}' is no linear module of {name}", f"It has: {', '.join(endings)}."
            )
    return {key: shape for key, shape in linear.items() if any(_selected(key, target) for target in lora.targets)}


def _selected(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
