"""Routers on disk: three files, with Seedbed's manifest among them.

    router.safetensors    <module>.<tensor>, as `settings.TENSORS` lists them for the kind; empty for uniform and oracle
    router_config.json    settings, and the names of the experts in their order
    seedbed.json          the manifest: hashes of the other two; its parents are the digests of the experts, in order

The experts themselves are not repeated: a store holds each of them once. A *gate* (what PHATGOOSE trains for one expert) is
the same with one expert. The same router gives the same bytes. Never pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from seedbed.common.adapter_file import MANIFEST, dtype_name, read_manifest
from seedbed.common.checks import require_base, require_finite_metrics
from seedbed.common.errors import AdapterFormatError, AdapterMismatchError, ConfigError, NonFiniteError
from seedbed.common.files import new_directory, storing, write_file
from seedbed.common.manifest import BaseIdentity, Manifest, Record
from seedbed.common.routing.mixture import Router
from seedbed.common.routing.settings import RouterSettings
from seedbed.common.tensor_file import TensorFile
from seedbed.common.versions import software_versions

ROUTER_TENSORS, ROUTER_CONFIG = "router.safetensors", "router_config.json"
ROUTER_FILES = (ROUTER_TENSORS, ROUTER_CONFIG, MANIFEST)
RouterRole = Literal["router", "gate"]
_JSON_LIMIT = 1_000_000
_AGAIN = "Fetch it or make it again."


class RouterConfig(Record):
    """The contents of ``router_config.json``."""

    format: Literal[1] = 1
    settings: RouterSettings
    names: tuple[str, ...]


def write_router(
    directory: Path,
    router: Router,
    *,
    kind: RouterRole,
    base: BaseIdentity,
    names: Sequence[str],
    parents: Sequence[str],
    task: str | None = None,
    recipe: str = "",
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Manifest:
    """Write a new router directory, aside and then renamed, so that it is whole or not there.

    Args:
        directory: must not exist.
        names: of the experts, in order.
        parents: digests of the experts, in the same order.
        kind, base, task, recipe, settings, metrics, versions: as in the manifest, whose `rank` is the number of experts and
            whose `modules` are those that the router has tensors for.

    Raises:
        StorageError: if the directory is already there or the file system refuses.
        ConfigError: if the router is not one of as many experts as there are names, or there are not as many parents.
        NonFiniteError: if a tensor or a metric is NaN or infinite.
    """
    _require_writable(router, names, parents, metrics or {})
    tensors = _tensor_bytes(router)
    configuration = _json_bytes(RouterConfig(settings=router.settings, names=tuple(names)))
    manifest = Manifest(
        kind=kind,
        base=base,
        tensors_sha256=hashlib.sha256(tensors).hexdigest(),
        config_sha256=hashlib.sha256(configuration).hexdigest(),
        rank=len(names),
        modules=len(router.tensors),
        dtype=_dtype(router),
        parents=tuple(parents),
        task=task,
        recipe=recipe,
        settings=dict(settings or {}),
        metrics=dict(metrics or {}),
        versions=dict(software_versions() if versions is None else versions),
    )
    with new_directory(directory) as aside:
        for name, data in ((ROUTER_TENSORS, tensors), (ROUTER_CONFIG, configuration), (MANIFEST, manifest.canonical())):
            write_file(aside / name, data)
    return manifest


def read_router(
    directory: Path, *, base: BaseIdentity | None = None, max_bytes: int | None = None
) -> tuple[Router, tuple[str, ...], Manifest]:
    """Read a router directory, or the router of a mixture directory, into memory.

    Args:
        base: the base model that it must belong to.
        max_bytes: refuse a larger tensor file before reading it.

    Returns:
        the router, the names of its experts, and the manifest.

    Raises:
        AdapterFormatError: if a file or a tensor is missing or malformed.
        AdapterMismatchError: if the files are not those that the manifest vouches for, or of another base model.
        NonFiniteError: if a tensor holds NaN or infinity.
        StorageError: if a file cannot be read.
    """
    for name in ROUTER_FILES:
        if not (directory / name).is_file():
            raise AdapterFormatError(f"{directory} has no {name}", f"A router has {', '.join(ROUTER_FILES)}.")
    manifest = read_manifest(directory)
    if manifest.kind not in ("router", "gate"):
        raise AdapterFormatError(f"{directory} is no router but a '{manifest.kind}'", "Give a router directory.")
    if base is not None:
        require_base(manifest, base, str(directory))
    file = TensorFile(directory / ROUTER_TENSORS, max_bytes=max_bytes)
    for field, name in (("tensors_sha256", ROUTER_TENSORS), ("config_sha256", ROUTER_CONFIG)):
        _same(directory, field, getattr(manifest, field), _sha256(directory / name))
    config = _read_config(directory / ROUTER_CONFIG)
    router = Router(config.settings, _tensors(file))
    _same(directory, "rank", manifest.rank, len(config.names))
    _same(directory, "modules", manifest.modules, len(router.tensors))
    _same(directory, "dtype", manifest.dtype, _dtype(router))
    try:
        router.require_count(len(config.names))
    except ConfigError as error:
        raise AdapterFormatError(f"{directory}: {error.message}", _AGAIN) from None
    return router, config.names, manifest


def _require_writable(
    router: Router, names: Sequence[str], parents: Sequence[str], metrics: Mapping[str, float]
) -> None:
    router.require_count(len(names))
    if len(parents) != len(names):
        raise ConfigError(f"expected the digests of {len(names)} experts as the router's parents, got {len(parents)}")
    _require_finite(router)
    require_finite_metrics(metrics)


def _require_finite(router: Router) -> None:
    for name, module in router.tensors.items():
        for key, tensor in module.items():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"module {name}: the router's {key} holds NaN or infinity",
                    "Lower the learning rate of its training.",
                )


def _tensor_bytes(router: Router) -> bytes:
    from safetensors.torch import save

    tensors = {
        f"{name}.{key}": tensor.detach().to("cpu", copy=True).contiguous()
        for name, module in router.tensors.items()
        for key, tensor in module.items()
    }
    return bytes(save(tensors, metadata={"format": "pt"}))


def _tensors(file: TensorFile) -> dict[str, dict[str, torch.Tensor]]:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key in file.names:
        module, _, name = key.rpartition(".")
        # Cloned, so that nothing depends on the file any more.
        modules.setdefault(module, {})[name] = file.tensor(key).clone()
    _require_finite(Router(RouterSettings(), modules))
    return modules


def _dtype(router: Router) -> str:
    return dtype_name(tensor.dtype for module in router.tensors.values() for tensor in module.values()) or "float32"


def _json_bytes(config: RouterConfig) -> bytes:
    return (json.dumps(config.model_dump(mode="json"), sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def _read_config(path: Path) -> RouterConfig:
    with storing("read", path), path.open("rb") as file:
        text = file.read(_JSON_LIMIT + 1)
    try:
        if len(text) > _JSON_LIMIT:
            raise ConfigError(f"it is larger than {_JSON_LIMIT:,} bytes")
        return RouterConfig.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(str(part) for part in first['loc'])} {first['msg']}"
    except ConfigError as error:
        reason = error.message
    raise AdapterFormatError(f"{path} is not a router's configuration: {reason}", _AGAIN)


def _same(directory: Path, field: str, expected: object, got: object) -> None:
    if expected != got:
        raise AdapterMismatchError(
            f"{directory}: expected {field} {expected} from {MANIFEST}, got {got}",
            "The files were changed after they were written; fetch or make the router again.",
        )


def _sha256(path: Path) -> str:
    with storing("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
