"""Which tensor of a model's files belongs to which module, and how it lies there; from the configuration alone."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seedbed.common.errors import AdapterMismatchError, ModelError
from seedbed.common.files import storing


@dataclass(frozen=True, slots=True)
class Target:
    """Where a module's update goes."""

    tensor: str
    """The tensor to write."""
    source: str
    """The tensor to read: another one only for an output head that shares the input embeddings' weight."""
    transposed: bool
    """Whether the weight lies as ``[in, out]``, as in GPT-2's `Conv1D`."""


@dataclass(frozen=True)
class Architecture:
    """A base model's modules, without their weights, and its ``config.json``."""

    config: Mapping[str, Any]
    modules: Mapping[str, nn.Module]
    head: str
    """Name of the output head; empty if there is none."""
    embeddings: str
    tied: bool
    """Whether the head shares the weight of the input embeddings."""

    def target(self, module: str, shape: tuple[int, int], tensors: Mapping[str, tuple[int, ...]]) -> Target:
        """Where the update of a module goes, of ``(out, in)``.

        Args:
            tensors: all tensors of the model's files, and their shapes.

        Raises:
            AdapterMismatchError: if the model has no such module, or it has another shape.
            ModelError: if its weight is not in the files.
        """
        if module not in self.modules:
            linear = [name for name, kind in self.modules.items() if _is_linear(kind)]
            close = difflib.get_close_matches(module, linear, n=1, cutoff=0.8)
            raise AdapterMismatchError(
                f"the base model has no module '{module}'{f', but {close[0]!r}' if close else ''}",
                "Use the base model that the adapters were trained on; only causal language models are folded.",
            )
        found = self.modules[module]
        transposed = type(found).__name__ == "Conv1D"
        if not _is_linear(found):
            raise AdapterMismatchError(
                f"module '{module}' of the base model is not a linear layer ({type(found).__name__})",
                "Only updates of linear layers are folded.",
            )
        tensor, source = f"{module}.weight", module
        if self.tied and module == self.head:
            source = self.embeddings
        stored = _stored(f"{source}.weight", tensors)
        tensor = stored if source == module else _renamed(tensor, f"{source}.weight", stored)
        expected = shape[::-1] if transposed else shape
        if tensors[stored] != expected:
            raise AdapterMismatchError(
                f"tensor {stored} of the base model is {list(tensors[stored])}, the adapter expects {list(expected)}",
                "Use the base model that the adapters were trained on.",
            )
        return Target(tensor, stored, transposed)


def architecture_of(directory: Path) -> Architecture:
    """Build a model's modules on the meta device: names and shapes, no memory.

    Raises:
        ModelError: if transformers cannot build it, or its weights are quantized.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with storing("read", directory / "config.json"):
        config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        raise ModelError(f"the base model in {directory} is quantized", "Fold into its unquantized original.")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, local_files_only=True))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).split("\n")[0].split(". ")[0][:200]
        raise ModelError(
            f"transformers cannot build a causal language model from {directory}: {reason}",
            "Only causal language models are folded; load others with PEFT and merge_and_unload().",
        ) from None
    names = {id(module): name for name, module in model.named_modules()}
    head = names.get(id(model.get_output_embeddings()), "")
    embeddings = names.get(id(model.get_input_embeddings()), "")
    tied = bool(getattr(model.config, "tie_word_embeddings", False)) and bool(head)
    return Architecture(config, dict(model.named_modules()), head, embeddings, tied)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _stored(name: str, tensors: Mapping[str, tuple[int, ...]]) -> str:
    """A tensor by its name in the model; files of a bare model lack the first part, those of a larger one have more."""
    bare = name.partition(".")[2]
    for candidate in (name, bare):
        if candidate in tensors:
            return candidate
    longer = [tensor for tensor in tensors if tensor.endswith(f".{name}")]
    if len(longer) != 1:
        raise ModelError(
            f"the base model's files hold no tensor {name}", "Save it with this version of transformers, then fold."
        )
    return longer[0]


def _renamed(name: str, source: str, stored: str) -> str:
    """`name` with the prefix that the files give to `source`, if they give it one."""
    return name if not stored.endswith(source) else stored.removesuffix(source) + name
