"""Whether a participant's result may enter the federation: every check before any arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.config import LoraSettings
from seedbed.common.errors import AdapterMismatchError, SeedbedError
from seedbed.common.jobs import Job, JobResult
from seedbed.common.manifest import Manifest
from seedbed.common.storage import AdapterStore, check_update, read_adapter

Shapes = Mapping[str, tuple[int, int]]
_HEADER_BYTES = 10_000_000
"""Room for the header of a safetensors file, on top of the tensors."""


def expected_adapter(shapes: Shapes, lora: LoraSettings) -> Adapter:
    """What every update must be shaped like: modules, shapes, rank and dtype, without any memory behind it."""
    scaling = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    with torch.device("meta"):
        return Adapter(
            {
                name: LoraFactors(torch.empty(lora.rank, columns), torch.empty(rows, lora.rank), scaling)
                for name, (rows, columns) in shapes.items()
            }
        )


@dataclass(frozen=True, slots=True)
class Admission:
    """The refusals of one federation.

    Args:
        store: where the tensors are; it verifies digests when it opens.
        shapes: `(out, in)` of every module that an adapter of this federation must have.
        norm_bound: largest Frobenius norm of one module's update.
    """

    store: AdapterStore
    shapes: Shapes
    norm_bound: float

    def admit(self, job: Job, result: JobResult) -> Manifest:
        """Check one result against the job that it answers.

        Returns:
            The manifest of the adapter as it lies in the store.

        Raises:
            SeedbedError: saying what is wrong, with the module or field, expected and got.
        """
        if result.error:
            raise SeedbedError(result.error, result.hint)
        expected = expected_adapter(self.shapes, job.lora)
        quota = 4 * expected.parameters + _HEADER_BYTES
        adapter, manifest = read_adapter(self.store.open(result.digest), max_bytes=quota)
        for what, wanted, got in (
            ("recipe", job.recipe, manifest.recipe),
            ("kind", job.kind, manifest.kind),
            ("parents", (job.parent,) if job.parent else (), manifest.parents),
        ):
            if wanted != got:
                raise AdapterMismatchError(f"the update's {what}: expected {_short(wanted)}, got {_short(got)}")
        check_update(adapter, manifest, base=job.base, reference=expected, norm_bound=self.norm_bound)
        self._scaling(expected, adapter)
        return manifest

    def _scaling(self, expected: Adapter, adapter: Adapter) -> None:
        """Factors of another scaling would enter an average with another weight."""
        for name, factors in adapter.items():
            if abs(factors.scaling - expected[name].scaling) > 1e-6 * expected[name].scaling:
                raise AdapterMismatchError(
                    f"module {name}: expected scaling {expected[name].scaling}, got {factors.scaling}"
                )


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
