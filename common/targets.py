"""Which modules of a base model a LoRA adapts, without loading any weight."""

from __future__ import annotations

from pathlib import Path

from seedbed.common.config import LoraSettings
from seedbed.common.errors import ModelError


def target_shapes(directory: Path, lora: LoraSettings) -> dict[str, tuple[int, int]]:
    """Names and ``(out, in)`` of the linear modules that `lora.targets` selects.

    `all-linear` is every linear layer except the output head, as in PEFT; otherwise a name is selected when it equals a
    target or ends in one after a dot.

    Raises:
        ModelError: if no module is selected, or a target selects none.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    head = model.get_output_embeddings()
    linear = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if lora.targets == "all-linear":
        return linear
    for target in lora.targets:
        if not any(_selected(name, target) for name in linear):
            endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ModelError(
                f"lora.targets: '{target}' is no linear module of {directory.name}", f"It has: {', '.join(endings)}."
            )
    return {name: shape for name, shape in linear.items() if any(_selected(name, t) for t in lora.targets)}


def _selected(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
