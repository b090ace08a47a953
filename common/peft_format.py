"""Adapters as PEFT directories, in and out, with Seedbed's manifest beside them.

    adapter_model.safetensors   base_model.model.<module>.lora_A.weight [r, in], ….lora_B.weight [out, r]
    adapter_config.json         PEFT's configuration, so that PeftModel.from_pretrained loads what Seedbed writes
    seedbed.json                the manifest: hashes of the other two, lineage, and what made it

A directory that another program wrote has no manifest; it is read as kind `external`. The same adapter gives the same
bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seedbed.common.adapter import Adapter
from seedbed.common.adapter_file import AdapterFile
from seedbed.common.adapter_writer import file_order, new_adapter
from seedbed.common.checks import require_base
from seedbed.common.compression import quantized
from seedbed.common.errors import AdapterMismatchError
from seedbed.common.manifest import BaseIdentity, Kind, Manifest
from seedbed.common.peft_config import CAUSAL


def read_adapter(
    directory: Path,
    *,
    expect: Manifest | None = None,
    base: BaseIdentity | None = None,
    max_bytes: int | None = None,
) -> tuple[Adapter, Manifest]:
    """Read a PEFT directory into memory.

    Args:
        directory: see `AdapterFile`.
        expect: the manifest of an adapter that this one must be shaped like: base model, rank and number of modules.
        base: the base model that it must belong to.
        max_bytes: refuse a larger tensor file before reading it.

    Raises:
        AdapterFormatError, StorageError: see `AdapterFile`.
        AdapterMismatchError: if it belongs to another base model, or is not shaped as expected.
        NonFiniteError: if a module holds NaN or infinity.
    """
    file = AdapterFile(directory, max_bytes=max_bytes)
    if base is not None:
        require_base(file.manifest, base, str(directory))
    if expect is not None:
        require_base(file.manifest, expect.base, str(directory))
        for field in ("rank", "modules"):
            want, got = getattr(expect, field), getattr(file.manifest, field)
            if want != got:
                raise AdapterMismatchError(
                    f"{directory}: expected {field} {want}, got {got}", "Is it the right adapter?"
                )
    return Adapter({name: file.factors(name) for name in file.names}), file.manifest


def write_adapter(
    directory: Path,
    adapter: Adapter,
    *,
    kind: Kind,
    base: BaseIdentity,
    parents: tuple[str, ...] = (),
    task: str | None = None,
    recipe: str = "",
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    versions: Mapping[str, str] | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = CAUSAL,
    int8: bool = False,
) -> Manifest:
    """Write a new PEFT directory, aside and then renamed, so that it is whole or not there.

    Args:
        directory: must not exist.
        adapter: at least one module, of ranks 1 or more.
        base_model_name_or_path: what PEFT should load as the base model; the base's name if not given.
        task_type: PEFT's name of what the adapter does.
        int8: in Seedbed's own quantized form instead, which `read_adapter` expands and PEFT does not know.
        kind, base, parents, task, recipe, settings, metrics, versions: as in the manifest; versions are those of the
            installed software if not given.

    Returns:
        The manifest, whose digest names the adapter.

    Raises:
        StorageError: if the directory is already there or the file system refuses.
        AdapterFormatError: if the adapter has no modules or a module has rank 0.
        NonFiniteError: if a module or a metric is NaN or infinite.
    """
    facts: dict[str, Any] = {
        "kind": kind,
        "base": base,
        "parents": parents,
        "task": task,
        "recipe": recipe,
        "settings": settings,
        "metrics": metrics,
        "versions": versions,
        "base_model_name_or_path": base_model_name_or_path,
        "task_type": task_type,
    }
    if int8:
        with new_adapter(directory, sorted(adapter), int8=True) as new:
            new.add_int8(
                {
                    name: (quantized(factors.A, "rows"), quantized(factors.B, "columns"), factors.scaling)
                    for name, factors in adapter.items()
                }
            )
            return new.finish(**facts)
    with new_adapter(directory, file_order({name: module.A.dtype for name, module in adapter.items()}), adapter) as new:
        for name in new.modules:
            new.add(name, adapter[name])
        return new.finish(**facts)


def expand_adapter(source: Path, directory: Path) -> Manifest:
    """Write an adapter that is held in int8 as an ordinary PEFT directory, in float32, so that any program can load it.

    It is another adapter to a store, with a digest of its own: its manifest names the quantized one as its parent.

    Raises:
        AdapterError: see `read_adapter`.
        StorageError: if the directory is already there or the file system refuses.
    """
    file = AdapterFile(source)
    adapter, manifest = read_adapter(source)
    return write_adapter(
        directory,
        adapter,
        kind=manifest.kind,
        base=manifest.base,
        parents=(manifest.digest,),
        task=manifest.task,
        settings={"expanded_from": manifest.digest},
        base_model_name_or_path=str(file.config.get("base_model_name_or_path") or manifest.base.name),
        task_type=file.task_type,
    )
