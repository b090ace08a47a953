"""The value that everything else speaks of: a LoRA adapter as a frozen map of low-rank factors.

Per adapted linear module with frozen weight ``W0 [out, in]`` the update is ``dW = s · B · A`` with ``A [r, in]``,
``B [out, r]`` and scaling ``s`` (``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA), after Hu et al., *LoRA* (ICLR 2022).
Ranks and scalings may differ from module to module. No input or output happens here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from seedbed.common.errors import AdapterFormatError


@dataclass(frozen=True, slots=True, eq=False)
class LoraFactors:
    """The low-rank update ``scaling · B · A`` of one linear module.

    Raises:
        AdapterFormatError: if A and B are not matrices that share a rank, dtype and device.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scaling: float

    def __post_init__(self) -> None:
        a, b = tuple(self.A.shape), tuple(self.B.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise AdapterFormatError(f"factors A {list(a)} and B {list(b)} do not share a rank")
        if self.A.dtype != self.B.dtype or self.A.device != self.B.device:
            raise AdapterFormatError(
                f"factors A ({self.A.dtype}, {self.A.device}) and B ({self.B.dtype}, {self.B.device}) differ"
            )

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the module that is adapted."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Float[Tensor, "out in"]:
        """The dense update ``s · B · A``; for checks and small shapes, since it is as large as the weight."""
        return self.scaling * (self.B @ self.A)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LoraFactors:
        return LoraFactors(self.A.to(dtype=dtype, device=device), self.B.to(dtype=dtype, device=device), self.scaling)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter(Mapping[str, LoraFactors]):
    """A frozen map ``module name -> LoraFactors``, iterated in the order of the names.

    Module names are those of the base model (``model.layers.0.self_attn.q_proj``), without PEFT's prefixes.
    """

    modules: Mapping[str, LoraFactors]

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", MappingProxyType(dict(sorted(self.modules.items()))))

    def __getitem__(self, name: str) -> LoraFactors:
        return self.modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def map(self, function: Callable[[LoraFactors], LoraFactors]) -> Adapter:
        """Apply `function` to every module."""
        return Adapter({name: function(factors) for name, factors in self.items()})

    @property
    def parameters(self) -> int:
        """Number of stored numbers, ``Σ r · (in + out)``."""
        return sum(factors.A.numel() + factors.B.numel() for factors in self.values())
