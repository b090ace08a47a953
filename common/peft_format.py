"""Adapters as PEFT directories, in and out, with Seedbed's manifest beside them.

    adapter_model.safetensors   base_model.model.<module>.lora_A.weight [r, in], ….lora_B.weight [out, r]
    adapter_config.json         PEFT's configuration, so that PeftModel.from_pretrained loads what Seedbed writes
    seedbed.json                the manifest: hashes of the other two, lineage, and what made it

A directory that another program wrote has no manifest; it is read as kind `external`. The same adapter gives the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.adapter_file import CONFIG, MANIFEST, PREFIX, TENSORS, AdapterFile, dtype_name
from seedbed.common.checks import require_base, require_finite
from seedbed.common.errors import AdapterFormatError, AdapterMismatchError, NonFiniteError
from seedbed.common.files import new_directory, write_file
from seedbed.common.manifest import BaseIdentity, Kind, Manifest
from seedbed.common.peft_config import make_peft_config
from seedbed.common.versions import software_versions


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
    # Cloned, so that nothing depends on the file any more.
    modules = {name: file.factors(name) for name in file.names}
    return Adapter(
        {name: LoraFactors(m.A.clone(), m.B.clone(), m.scaling) for name, m in modules.items()}
    ), file.manifest


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
) -> Manifest:
    """Write a new PEFT directory, aside and then renamed, so that it is whole or not there.

    Args:
        directory: must not exist.
        adapter: at least one module, of ranks 1 or more.
        base_model_name_or_path: what PEFT should load as the base model; the base's name if not given.
        kind, base, parents, task, recipe, settings, metrics, versions: as in the manifest; versions are those of the
            installed software if not given.

    Returns:
        The manifest, whose digest names the adapter.

    Raises:
        StorageError: if the directory is already there or the file system refuses.
        AdapterFormatError: if the adapter has no modules or a module has rank 0.
        NonFiniteError: if a module or a metric is NaN or infinite.
    """
    _require_writable(adapter, metrics or {})
    config = make_peft_config(adapter, base.name if base_model_name_or_path is None else base_model_name_or_path)
    tensors, configuration = _tensor_bytes(adapter), _json_bytes(config)
    manifest = Manifest(
        kind=kind,
        base=base,
        tensors_sha256=hashlib.sha256(tensors).hexdigest(),
        config_sha256=hashlib.sha256(configuration).hexdigest(),
        rank=max(factors.rank for factors in adapter.values()),
        modules=len(adapter),
        dtype=dtype_name(factors.A.dtype for factors in adapter.values()),
        parents=tuple(parents),
        task=task,
        recipe=recipe,
        settings=dict(settings or {}),
        metrics=dict(metrics or {}),
        versions=dict(software_versions() if versions is None else versions),
    )
    with new_directory(directory) as aside:
        for name, data in ((TENSORS, tensors), (CONFIG, configuration), (MANIFEST, manifest.canonical())):
            write_file(aside / name, data)
    return manifest


def _require_writable(adapter: Adapter, metrics: Mapping[str, float]) -> None:
    if not adapter:
        raise AdapterFormatError("the adapter has no modules, there is nothing to write")
    for name, factors in adapter.items():
        if factors.rank == 0:
            raise AdapterFormatError(f"module {name} has rank 0, expected 1 or more")
        require_finite(name, factors)
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"metric {name} is {value}, expected a finite number")


def _tensor_bytes(adapter: Adapter) -> bytes:
    from safetensors.torch import save

    tensors = {}
    for name, factors in adapter.items():
        for letter, tensor in (("A", factors.A), ("B", factors.B)):
            # A copy of its own: safetensors refuses tensors that share memory, as factors of two modules may.
            copy = tensor.detach().to("cpu", copy=True).contiguous()
            tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = copy
    return bytes(save(tensors, metadata={"format": "pt"}))


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, sort_keys=False, indent=2, ensure_ascii=False) + "\n").encode()
