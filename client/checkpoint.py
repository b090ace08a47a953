"""Checkpoints of a training that is going on: what it goes on from when it was killed in the middle.

    DIRECTORY/state.safetensors     parameters, AdamW's moments and random states as tensors; in the header, under
                                    `seedbed`, a JSON record: fingerprint of the job, progress, SHA-256 of the tensors

One file, written aside and renamed, so that there is always a whole one or none. A checkpoint is believed only if its
fingerprint is that of the job that asks (same recipe, same tokens in the same order, same engine and number of ranks) and its
tensors have their hash; any other is passed over with a note, and the training starts from the beginning.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from seedbed.common.errors import StorageError
from seedbed.common.files import TEMPORARY, storing, sync_directory, temporary_beside
from seedbed.common.manifest import Record

FILE = "state.safetensors"
_RECORD = "seedbed"
_SHARE = 0.02
"""Of the training's time that checkpoints may take, unless one is asked for after every step."""

Note = Callable[[str], None]


class Progress(Record):
    """How far a training has come, as a value: every step makes a new one."""

    step: int = 0
    """Optimizer steps that are done; the position in the data follows from it."""
    pending: tuple[tuple[dict[str, float], int], ...] = ()
    """Terms of the objective, and labels, of each step since the last report."""
    means: dict[str, float] = {}
    """The last report's."""
    first_loss: float = 0.0
    tokens: int = 0
    """That the model has read."""
    labels: int = 0
    seconds: float = 0.0
    """Spent so far, over all tries."""

    def after(self, terms: Mapping[str, float], labels: int, tokens: int) -> Progress:
        """After one more step."""
        return self.model_copy(
            update={
                "step": self.step + 1,
                "pending": (*self.pending, (dict(terms), labels)),
                "first_loss": self.first_loss if self.step else terms["loss"],
                "tokens": self.tokens + tokens,
                "labels": self.labels + labels,
            }
        )

    def reported(self) -> Progress:
        """With the means over the pending steps, weighted by their labels; then nothing is pending."""
        labels = sum(count for _, count in self.pending)
        # Of a plain objective the loss says everything.
        first = self.pending[0][0]
        names = [name for name in first if name == "loss" or len(first) > 2]
        means = {name: sum(terms[name] * count for terms, count in self.pending) / labels for name in names}
        return self.model_copy(update={"pending": (), "means": means})


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training after some of its steps: `Engine.state` and what has been counted."""

    progress: Progress
    tensors: Mapping[str, Tensor]


class _Header(Record):
    format: int = 1
    fingerprint: str
    progress: Progress
    sha256: str


def write_checkpoint(directory: Path, fingerprint: str, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint in `directory`, all or nothing.

    Raises:
        StorageError: if the file system refuses; then the one before is still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = _Header(fingerprint=fingerprint, progress=checkpoint.progress, sha256=_sha256(checkpoint.tensors))
    target = directory / FILE
    with storing("write", target):
        directory.mkdir(parents=True, exist_ok=True)
        aside = temporary_beside(target)
        try:
            save_file(dict(checkpoint.tensors), aside, {_RECORD: header.model_dump_json()})
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, target)
        except SafetensorError as error:  # its name for what the file system says
            raise StorageError(f"cannot write {target}: {error}", "Check the disk's free space.") from None
        finally:
            aside.unlink(missing_ok=True)
        sync_directory(directory)


def read_checkpoint(directory: Path, fingerprint: str, note: Note) -> Checkpoint | None:
    """The checkpoint in `directory`, if there is one of this very job.

    Args:
        note: told in one sentence why one that is there is not used.
    """
    from safetensors import SafetensorError, safe_open

    path = directory / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = _Header.model_validate_json((file.metadata() or {})[_RECORD])
            if header.fingerprint != fingerprint:
                note(f"the checkpoint {path} belongs to another job, data or number of ranks: training starts anew")
                return None
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, ValidationError, KeyError, OSError) as error:
        note(f"the checkpoint {path} is damaged ({type(error).__name__}): training starts anew")
        return None
    if _sha256(tensors) != header.sha256:
        note(f"the checkpoint {path} is damaged (its tensors do not have their hash): training starts anew")
        return None
    return Checkpoint(header.progress, tensors)


def remove_checkpoint(directory: Path) -> None:
    """Remove what `write_checkpoint` left, when the job's result is safe elsewhere."""
    shutil.rmtree(directory, ignore_errors=True)


class Keeper:
    """Decides when a checkpoint is worth its time, and writes it.

    A checkpoint that cannot be written costs a note, not the training.

    Args:
        every: seconds between two checkpoints at least; 0 is after every step. Where one takes long, they become rarer, so
            that they never take more than a fiftieth of the time.
    """

    def __init__(self, directory: Path, fingerprint: str, every: float, note: Note) -> None:
        self._directory, self._fingerprint, self._note = directory, fingerprint, note
        self._every, self._pause = every, every
        self._last = time.monotonic()
        with suppress(OSError):  # of a process that was killed while it wrote
            for leftover in directory.glob(f"{TEMPORARY}*"):
                leftover.unlink(missing_ok=True)

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._pause

    def keep(self, began: float, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Write one.

        Args:
            began: when its making began, by `time.monotonic`.
        """
        try:
            write_checkpoint(self._directory, self._fingerprint, Checkpoint(progress, tensors))
        except StorageError as error:
            self._note(f"no checkpoint after step {progress.step}: {error.message}")
        self._last = time.monotonic()
        if self._every:
            self._pause = max(self._every, (self._last - began) / _SHARE)


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
