"""Differential privacy of one participant's update: the Gaussian mechanism on the factors, and its exact accountant.

    u  = factors(update) - factors(reference)          all entries of all A and B, as one vector
    u' = u · min(1, C / ‖u‖₂)                           clipped to the norm C
    M  = reference + u' + N(0, (σ C)² I)                σ is the noise multiplier

**What it protects.** The participant's whole data set, from everybody who sees the update (the coordinator, too: noise is
added before anything leaves). Neighbours are any two data sets of this participant (local differential privacy at the level
of the user), so two clipped updates differ by at most Δ = 2C and the mechanism is μ-Gaussian-DP with μ = Δ / (σC) = 2/σ.
The reference must not depend on the data: the seed, or a fresh initialization. Whatever is computed from M later (products
B·A, merging, rounding for the transfer) costs nothing more.

**What it does not.** It says nothing about single examples in particular, hides neither that the participant takes part, nor
how long its training takes, and covers the update alone: metrics and hashes of the data must not travel with it. Of
a participant's several updates every one counts (`composed`). Noise is drawn in float64 and rounded; attacks on the lowest
bits of floating-point noise (Mironov, CCS 2012) are not defended against.

Sources: Dwork & Roth, *Algorithmic Foundations of DP* (2014); McMahan et al., *Learning differentially private recurrent
language models* (ICLR 2018), for clipping whole updates; Balle & Wang, *Improving the Gaussian mechanism* (ICML 2018),
Theorem 8, for δ(ε); Dong, Roth & Su, *Gaussian differential privacy* (JRSS-B 2022), Corollary 3.3, for composition.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.algebra import require_same_factors
from seedbed.common.errors import ConfigError
from seedbed.common.manifest import Record

_SENSITIVITY = 2.0
"""In units of the clipping norm: two clipped updates may point in opposite directions."""
_WIDEST_EPSILON = 1e9


class PrivacySettings(Record):
    """How a participant protects its updates.

    Raises:
        ConfigError: if the noise protects nothing, or drowns everything: said before the training rather than after it.
    """

    clip: Annotated[float, Field(gt=0)]
    """Largest L2 norm C of an update, over all entries of all factors."""
    noise_multiplier: Annotated[float, Field(gt=0)]
    """σ: the noise's standard deviation in every entry, in units of `clip`."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """The δ at which ε is stated."""
    seed: int | None = None
    """For tests alone: draws noise that anybody who knows the number can take off again."""

    @model_validator(mode="after")
    def _protects(self) -> PrivacySettings:
        if not math.isfinite(self.clip * self.noise_multiplier):
            raise ConfigError(
                f"noise of {self.noise_multiplier:g} times the norm {self.clip:g} leaves nothing of an update",
                "Lower the clipping norm or the noise multiplier.",
            )
        epsilon_of(composed([self.noise_multiplier]), self.delta)
        return self


@dataclass(frozen=True, slots=True)
class Private:
    """A privatized update."""

    adapter: Adapter
    clipped: bool
    """Whether the update was longer than the clipping norm. Not covered by the guarantee: it must stay with the participant."""


def privatize(
    update: Adapter,
    reference: Adapter,
    *,
    clip: float,
    noise_multiplier: float,
    generator: torch.Generator | None = None,
) -> Private:
    """Clip an update against its reference and add Gaussian noise to every entry; see the module's description.

    Args:
        reference: what the update was trained from, of the same modules, shapes and scalings; independent of the data.
        generator: for tests alone; None draws from the operating system's secure source.

    Raises:
        AdapterMismatchError: if the two differ in modules, shapes or scalings.
    """
    require_same_factors(reference, update)
    norm = update_norm(update, reference)
    share = 1.0 if norm <= clip else clip / norm
    deviation = noise_multiplier * clip

    def release(one: Tensor, start: Tensor) -> Tensor:
        noise = normal(one.shape, generator) * deviation
        return (start.double() + (one.double() - start.double()) * share + noise).to(one.dtype)

    def of(name: str, factors: LoraFactors) -> LoraFactors:
        start = reference[name]
        return LoraFactors(release(factors.A, start.A), release(factors.B, start.B), factors.scaling)

    return Private(Adapter({name: of(name, factors) for name, factors in update.items()}), norm > clip)


def update_norm(update: Adapter, reference: Adapter) -> float:
    """L2 norm of the difference of all factors' entries, in float64."""
    squares = [
        float((one.double() - start.double()).square().sum())
        for name, factors in update.items()
        for one, start in ((factors.A, reference[name].A), (factors.B, reference[name].B))
    ]
    return math.sqrt(math.fsum(squares))


def normal(shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers in float64.

    Without a generator they come from the operating system's secure source by the Box-Muller transform: torch's own
    generator is a Mersenne twister, whose state, and so the noise, can be found from enough of its output.
    """
    if generator is not None:
        return torch.randn(shape, dtype=torch.float64, generator=generator)
    radius, angle = _uniform(shape), _uniform(shape)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


def _uniform(shape: torch.Size) -> Tensor:
    """Uniform in (0, 1], in steps of 2^-53."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=torch.float64)
    bits = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64) & ((1 << 53) - 1)
    return ((bits + 1).double() * 2.0**-53).reshape(shape)


def composed(noise_multipliers: Iterable[float]) -> float:
    """μ of several updates of one participant together: Gaussian mechanisms compose exactly, ``μ² = Σ (2/σ_i)²``."""
    return math.hypot(*(_SENSITIVITY / sigma for sigma in noise_multipliers))


def delta_of(epsilon: float, mu: float) -> float:
    """The smallest δ for which a μ-Gaussian-DP mechanism is (ε, δ)-DP.

    ``δ(ε) = Φ(μ/2 - ε/μ) - e^ε · Φ(-μ/2 - ε/μ)``  (Balle & Wang 2018, Theorem 8)
    """
    points = torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64)
    upper, lower = torch.special.log_ndtr(points).tolist()
    return max(0.0, math.exp(upper) - math.exp(min(0.0, epsilon + lower)))


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest ε for which a μ-Gaussian-DP mechanism is (ε, δ)-DP, rounded up in the tenth digit.

    Raises:
        ConfigError: if the noise is so little that ε is beyond a billion.
    """
    if mu == 0 or delta_of(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(high, mu) > delta:
        low, high = high, 2 * high
        if high > _WIDEST_EPSILON:
            raise ConfigError(f"noise with mu = {mu:.3g} protects nothing", "Raise the noise multiplier.")
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if delta_of(middle, mu) <= delta else (middle, high)
    return high
