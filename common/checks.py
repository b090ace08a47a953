"""The refusals: whether an adapter may be used at all, checked before any arithmetic with it.

Every refusal names the module, what was expected, and what was got.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.algebra import norms
from seedbed.common.errors import AdapterMismatchError, NonFiniteError
from seedbed.common.manifest import BaseIdentity, Manifest


def check_update(
    adapter: Adapter,
    manifest: Manifest,
    *,
    base: BaseIdentity,
    reference: Adapter | Manifest | None = None,
    norm_bound: float = math.inf,
    parent: str | None = None,
) -> None:
    """Whether a participant's update fits the federation: base model, lineage, keys, shapes, ranks, dtype, values,
    norms.

    Args:
        adapter: the update, as read.
        manifest: its manifest, as read with it.
        base: the federation's base model.
        reference: the seed adapter, which the update must be shaped like module by module; or its manifest, with which
            only rank, number of modules and dtype can be compared.
        norm_bound: largest Frobenius norm of one module's update.
        parent: digest of the adapter that it must have been trained from.

    Raises:
        AdapterMismatchError: if it does not fit, or a norm is above the bound.
        NonFiniteError: if it holds NaN or infinity.
    """
    require_base(manifest, base, "the update")
    if parent is not None and parent not in manifest.parents:
        raise AdapterMismatchError(
            f"the update's parents: expected {parent}, got {', '.join(manifest.parents) or 'none'}"
        )
    if isinstance(reference, Manifest):
        for field in ("rank", "modules", "dtype"):
            _same("the update", field, getattr(reference, field), getattr(manifest, field))
    elif reference is not None:
        _require_shaped_like(reference, adapter)
    for name, factors in adapter.items():
        require_finite(name, factors)
    for name, size in norms(adapter).items():
        if not size <= norm_bound:
            raise AdapterMismatchError(
                f"module {name}: expected an update of norm {norm_bound:.4g} or less, got {size:.4g}",
                "Lower the learning rate, or raise run.norm_bound if this is right.",
            )


def _require_shaped_like(reference: Adapter, adapter: Adapter) -> None:
    missing, surplus = sorted(set(reference) - set(adapter)), sorted(set(adapter) - set(reference))
    if missing or surplus:
        what = f"misses module {missing[0]}" if missing else f"has the unexpected module {surplus[0]}"
        raise AdapterMismatchError(f"the update {what}: expected {len(reference)} modules, got {len(adapter)}")
    for name, factors in adapter.items():
        _same(f"module {name}", "shape", list(reference[name].shape), list(factors.shape))
        _same(f"module {name}", "rank", reference[name].rank, factors.rank)
        _same(f"module {name}", "dtype", reference[name].A.dtype, factors.A.dtype)


def _same(subject: str, what: str, expected: object, got: object) -> None:
    if expected != got:
        raise AdapterMismatchError(
            f"{subject}: expected {what} {expected}, got {got}", "Train it from the federation's seed."
        )


def require_base(manifest: Manifest, base: BaseIdentity, source: str) -> None:
    """Refuse an adapter of another base model: by digest where both are known, else by name.

    A name that is a path counts by its last part, and an empty name fits anything: programs write what they like there.

    Raises:
        AdapterMismatchError: showing both.
    """
    got = manifest.base
    if got.digest and base.digest:
        same = got.digest == base.digest
    else:
        names = [identity.name.rstrip("/").rsplit("/", 1)[-1].lower() for identity in (got, base)]
        same = names[0] == names[1] or not all(names)
    if not same:
        raise AdapterMismatchError(
            f"{source} belongs to another base model: expected {_shown(base)}, got {_shown(got)}",
            "Use adapters of one base model; if only the name differs, correct it in adapter_config.json.",
        )


def require_usual_dtype(manifest: Manifest) -> None:
    """Refuse factors in float64: a merge is as wide as its widest input, and one contribution would widen all.

    Raises:
        AdapterMismatchError: if they are.
    """
    if "float64" in manifest.dtype.split(","):
        raise AdapterMismatchError(
            "the adapter: expected float32 or less, got float64", "Save it once more, after model.float()."
        )


def require_finite(module: str, factors: LoraFactors) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: naming the module and the factor.
    """
    for name, tensor in (("lora_A", factors.A), ("lora_B", factors.B)):
        if not is_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                f"module {module}: {name} holds {count} values that are NaN or infinite, expected 0",
                "The training that made it diverged: lower its learning rate.",
            )
    if not math.isfinite(factors.scaling):
        raise NonFiniteError(f"module {module}: scaling is {factors.scaling}", "Check alpha and rank.")


def require_finite_metrics(metrics: Mapping[str, float]) -> None:
    """Refuse NaN and infinity among metrics, which JSON cannot hold.

    Raises:
        NonFiniteError: naming the metric.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"metric {name} is {value}, expected a finite number")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity, at the speed of memory: its extremes are not finite if it is not."""
    return tensor.numel() == 0 or all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


def _shown(base: BaseIdentity) -> str:
    return f"{base.name or 'unnamed'} ({base.digest[:12]})" if base.digest else f"{base.name or 'unnamed'}"
