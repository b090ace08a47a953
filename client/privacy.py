"""A participant's privacy where it trains: what leaves is clipped and noised, counted, and accompanied by nothing else.

Every release is written into the participant's own ledger before it exists, so that ε over all of them is never too small:

    WORK/privacy.jsonl    {"recipe", "noise_multiplier"}, one release a line
    WORK/privacy.key      32 secret bytes (0600), under which the hash of the data is sealed
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from seedbed.client.spec import TrainSpec
from seedbed.client.training import Trained
from seedbed.common.adapter import Adapter
from seedbed.common.errors import ConfigError, StorageError
from seedbed.common.files import storing, sync_directory, temporary_beside, write_file
from seedbed.common.privacy import PrivacySettings, composed, epsilon_of, privatize

LEDGER, KEY = "privacy.jsonl", "privacy.key"
_PUBLIC_METRICS = ("steps",)
"""What a manifest may say of a private training: loss and counts of tokens are computed from the data."""


def release(spec: TrainSpec, trained: Trained) -> tuple[Trained, bool]:
    """What may leave the participant of a result, and whether its update had to be clipped (for its own eyes).

    Where the participant asks for no privacy the result is as it was.

    Raises:
        ConfigError: if what was trained is not an adapter.
        StorageError: if the ledger cannot be written; then nothing is released.
    """
    settings = spec.privacy
    if settings is None:
        return trained, False
    if not isinstance(trained.value, Adapter) or not isinstance(trained.start, Adapter):
        raise not_an_adapter()
    generator = None if settings.seed is None else torch.Generator().manual_seed(settings.seed)
    private = privatize(
        trained.value,
        trained.start,
        clip=settings.clip,
        noise_multiplier=settings.noise_multiplier,
        generator=generator,
    )
    multipliers = _counted(spec.privacy_ledger, spec.recipe, settings.noise_multiplier)
    metrics = {name: value for name, value in trained.metrics.items() if name in _PUBLIC_METRICS}
    stated = {**trained.settings, "privacy": statement(settings, multipliers)}
    return replace(trained, value=private.adapter, metrics=metrics, settings=stated), private.clipped


def statement(settings: PrivacySettings, multipliers: list[float]) -> dict[str, Any]:
    """What a manifest says under ``settings.privacy``.

    Args:
        multipliers: noise multipliers of all releases so far, with this one.

    Returns:
        clip, noise_multiplier, delta; `epsilon` of this release alone; `releases` and `epsilon_of_all`, over every release
        of this participant; `noise`, either ``system`` or, in tests, ``seeded``.
    """
    return {
        "clip": settings.clip,
        "noise_multiplier": settings.noise_multiplier,
        "delta": settings.delta,
        "epsilon": epsilon_of(composed([settings.noise_multiplier]), settings.delta),
        "releases": len(multipliers),
        "epsilon_of_all": epsilon_of(composed(multipliers), settings.delta),
        "neighbours": "any two data sets of the participant",
        "noise": "system" if settings.seed is None else "seeded",
    }


def not_an_adapter() -> ConfigError:
    return ConfigError(
        "this participant's privacy covers adapters, not routers, gates or experts that are trained with a router",
        "Take the routers that are trained out of combine.candidates, or let others train them.",
    )


def sealed(data: str, work: Path) -> str:
    """The hash of the data as a manifest may hold it: only this participant can compute it again. A bare hash would let
    anybody confirm a guess of the whole data set.

    Raises:
        StorageError: if the key cannot be read or written.
    """
    path = work / KEY
    if not path.is_file():
        _make_key(path)
    with storing("read", path):
        secret = path.read_bytes()
    return hmac.new(secret, data.encode(), hashlib.sha256).hexdigest()


def _make_key(path: Path) -> None:
    with storing("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = temporary_beside(path)
        try:
            write_file(aside, os.urandom(32), private=True)
            with suppress(FileExistsError):  # unlike a rename it fails where another process was first
                os.link(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        sync_directory(path.parent)


def _counted(ledger: Path | None, recipe: str, multiplier: float) -> list[float]:
    """Enter a release, and return the multipliers of all, with it."""
    if ledger is None:
        return [multiplier]
    line = json.dumps({"recipe": recipe, "noise_multiplier": multiplier}).encode() + b"\n"
    with storing("write", ledger):
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with ledger.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another job of this participant may release something, too
            file.seek(0)
            known = file.read()
            end = known.rfind(b"\n") + 1
            file.truncate(end)  # what a crash or a full disk has torn was never released
            lines = [*known[:end].splitlines(), line]
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file)
            except OSError:
                file.truncate(end)
                raise
    try:
        return [float(json.loads(line)["noise_multiplier"]) for line in lines if line.strip()]
    except (ValueError, KeyError, TypeError):
        raise StorageError(
            f"{ledger} is damaged, so what was released before is not known", "Restore it from a backup."
        ) from None
