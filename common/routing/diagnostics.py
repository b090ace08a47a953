"""What a router does, in numbers: how sure it is, whom it chooses, and whether it has collapsed onto a few experts.

Failures of routing are a subject of their own in the literature (Seeded LoRA; Switch Transformers): a router may send
everything to one expert, or never learn to prefer any. Sums are kept on the device and read once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from seedbed.common.manifest import Record
from seedbed.common.routing.settings import RouterKind

COLLAPSED_SHARE = 0.9
"""A layer has collapsed if one expert is the likeliest on more than this share of the tokens…"""
UNUSED_SHARE = 0.5
"""…or if this share of the experts, and two at least, are never the likeliest."""


class LayerDiagnostics(Record):
    """Means over the tokens of one layer, or of all."""

    tokens: int
    """Tokens seen, without padding where that is known; over all layers, the sum."""
    entropy: float
    """Of p, in nats: 0 where one expert gets all, log N where all get the same."""
    relative_entropy: float
    """Entropy divided by log N, in [0, 1]; 1 where there is one expert."""
    max_probability: float
    load: tuple[float, ...]
    """Mean p of every expert; sums to 1."""
    likeliest: tuple[float, ...]
    """Share of tokens on which an expert is the likeliest; ties are divided. Sums to 1."""
    collapsed: bool
    """See `COLLAPSED_SHARE` and `UNUSED_SHARE`; never for routers that do not look at the input."""


class RoutingDiagnostics(Record):
    """What was recorded of a router since recording began."""

    kind: RouterKind
    names: tuple[str, ...]
    """Of the experts, in the order of `load` and `likeliest`."""
    overall: LayerDiagnostics
    """Over all layers; collapsed if more than half of them are."""
    layers: dict[str, LayerDiagnostics]


class Tally:
    """Running sums of one layer: ``[2 + 2 N]`` of entropy, largest p, p and likeliest, and the number of tokens."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, p: Tensor, valid: Tensor | None) -> None:
        """Count ``p [..., N]`` where `valid [...]` says so."""
        p = p.detach().reshape(-1, self.experts).float()
        weights = torch.ones_like(p[:, 0]) if valid is None else valid.reshape(-1).to(p)
        largest = p.max(-1, keepdim=True).values
        best = (p == largest).to(p.dtype)
        entropy = torch.special.entr(p).sum(-1, keepdim=True)
        columns = torch.cat([torch.ones_like(largest), entropy, largest, p, best / best.sum(-1, keepdim=True)], dim=1)
        sums = weights @ columns
        sums = sums if sums.device.type == "mps" else sums.double()
        self._sums = sums if self._sums is None else self._sums + sums

    def numbers(self) -> list[float]:
        return [0.0] * (3 + 2 * self.experts) if self._sums is None else [float(x) for x in self._sums.tolist()]


def diagnose(
    kind: RouterKind, names: Sequence[str], tallies: Mapping[str, Tally], *, constant: bool
) -> RoutingDiagnostics:
    """Read what was recorded.

    Args:
        constant: whether the router does not look at the input; then nothing can collapse.
    """
    numbers = {name: tally.numbers() for name, tally in tallies.items()}
    layers = {name: _layer(sums, constant) for name, sums in numbers.items()}
    overall = _layer([math.fsum(column) for column in zip(*numbers.values(), strict=True)], constant)
    collapsed = 2 * sum(layer.collapsed for layer in layers.values()) > len(layers)
    return RoutingDiagnostics(
        kind=kind,
        names=tuple(names),
        overall=overall.model_copy(update={"collapsed": collapsed}),
        layers=layers,
    )


def _layer(sums: Sequence[float], constant: bool) -> LayerDiagnostics:
    experts = (len(sums) - 3) // 2
    tokens = sums[0]
    entropy, largest, *shares = (total / tokens if tokens else 0.0 for total in sums[1:])
    load, likeliest = shares[:experts], shares[experts:]
    return LayerDiagnostics(
        tokens=round(tokens),
        entropy=entropy,
        relative_entropy=entropy / math.log(experts) if experts > 1 else 1.0,
        max_probability=largest,
        load=tuple(load),
        likeliest=tuple(likeliest),
        collapsed=bool(tokens) and not constant and has_collapsed(likeliest),
    )


def pooled(parts: Sequence[LayerDiagnostics], *, constant: bool) -> LayerDiagnostics:
    """Diagnostics of all tokens of several recordings of one layer (or of several layers) together.

    Args:
        parts: at least one, over the same experts.
        constant: see `diagnose`.
    """
    tokens = sum(part.tokens for part in parts)
    weights = [part.tokens / tokens if tokens else 1 / len(parts) for part in parts]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(weight * value for weight, value in zip(weights, values, strict=True))

    likeliest = [mean(shares) for shares in zip(*(part.likeliest for part in parts), strict=True)]
    return LayerDiagnostics(
        tokens=tokens,
        entropy=mean([part.entropy for part in parts]),
        relative_entropy=mean([part.relative_entropy for part in parts]),
        max_probability=mean([part.max_probability for part in parts]),
        load=tuple(mean(shares) for shares in zip(*(part.load for part in parts), strict=True)),
        likeliest=tuple(likeliest),
        collapsed=bool(tokens) and not constant and has_collapsed(likeliest),
    )


def has_collapsed(likeliest: Sequence[float]) -> bool:
    """Whether one expert is the likeliest on more than 90 % of the tokens, or half of them (two at least) never are."""
    unused = sum(share == 0 for share in likeliest)
    return len(likeliest) > 1 and (
        max(likeliest) > COLLAPSED_SHARE or (unused >= 2 and unused >= UNUSED_SHARE * len(likeliest))
    )


def imbalance(p: Tensor, valid: Tensor | None) -> Tensor:
    """``N Σ_i P_i² − 1`` with ``P`` the mean of ``p [..., N]`` over the tokens that count: an auxiliary loss.

    The squared coefficient of variation of the experts' importance (Shazeer et al., *Outrageously Large Neural Networks*,
    ICLR 2017): 0 where the load is even, N − 1 where one expert has all. Rather than the product with the share of tokens
    dispatched (Switch Transformers), which is constant for a router that uses all experts, and which is decided by the order
    of the experts where a gate starts from zeros.
    """
    p = p.reshape(-1, p.shape[-1]).float()
    if valid is None:
        importance = p.mean(0)
    else:
        weights = valid.reshape(-1).to(p)
        importance = weights @ p / weights.sum().clamp(min=1)
    return p.shape[-1] * importance.square().sum() - 1
