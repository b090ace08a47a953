"""`seedbed merge`: PEFT directories in, one PEFT directory out, one module at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from seedbed.common.adapter import LoraFactors
from seedbed.common.adapter_file import dtype_name
from seedbed.common.adapter_writer import AdapterWriter, new_adapter
from seedbed.common.errors import NonFiniteError, StorageError
from seedbed.common.manifest import Kind, Manifest, recipe_hash
from seedbed.server.adapters.layout import Blocks, blocks_of, encode_ranks
from seedbed.server.adapters.plan import MergePlan, plan_merge
from seedbed.server.adapters.stream import write_average

Progress = Callable[[str, int], None]
"""Told the name of each module that is done, and how many there are."""


def merge_directories(
    inputs: Sequence[Path],
    method: str,
    out: Path,
    *,
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    seed: Path | None = None,
    dtype: str | None = None,
    kind: Kind = "merge",
) -> Manifest:
    """Merge adapters of one base model.

    Args:
        inputs: PEFT directories, by Seedbed or by other programs.
        method: a name in the table of methods.
        out: the directory to make.
        rank: short for the option `rank`, of methods that have it.
        weights: one for each input, not negative; divided by their sum. None weighs all the same.
        options: of the method, by name.
        seed: the adapter that all inputs started from, where options refer to it.
        dtype: `float32`, `bfloat16` or `float16`; None or `auto` is that of the inputs.
        kind: what the result is called in its manifest.

    Returns:
        The manifest of the result; its parents are the digests of the inputs, and of the seed last where it was used.

    Raises:
        ConfigError: if method, rank, options, weights or dtype make no sense.
        AdapterError: if an input is malformed or does not fit the others.
        StorageError: if `out` is already there or the file system refuses.
    """
    require_absent(out)
    plan = plan_merge(inputs, method, rank=rank, weights=weights, options=options, seed=seed, dtype=dtype)
    return write_merged(plan, out, kind=kind)


def write_merged(plan: MergePlan, out: Path, *, kind: Kind = "merge", progress: Progress | None = None) -> Manifest:
    """Carry a plan out; the result appears when every hash has been verified."""
    names, blocks = plan.names, _blocks(plan)
    with new_adapter(out, names, _expected(plan, blocks)) as new:
        if blocks is not None:
            write_average(new, plan, blocks, progress)
        else:
            for name, merged in plan.modules(names):
                _add(new, name, merged)
                if progress is not None:
                    progress(name, len(names))
        parents = plan.digests()
        settings = plan.settings() | ({"ranks": encode_ranks(blocks)} if blocks else {})
        return finish_merge(new, plan, parents, settings, kind)


def _add(new: AdapterWriter, name: str, merged: LoraFactors) -> None:
    """Inputs were looked at as they were read: what is not finite now is the merge's doing."""
    try:
        new.add(name, merged)
    except NonFiniteError:
        raise NonFiniteError(
            f"module {name}: the result is beyond the numbers of {dtype_name([merged.A.dtype])}",
            "Write it in a wider dtype (--dtype float32), or use smaller weights or options.",
        ) from None


def finish_merge(
    new: AdapterWriter, plan: MergePlan, parents: tuple[str, ...], settings: Mapping[str, Any], kind: Kind
) -> Manifest:
    """Write the manifest of a merge, whose recipe is its settings and parents."""
    return new.finish(
        kind=kind,
        base=plan.base,
        parents=parents,
        recipe=recipe_hash({"merge": settings, "parents": list(parents)}),
        settings=settings,
        base_model_name_or_path=plan.base_path(),
        task_type=plan.task_type(),
    )


def require_absent(out: Path) -> None:
    """Refuse an output that is there, before anything is computed.

    Raises:
        StorageError: naming it.
    """
    if os.path.lexists(out):
        raise StorageError(f"{out} is already there", "Choose another output, or remove it first.")


def _blocks(plan: MergePlan) -> Blocks | None:
    """Where each expert lies in the result, if that is an exact average without a seed's part."""
    return blocks_of(plan.files, plan.weights) if plan.method.name == "average" and plan.seed is None else None


def _expected(plan: MergePlan, blocks: Blocks | None) -> Mapping[str, LoraFactors] | None:
    """Shapes of the result, where they are known before it is."""
    return {name: shape_only(plan, name, sum(ranks)) for name, ranks in blocks.items()} if blocks else None


def shape_only(plan: MergePlan, name: str, rank: int) -> LoraFactors:
    """Factors without numbers, of a module's shape and the result's dtype."""
    rows, columns = plan.holders(name)[0].shape(name)
    dtype = plan.dtype_of(name)
    A = torch.empty(rank, columns, dtype=dtype, device="meta")
    return LoraFactors(A, torch.empty(rows, rank, dtype=dtype, device="meta"), 1.0)
