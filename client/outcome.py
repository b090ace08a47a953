"""What a training job leaves on disk, by what it trained.

A LoRA leaves a PEFT directory, a router or gate a router directory. Experts that were trained together with their router
leave a directory of directories: the experts, and last the router, whose parents they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seedbed.client.spec import TrainSpec
from seedbed.client.training import Trained
from seedbed.common import basemodel
from seedbed.common.adapter import Adapter
from seedbed.common.compression import compress, transfer_error, transfer_of
from seedbed.common.manifest import Kind, Manifest, recipe_hash
from seedbed.common.routing import Mixture, Router
from seedbed.common.routing.router_file import write_router
from seedbed.common.storage import AdapterStore, read_manifest, write_adapter

_KINDS: Mapping[str, Kind] = {
    "seed": "seed",
    "expert": "expert",
    "joint": "joint",
    "gate": "gate",
    "router": "router",
    "molora": "router",
}
"""Of a manifest, by the kind of the job."""
_ROUTER = "router"


def write_result(spec: TrainSpec, trained: Trained) -> str:
    """Write the result of a job into `spec.output`.

    Returns:
        the digest of what was trained (of the router, where experts were trained with it).

    Raises:
        StorageError: if the output is already there or the file system refuses.
    """
    value = trained.value
    spec = spec.model_copy(update={"settings": {**spec.settings, **trained.settings}})
    if isinstance(value, Mixture):
        spec.output.mkdir(parents=True)
        experts = tuple(
            _write_expert(spec, index, name, adapter)
            for index, (name, adapter) in enumerate(zip(value.names, value.experts, strict=True))
        )
        return _write(spec, spec.output / _ROUTER, value.router, experts, trained.metrics)
    return _write(spec, spec.output, value, spec.parents, trained.metrics)


def manifest_of(output: Path) -> Manifest:
    """The manifest of what was trained, after `write_result`."""
    router = output / _ROUTER
    return read_manifest(router if router.is_dir() else output)


def put_result(output: Path, store: AdapterStore) -> str:
    """Put what `write_result` wrote into a store; returns the digest of what was trained."""
    if not (output / _ROUTER).is_dir():
        return store.put(output)
    for directory in sorted(output.iterdir()):
        if directory.name != _ROUTER:
            store.put(directory)
    return store.put(output / _ROUTER)


def _write_expert(spec: TrainSpec, index: int, name: str, adapter: Adapter) -> str:
    recipe = recipe_hash({"of": spec.recipe, "expert": index}) if spec.recipe else ""
    return _write_adapter(
        spec, spec.output / f"expert-{index:03}", adapter, {}, kind="expert", task=name, recipe=recipe, **_common(spec)
    )


def _write(
    spec: TrainSpec, directory: Path, value: Adapter | Router, parents: tuple[str, ...], metrics: Mapping[str, float]
) -> str:
    common = {**_common(spec), "kind": _KINDS[spec.kind], "parents": parents, "recipe": spec.recipe}
    if isinstance(value, Router):
        return write_router(directory, value, names=spec.names, metrics=metrics, **common).digest
    return _write_adapter(spec, directory, value, metrics, task=spec.task, **common)


def _write_adapter(
    spec: TrainSpec, directory: Path, adapter: Adapter, metrics: Mapping[str, float], **facts: Any
) -> str:
    """Write an adapter as the job wants it handed in, with what that changed; a router is small and stays as it is."""
    transfer = transfer_of(spec.kind, spec.training.transfer)
    if transfer == "float32":
        return write_adapter(directory, adapter, metrics=metrics, **facts).digest
    received = compress(adapter, transfer)
    error = transfer_error(adapter, received)
    lost = {"transfer_error": error.total, "transfer_error_worst_module": error.worst}
    # Integers are made as they are written, of the exact numbers: not of those that were rounded already.
    given = adapter if transfer == "int8" else received
    return write_adapter(directory, given, metrics={**metrics, **lost}, int8=transfer == "int8", **facts).digest


def _common(spec: TrainSpec) -> dict[str, Any]:
    base = spec.identity or basemodel.identify(basemodel.resolve(spec.base), spec.base.model)
    return {"base": base, "settings": spec.settings}
