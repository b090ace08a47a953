"""Whether an adapter that was trained elsewhere may join a federation: every refusal, module by module, before arithmetic."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from seedbed.common.adapter import Adapter
from seedbed.common.adapter_file import AdapterFile
from seedbed.common.algebra import norms
from seedbed.common.basemodel import resolve
from seedbed.common.checks import require_base, require_usual_dtype
from seedbed.common.config import FederationConfig
from seedbed.common.errors import AdapterMismatchError
from seedbed.common.manifest import Manifest
from seedbed.common.registry import FederationInfo
from seedbed.common.shapes import Shapes, require_shapes
from seedbed.common.storage import read_manifest
from seedbed.common.targets import target_shapes
from seedbed.server.registry.store import ServedStore

_KINDS = ("expert", "external", "joint", "merge")
_HINT = "Train it from the federation's seed, or with the same target modules."


def examine(digest: str, store: ServedStore, info: FederationInfo, shapes: Shapes, norm_bound: float) -> None:
    """Check an adapter of the store, whatever its rank.

    Its base model is compared by digest where both are known, else by name: other trainers write no digest.

    Args:
        shapes: ``(out, in)`` of every module that an adapter of the federation has.
        norm_bound: largest Frobenius norm of one module's update.

    Raises:
        AdapterError: saying which module, what was expected, and what was got.
        StorageError: if it is not in the store.
    """
    directory = store.open(digest)
    try:
        _examine(directory, store, info, shapes, norm_bound)
    except AdapterMismatchError as error:
        raise AdapterMismatchError(error.message.replace(str(directory), "the adapter"), error.hint) from None


def _examine(directory: Path, store: ServedStore, info: FederationInfo, shapes: Shapes, norm_bound: float) -> None:
    manifest = _manifest(directory)
    require_base(manifest, info.identity, "the adapter")
    require_usual_dtype(manifest)
    _require_lineage(manifest, store, info)
    file = AdapterFile(directory, verify_later=True)  # the store has hashed it
    require_shapes({name: file.shape(name) for name in file.names}, shapes)
    for name in file.names:
        (size,) = norms(Adapter({name: file.factors(name)})).values()
        if not size <= norm_bound:
            raise AdapterMismatchError(
                f"module {name}: expected an update of norm {norm_bound:.4g} or less, got {size:.4g}",
                "Lower the learning rate of its training.",
            )


def shapes_of(config: FederationConfig, info: FederationInfo, store: ServedStore) -> Shapes:
    """Modules that an adapter of the federation has: those of its seed, or of the base model where there is no seed yet.

    The base model's are found by a process of its own: its library would double this one's memory.

    Raises:
        ModelError: if the base model is needed and not here.
    """
    if info.seed and store.holds(info.seed):
        file = AdapterFile(store.open(info.seed))
        return {name: file.shape(name) for name in file.names}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(target_shapes, resolve(config.base), config.lora).result()


def _manifest(directory: Path) -> Manifest:
    manifest = read_manifest(directory)
    if manifest.kind not in _KINDS:
        raise AdapterMismatchError(
            f"expected an expert, got an adapter of kind '{manifest.kind}'", "Contribute an adapter trained on a task."
        )
    return manifest


def _require_lineage(manifest: Manifest, store: ServedStore, info: FederationInfo) -> None:
    for parent in manifest.parents:
        if parent != info.seed and not store.holds(parent):
            raise AdapterMismatchError(
                f"the adapter's parent {parent} is not known to this federation, whose seed is {info.seed or 'not made yet'}",
                _HINT,
            )
