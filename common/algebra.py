"""A small algebra of adapters: scale, add, mean, norm, inner product; every method of merging is a sentence in it.

All of it is exact low-rank arithmetic on the factors: a dense ``[out, in]`` update is never formed. The identity behind
it is concatenation,

    Σ_i w_i s_i B_i A_i  =  [w_1 s_1 B_1 | … | w_N s_N B_N] · [A_1; …; A_N],

so a sum of adapters is again an adapter, of rank Σ r_i. Ranks, scalings and sets of modules may differ: a module that
an adapter does not have is a zero update. Nothing is changed in place. Factors in half precision are widened to float32
where numbers are computed, so that results are exact to float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError, ConfigError

Weighted = tuple[LoraFactors, float]


def scale(adapter: Adapter, factor: float) -> Adapter:
    """``factor · dW`` of every module; only the scalings change, the factors are shared."""
    return adapter.map(lambda module: LoraFactors(module.A, module.B, module.scaling * factor))


def concatenate(pairs: Iterable[tuple[Adapter, float]]) -> Adapter:
    """The exact weighted sum ``Σ w_i dW_i`` as one adapter of rank ``Σ r_i``.

    Weights are used as they are, of either sign; scalings are folded into B, the result's scaling is 1. Terms of weight
    0 take no part, except that their modules remain.

    Raises:
        AdapterMismatchError: if a module has different shapes in two adapters.
    """
    terms: dict[str, list[Weighted]] = {}
    for adapter, weight in pairs:
        for name, factors in adapter.items():
            terms.setdefault(name, []).append((factors, weight))
    return Adapter({name: concatenate_factors(name, module) for name, module in terms.items()})


def concatenate_factors(name: str, terms: Sequence[Weighted]) -> LoraFactors:
    """`concatenate` for the one module called `name`, of at least one term."""
    used = [(factors, weight) for factors, weight in terms if weight != 0] or terms[:1]
    require_same_shape(name, [factors for factors, _ in terms])
    dtype = wide(factors for factors, _ in used)
    A = torch.cat([factors.A.to(dtype) for factors, _ in used], dim=0)
    B = torch.cat([factors.B.to(dtype) * (weight * factors.scaling) for factors, weight in used], dim=1)
    return LoraFactors(A, B, 1.0)


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """``Σ w_i dW_i``, exact; see `concatenate`.

    Raises:
        ConfigError: if there are not as many weights as adapters.
    """
    return concatenate(zip(adapters, _checked(weights, len(adapters)), strict=True))


def add(left: Adapter, right: Adapter) -> Adapter:
    """``dW_left + dW_right``, exact."""
    return concatenate([(left, 1.0), (right, 1.0)])


def subtract(left: Adapter, right: Adapter) -> Adapter:
    """``dW_left − dW_right``, exact."""
    return concatenate([(left, 1.0), (right, -1.0)])


def average(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    seed: Adapter | None = None,
    task_scale: float = 1.0,
) -> Adapter:
    """The mean of the experts' outputs as one adapter: the merge of *Seeded LoRA* (OpenReview U3UtvOYMiw, 2024).

        dW  =  dW_seed + λ Σ_i w_i (dW_i − dW_seed)  =  (1 − λ) dW_seed + λ Σ_i w_i dW_i ,     Σ_i w_i = 1

    λ = 1 is the paper's; there the seed cancels and is not needed. A larger λ gives back to the tasks what the mean
    takes from them, while the seed keeps its size (our option).

    Args:
        adapters: the experts, of any ranks.
        weights: one for each expert, not negative; divided by their sum. None weighs all the same.
        seed: the adapter that all experts started from.
        task_scale: λ.

    Raises:
        ConfigError: if there is no adapter, a wrong number of weights, a negative one or none above zero, or if
            `task_scale` is not 1 and there is no seed.
        AdapterMismatchError: if a module has different shapes in two adapters.
    """
    shares = normalized(weights, len(adapters))
    pairs = [(adapter, task_scale * share) for adapter, share in zip(adapters, shares, strict=True)]
    if task_scale != 1.0:
        if seed is None:
            raise ConfigError(
                f"task_scale {task_scale} needs the seed adapter", "Give the seed, or leave task_scale at 1."
            )
        pairs.insert(0, (seed, 1.0 - task_scale))
    return concatenate(pairs)


def factor_mean(pairs: Iterable[tuple[Adapter, float]]) -> Adapter:
    """The mean of A and the mean of B apart: FedIT (Zhang et al., *Towards Building the Federated GPT*, ICASSP 2024).

    Not the mean of the updates: that differs by the covariance of A and B over the adapters (`factor_gap`). The pairs
    ``(adapter, weight)`` are consumed one at a time into a running sum, so memory does not grow with their number;
    weights are divided by their sum.

    Raises:
        AdapterMismatchError: if modules, shapes, ranks or scalings differ; means of factors need all of them equal.
        ConfigError: if there is no adapter or a weight is negative or all are zero.
    """
    first: Adapter | None = None
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    weights: list[float] = []
    for adapter, weight in pairs:
        first = adapter if first is None else first
        require_same_factors(first, adapter)
        weights.append(weight)
        for name, factors in adapter.items():
            dtype = wide([factors])
            A, B = factors.A.to(dtype) * weight, factors.B.to(dtype) * weight
            sums[name] = (sums[name][0] + A, sums[name][1] + B) if name in sums else (A, B)
    normalized(weights, len(weights))
    total = math.fsum(weights)
    assert first is not None  # normalized() refuses an empty list
    return Adapter({name: LoraFactors(A / total, B / total, first[name].scaling) for name, (A, B) in sums.items()})


@dataclass(frozen=True, slots=True)
class FactorGap:
    """How far the mean of factors is from the mean of updates, relative to the latter (Frobenius): 0 means exact."""

    overall: float
    modules: Mapping[str, float]


def factor_gap(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> FactorGap:
    """``‖mean(s B_i A_i) − s mean(B_i) mean(A_i)‖ / ‖mean(s B_i A_i)‖`` for each module and over all of them.

    Second order in the drift for experts that share a seed (percents or less), near 1 for independent ones.

    Raises:
        AdapterMismatchError: if modules, shapes, ranks or scalings differ.
        ConfigError: if there is no adapter or the weights make no sense.
    """
    precise = [adapter.map(lambda module: module.to(dtype=torch.float64)) for adapter in adapters]
    shares = normalized(weights, len(precise))
    apart = factor_mean(zip(precise, shares, strict=True))
    mean = average(precise, shares)
    gap, size = norms(subtract(mean, apart)), norms(mean)
    return FactorGap(
        _ratio(math.hypot(*gap.values()), math.hypot(*size.values())),
        {name: _ratio(gap[name], size[name]) for name in mean},
    )


def norm(adapter: Adapter) -> float:
    """Frobenius norm of the whole update, over all modules."""
    return math.hypot(*norms(adapter).values())


def norms(adapter: Adapter) -> dict[str, float]:
    """Frobenius norm ``‖s B A‖`` of every module.

    With B = Q_B R_B and Aᵀ = Q_A R_A it is ``|s| ‖R_B R_Aᵀ‖``, in float64. Unlike the trace of Gram matrices this does
    not lose half of the digits where terms cancel, as in the norm of a difference.
    """
    return {name: _norm(factors) for name, factors in adapter.items()}


def inner(left: Adapter, right: Adapter) -> float:
    """Frobenius inner product ``Σ_modules ⟨dW_left, dW_right⟩``, in float64; a module that one lacks adds nothing.

    Raises:
        AdapterMismatchError: if a module has different shapes.
    """
    return math.fsum(_inner(name, left[name], right[name]) for name in left if name in right)


def cosine(left: Adapter, right: Adapter) -> float:
    """Cosine of the angle between two updates, in [-1, 1]; 0 where one of them is zero."""
    return max(-1.0, min(1.0, _ratio(inner(left, right), norm(left) * norm(right))))


def normalized(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights divided by their sum; None is ``1 / count`` each.

    Raises:
        ConfigError: if `count` is 0 or not the number of weights, or if a weight is negative, not finite, or all are 0.
    """
    if count == 0:
        raise ConfigError("there is no adapter to merge", "Give at least one adapter.")
    if weights is None:
        return [1.0 / count] * count
    _checked(weights, count)
    if min(weights) < 0:
        raise ConfigError(f"weight {min(weights)} is negative", "A mean takes weights of 0 or more.")
    try:
        total = math.fsum(weights)
    except OverflowError:
        raise ConfigError("the weights are too large to be added", "Give weights such as 1 and 2.") from None
    if total == 0:
        raise ConfigError("all weights are zero", "Give at least one weight above 0.")
    return [weight / total for weight in weights]


def require_same_shape(name: str, modules: Sequence[LoraFactors]) -> None:
    """Refuse updates of one module that are not of one ``[out, in]``."""
    for factors in modules[1:]:
        if factors.shape != modules[0].shape:
            raise AdapterMismatchError(
                f"module {name}: expected an update of shape {list(modules[0].shape)}, got {list(factors.shape)}",
                "Merge adapters of one base model.",
            )


def require_same_factors(expected: Adapter, got: Adapter) -> None:
    """Refuse adapters whose factors cannot be averaged one by one: other modules, shapes, ranks or scalings."""
    hint = "Use the method 'average', which takes adapters of different ranks, scalings and modules."
    for name in sorted({*expected, *got}):
        if name not in got or name not in expected:
            raise AdapterMismatchError(f"module {name} is missing in one of the adapters", hint)
        require_same_shape(name, [expected[name], got[name]])
        for quantity in ("rank", "scaling"):
            want, have = getattr(expected[name], quantity), getattr(got[name], quantity)
            if not math.isclose(want, have, rel_tol=1e-9):
                raise AdapterMismatchError(f"module {name}: expected {quantity} {want}, got {have}", hint)


def wide(modules: Iterable[LoraFactors]) -> torch.dtype:
    """The dtype to compute in: float64 if a factor has it, else float32."""
    return torch.float64 if any(factors.A.dtype == torch.float64 for factors in modules) else torch.float32


def _checked(weights: Sequence[float], count: int) -> Sequence[float]:
    if len(weights) != count:
        raise ConfigError(f"expected {count} weights, one for each adapter, got {len(weights)}", "Count them again.")
    for weight in weights:
        if not math.isfinite(weight):
            raise ConfigError(f"weight {weight} is not a finite number", "Give weights such as 0.5.")
    return weights


def _norm(factors: LoraFactors) -> float:
    if factors.rank == 0:
        return 0.0
    R_B = torch.linalg.qr(factors.B.double(), mode="r").R
    R_A = torch.linalg.qr(factors.A.double().T, mode="r").R
    return abs(factors.scaling) * float(torch.linalg.matrix_norm(R_B @ R_A.T))


def _inner(name: str, left: LoraFactors, right: LoraFactors) -> float:
    require_same_shape(name, [left, right])
    # ⟨B A, B' A'⟩ = tr(Aᵀ Bᵀ B' A') = Σ (Bᵀ B') ∘ (A A'ᵀ)
    products = (left.B.double().T @ right.B.double()) * (left.A.double() @ right.A.double().T)
    return left.scaling * right.scaling * float(products.sum())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
