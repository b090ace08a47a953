"""Gates: from a token's activations ``x [..., in]`` to the probabilities ``p [..., N]`` of the experts.

| gate | p |
| --- | --- |
| ConstantGate | the same for every token: uniform, weighted, or one-hot (oracle) |
| LearnedGate | softmax(W x + b); MoLoRA and MoV (Zadouri et al., *Pushing Mixture of Experts to the Limit*, ICLR 2024) |
| ArrowGate | softmax(abs(v_i · x)); Arrow (Ostapenko et al., *Towards Modular LLMs*, ICML 2024) |
| PhatgooseGate | softmax(v_i · x / sqrt(in)), both standardized; PHATGOOSE (Muqeeth et al., ICML 2024) |
| SigmoidGate | sigmoid(v · x) of one expert: what PHATGOOSE trains |

All but the first and the last divide by a temperature and may keep only the k largest scores. Every score begins with a
product of x and a few rows; whoever calls a gate may compute it (`project`), together with others that read x.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seedbed.common.algebra import normalized
from seedbed.common.routing.settings import RouterSettings

Project = Callable[[Tensor, Tensor], Tensor]
"""``(x [..., in], rows [N, in]) -> [..., N]``: a linear product without bias."""


class Gate(nn.Module):
    """``x [..., in] -> p [..., N]``; each p sums to 1 (but for `SigmoidGate`).

    ``forward(x, project)`` calls `project` with x and `rows()`, once, unless there are none.
    """

    def rows(self) -> Tensor | None:
        """``[N, in]``: what x is multiplied with; none if the gate does not look at x."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What the router keeps of it, in float32 on the CPU."""
        return {}


class ConstantGate(Gate):
    """The same probabilities ``[N]`` for every token, without a look at it."""

    shares: Tensor

    def __init__(self, shares: Tensor) -> None:
        super().__init__()
        self.register_buffer("shares", shares, persistent=False)

    def forward(self, x: Tensor, project: Project = F.linear) -> Tensor:
        return self.shares.expand(*x.shape[:-1], -1)

    def select(self, index: int) -> None:
        """Give all to one expert."""
        self.shares.zero_()[index] = 1.0


class ScoreGate(Gate, ABC):
    """A softmax of scores, which a subclass computes."""

    ties: ClassVar[bool] = False
    """See `probabilities`."""

    def __init__(self, settings: RouterSettings) -> None:
        super().__init__()
        self.top_k, self.temperature = settings.top_k, settings.temperature

    @abstractmethod
    def rows(self) -> Tensor:
        """See `Gate.rows`; never none."""

    @abstractmethod
    def scores(self, x: Tensor, products: Tensor) -> Tensor:
        """From ``products = x · rowsᵀ [..., N]``."""

    def forward(self, x: Tensor, project: Project = F.linear) -> Tensor:
        return probabilities(self.scores(x, project(x, self.rows())), self.top_k, self.temperature, ties=self.ties)


class LearnedGate(ScoreGate):
    """``W x + b``; zeros, from which training starts, give every expert the same."""

    ties = True
    weight: Tensor
    bias: Tensor

    def __init__(self, settings: RouterSettings, weight: Tensor, bias: Tensor, *, trainable: bool) -> None:
        super().__init__(settings)
        hold(self, {"weight": weight, "bias": bias}, trainable)

    def rows(self) -> Tensor:
        return self.weight

    def scores(self, x: Tensor, products: Tensor) -> Tensor:
        return products + self.bias

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": stored(self.weight), "bias": stored(self.bias)}


class ArrowGate(ScoreGate):
    """``abs(v_i · x)``: how much of the token lies along the leading input direction of each expert's update."""

    prototypes: Tensor

    def __init__(self, settings: RouterSettings, prototypes: Tensor) -> None:
        super().__init__(settings)
        hold(self, {"prototypes": prototypes})

    def rows(self) -> Tensor:
        return self.prototypes

    def scores(self, x: Tensor, products: Tensor) -> Tensor:
        return products.abs()

    def tensors(self) -> dict[str, Tensor]:
        return {"prototypes": stored(self.prototypes)}


class PhatgooseGate(ScoreGate):
    """``v_i · x / sqrt(in)`` of standardized v_i and x (mean 0, variance 1 over the `in` places).

    Since a standardized v has mean 0, ``v · (x − mean) / std = (v · x) / std``: x itself is never rewritten. An expert
    without a gate (zeros) scores 0.
    """

    gates: Tensor
    directions: Tensor

    def __init__(self, settings: RouterSettings, gates: Tensor) -> None:
        super().__init__(settings)
        precise = gates.double()
        centred = precise - precise.mean(-1, keepdim=True)
        spread = centred.square().mean(-1, keepdim=True).sqrt()
        directions = torch.where(spread > 0, centred / spread, 0.0) / math.sqrt(gates.shape[-1])
        hold(self, {"gates": gates, "directions": directions.to(gates.dtype)})

    def rows(self) -> Tensor:
        return self.directions

    def scores(self, x: Tensor, products: Tensor) -> Tensor:
        variance = x.var(-1, correction=0, keepdim=True)
        return products * (variance + torch.finfo(x.dtype).tiny).rsqrt()

    def tensors(self) -> dict[str, Tensor]:
        return {"gates": stored(self.gates)}


class SigmoidGate(Gate):
    """``sigmoid(v · x)`` of one expert, ``[..., 1]``; v starts from zeros, where the gate is half open."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        hold(self, {"weight": weight}, trainable=True)

    def rows(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor, project: Project = F.linear) -> Tensor:
        return project(x, self.weight).sigmoid()

    def tensors(self) -> dict[str, Tensor]:
        return {"gates": stored(self.weight)}


def make_gate(
    settings: RouterSettings, tensors: Mapping[str, Tensor], count: int, *, dtype: torch.dtype, trainable: bool = False
) -> Gate:
    """The gate of one module by token, on the CPU, in `dtype`; see `Router` for the tensors.

    Args:
        count: number of experts, N.
        trainable: whether the gate's numbers are parameters (of `learned` and `molora`).
    """
    own = {name: tensor.detach().to(device="cpu", dtype=dtype, copy=True) for name, tensor in tensors.items()}
    if settings.base == "uniform":
        return ConstantGate(torch.tensor(normalized(settings.weights, count), dtype=dtype))
    if settings.base == "oracle":
        gate = ConstantGate(torch.zeros(count, dtype=dtype))
        gate.select(settings.expert)
        return gate
    if settings.base == "arrow":
        return ArrowGate(settings, own["prototypes"])
    if settings.base == "phatgoose":
        return PhatgooseGate(settings, own["gates"])
    return LearnedGate(settings, own["weight"], own["bias"], trainable=trainable)


def probabilities(scores: Tensor, top_k: int | None, temperature: float, *, ties: bool = True) -> Tensor:
    """Softmax of ``scores / temperature [..., N]`` over the k largest, zero elsewhere.

    Args:
        ties: whether experts that tie with the k-th stay, as they must in a gate that starts from zeros: it must start
            uniform and give every expert a gradient. Else exactly k take part; where experts that lack the module
            (whose scores are zero) fill the places, which of them do changes nothing.
    """
    if temperature != 1.0:
        scores = scores / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        if not ties:
            largest, places = scores.topk(top_k, dim=-1)
            return torch.zeros_like(scores).scatter(-1, places, largest.softmax(-1))
        least = scores.detach().topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    return scores.softmax(-1)


def hold(module: nn.Module, tensors: Mapping[str, Tensor], trainable: bool = False) -> None:
    """Register tensors as parameters, or as buffers that no state dict repeats: a file of their own holds them."""
    for name, tensor in tensors.items():
        if trainable:
            module.register_parameter(name, nn.Parameter(tensor))
        else:
            module.register_buffer(name, tensor, persistent=False)


def stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True)
