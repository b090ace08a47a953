"""Put an adapter on a loaded base model and take it off again, without touching the model's weights.

Each adapted linear module gets a forward hook that adds ``s · B(A x)`` to its output (Hu et al., *LoRA*, ICLR 2022),
so one base model in memory serves any number of adapters in turn, of any mixture of ranks and target modules.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError


class AdapterSlot:
    """The place of at most one adapter on `model`. For inference: gradients do not reach the factors."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._norms: list[Tensor] | None = None

    @contextmanager
    def norms(self) -> Iterator[list[Tensor]]:
        """Within the body, every adapted module adds ``‖s B A x‖₂`` of each token, ``[rows, tokens]``, to the list."""
        self._norms = []
        try:
            yield self._norms
        finally:
            self._norms = None

    def put(self, adapter: Adapter | None) -> None:
        """Replace the adapter that is on the model; None leaves the bare base model.

        Raises:
            AdapterMismatchError: if a module is missing in the model or has another shape; then nothing is changed.
        """
        modules = dict(self._model.named_modules())
        pairs = [(target_module(modules, name, factors), factors) for name, factors in (adapter or {}).items()]
        for handle in self._handles:
            handle.remove()
        self._handles = [module.register_forward_hook(self._hook(module, factors)) for module, factors in pairs]

    def _hook(self, module: nn.Module, factors: LoraFactors) -> Any:
        device = next(module.parameters()).device
        A = factors.A.detach().to(device)
        B = (factors.scaling * factors.B.detach()).to(device)

        def add_update(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            fused = not torch.is_grad_enabled() and output.dtype == B.dtype and output.is_contiguous()
            if self._norms is not None or not fused:
                update = F.linear(F.linear(x.to(A.dtype), A), B)
                if self._norms is not None:
                    self._norms.append(torch.linalg.vector_norm(update.float(), dim=-1))
                return output + update.to(output.dtype)
            # In place, as one fused product: the update costs no second tensor of the output's size.
            flat = output.view(-1, output.shape[-1])
            flat.addmm_(F.linear(x, A).view(-1, A.shape[0]), B.T)
            return output

        return add_update


def target_module(modules: dict[str, nn.Module], name: str, factors: LoraFactors) -> nn.Module:
    module = modules.get(name)
    if module is None:
        close = difflib.get_close_matches(name, modules, n=1)
        hint = f"The nearest one is '{close[0]}'." if close else "Is this adapter made for another base model?"
        raise AdapterMismatchError(f"the base model has no module '{name}', which the adapter adapts", hint)
    shape = linear_shape(module)
    if shape != factors.shape:
        raise AdapterMismatchError(
            f"module '{name}' is {list(shape) if shape else 'not a linear layer'} in the base model, "
            f"but the adapter expects {list(factors.shape)} [out, in]",
            "Use the base model that the adapter was trained on.",
        )
    return module


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` of a linear module, also of quantized ones and of GPT-2's transposed `Conv1D`."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return int(module.nf), int(module.nx)  # type: ignore[arg-type]
    return None
