"""Mixtures as users get them: a router directory with its experts inside, each an ordinary PEFT directory.

router.safetensors, router_config.json, seedbed.json
experts/0-<name>/adapter_model.safetensors, adapter_config.json, seedbed.json
experts/1-<name>/…

model = AutoModelForCausalLM.from_pretrained(…)
slot = load_mixture(model, Path("mixture"))     # model.generate(…), SeedbedLM(model, tokenizer), … as ever
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from seedbed.common.adapter_file import FILES, AdapterFile
from seedbed.common.errors import AdapterFormatError, AdapterMismatchError, ConfigError
from seedbed.common.files import new_directory, storing
from seedbed.common.manifest import BaseIdentity, Manifest
from seedbed.common.peft_format import read_adapter
from seedbed.common.routing.mixture import Mixture
from seedbed.common.routing.router_file import ROUTER_FILES, read_router
from seedbed.common.routing.slot import MixtureSlot

EXPERTS = "experts"
_PLACE = re.compile(r"^(\d+)-")


def write_mixture(directory: Path, experts: Sequence[Path], router: Path) -> Manifest:
    """Put a router and copies of its experts into a new directory, whole or not there.

    Args:
        directory: must not exist.
        experts: PEFT directories, in the router's order.
        router: a router directory.

    Returns:
        the router's manifest.

    Raises:
        AdapterMismatchError: if an expert is not the one that the router was made for.
        AdapterError: if a directory is malformed.
        StorageError: if `directory` is already there or the file system refuses.
    """
    _, names, manifest = read_router(router)
    _require_experts([AdapterFile(path).manifest for path in experts], names, manifest)
    with new_directory(directory) as aside:
        for name in ROUTER_FILES:
            _copy(router / name, aside / name)
        for path, place in zip(experts, expert_places(names), strict=True):
            target = aside / place
            with storing("write", directory):
                target.mkdir(parents=True)
            for file in FILES:
                if (path / file).is_file():
                    _copy(path / file, target / file)
    return manifest


def expert_places(names: Sequence[str]) -> list[str]:
    """Where each expert lies in a mixture directory."""
    return [f"{EXPERTS}/{index}-{_plain(name)}" for index, name in enumerate(names)]


def read_mixture(
    directory: Path, *, base: BaseIdentity | None = None, max_bytes: int | None = None
) -> tuple[Mixture, Manifest]:
    """Read a mixture directory into memory.

    Args:
        base: the base model that it must belong to.
        max_bytes: refuse a larger tensor file before reading it.

    Raises:
        AdapterFormatError: if a file or a tensor is missing or malformed, or router and experts do not fit.
        AdapterMismatchError: if files or experts are not those that the manifest vouches for, or of another base model.
        NonFiniteError: if a tensor holds NaN or infinity.
        StorageError: if a file cannot be read.
    """
    router, names, manifest = read_router(directory, base=base, max_bytes=max_bytes)
    found = [read_adapter(path, base=base, max_bytes=max_bytes) for path in _expert_directories(directory)]
    _require_experts([own for _, own in found], names, manifest)
    try:
        return Mixture(names, tuple(adapter for adapter, _ in found), router), manifest
    except ConfigError as error:
        raise AdapterFormatError(f"{directory}: {error.message}", "Make the mixture again.") from None


def load_mixture(
    model: nn.Module, directory: Path, *, base: BaseIdentity | None = None, dtype: torch.dtype | None = None
) -> MixtureSlot:
    """Put a mixture onto any transformers model: it then generates and scores as the mixture.

    To train on, take it off again and begin with its router: ``RoutedModel.learned(model, slot.mixture.experts,
    slot.mixture.router.settings, start=slot.mixture.router)``.

    Returns:
        the slot that holds it: ``put(None)`` takes it off, ``record()`` and ``diagnostics()`` show what the router does.

    Raises:
        AdapterError: if the directory is malformed or does not fit the model.
        StorageError: if a file cannot be read.
    """
    mixture, _ = read_mixture(directory, base=base)
    slot = MixtureSlot(model, dtype=dtype)
    slot.put(mixture)
    return slot


def _expert_directories(directory: Path) -> list[Path]:
    root = directory / EXPERTS
    if not root.is_dir():
        raise AdapterFormatError(f"{directory} has no directory '{EXPERTS}'", "Is it a router without its experts?")
    with storing("read", root):
        places = {path: _PLACE.match(path.name) for path in root.iterdir() if path.is_dir()}
    return sorted((path for path, place in places.items() if place), key=lambda path: int(path.name.partition("-")[0]))


def _require_experts(manifests: Sequence[Manifest], names: Sequence[str], router: Manifest) -> None:
    if len(manifests) != len(names):
        raise AdapterMismatchError(
            f"the router routes {len(names)} experts ({', '.join(names)}), got {len(manifests)}",
            "Give the experts of the router, in its order.",
        )
    for name, expected, own in zip(names, router.parents, manifests, strict=True):
        if own.digest != expected:
            raise AdapterMismatchError(
                f"expert '{name}' of the router: expected {expected[:12]}…, got {own.digest[:12]}…",
                "Give the experts of the router, in its order.",
            )


def _plain(name: str) -> str:
    """A name that is safe as a part of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:64] or "expert"


def _copy(source: Path, target: Path) -> None:
    with storing("write", target):
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
