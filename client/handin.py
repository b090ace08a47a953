"""An adapter that any PEFT trainer wrote, made ready for a federation: looked at here first, and given a manifest.

A trainer leaves `adapter_model.safetensors` and `adapter_config.json`. What else a federation must know is added: the base
model's identity, and from which adapter the training began, where that is known: because the user says so, or because the
directory still holds the `seedbed.json` of the adapter that was fetched into it, whose hashes do not fit any more.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from seedbed.common import basemodel
from seedbed.common.adapter_file import CONFIG, FILES, MANIFEST, TENSORS, AdapterFile, read_manifest
from seedbed.common.checks import require_base
from seedbed.common.errors import AdapterError, AdapterMismatchError, ModelError
from seedbed.common.files import storing, write_file
from seedbed.common.manifest import BaseIdentity, Manifest
from seedbed.common.registry import FederationInfo
from seedbed.common.shapes import Shapes


@dataclass(frozen=True, slots=True)
class Prepared:
    """An adapter that may be handed in.

    Attributes:
        directory: with a manifest; to be read only.
        shapes: ``(out, in)`` of its modules.
    """

    directory: Path
    manifest: Manifest
    shapes: Shapes


def prepare(directory: Path, info: FederationInfo, task: str, aside: Path, *, from_seed: bool = False) -> Prepared:
    """Look at what a trainer wrote, and give it a manifest where it has none of its own.

    Args:
        info: the federation that it is for.
        task: what it was trained on.
        aside: an empty directory on the same file system, if possible; the prepared one is made in it.
        from_seed: the training began from the federation's seed.

    Raises:
        AdapterError: saying what is wrong with which module: not safetensors, not plain LoRA, not finite, another base model.
    """
    own = _own_manifest(directory)
    target = aside / "adapter"
    target.mkdir()
    for name in FILES if own is not None and not own.stale else (TENSORS, CONFIG):
        if not (directory / name).is_file():
            AdapterFile(directory)  # says what is missing, and what to do
        with storing("copy", directory / name):
            shutil.copyfile(directory / name, target / name)
    try:
        return _prepared(target, own, info, task, from_seed=from_seed)
    except AdapterError as error:
        raise type(error)(error.message.replace(str(target), str(directory)), error.hint) from None


def _prepared(target: Path, own: _Own | None, info: FederationInfo, task: str, *, from_seed: bool) -> Prepared:
    file = AdapterFile(target)
    for module in file.names:
        file.factors(module)  # refuses what is not finite
    shapes = {name: file.shape(name) for name in file.names}
    if own is not None and not own.stale:
        require_base(file.manifest, info.identity, str(target))
        return Prepared(target, file.manifest, shapes)
    facts = {"base": _base(file, info), "parents": _parents(own, info, from_seed=from_seed), "task": task}
    manifest = file.manifest.model_copy(update=facts)
    write_file(target / MANIFEST, manifest.canonical())
    return Prepared(target, manifest, shapes)


@dataclass(frozen=True, slots=True)
class _Own:
    """The `seedbed.json` of a directory."""

    manifest: Manifest
    stale: bool
    """It belongs to an adapter that lay there before the training wrote over it."""


def _own_manifest(directory: Path) -> _Own | None:
    if not (directory / MANIFEST).is_file():
        return None
    manifest = read_manifest(directory)
    if not (directory / TENSORS).is_file() or not (directory / CONFIG).is_file():
        return _Own(manifest, stale=False)
    try:
        AdapterFile(directory)
    except AdapterMismatchError:
        return _Own(manifest, stale=True)
    return _Own(manifest, stale=False)


def _parents(own: _Own | None, info: FederationInfo, *, from_seed: bool) -> tuple[str, ...]:
    if not from_seed:
        return (own.manifest.digest,) if own is not None else ()
    if not info.seed:
        raise AdapterMismatchError(f"the federation {info.name} has no seed yet", "Leave --from-seed out.")
    return (info.seed,)


def _base(file: AdapterFile, info: FederationInfo) -> BaseIdentity:
    """The federation's base model, if that is what the adapter was trained on: by hash where the model is at hand."""
    named = Path(file.manifest.base.name).expanduser()
    if file.manifest.base.name and (named / "config.json").is_file():
        try:
            found = basemodel.identify(named, info.identity.name)
        except ModelError:
            pass  # its weights are not here: the name decides
        else:
            require_base(file.manifest.model_copy(update={"base": found}), info.identity, str(file.directory))
            return info.identity
    require_base(file.manifest, info.identity, str(file.directory))
    return info.identity
