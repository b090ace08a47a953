"""Whether a participant's result may enter the federation: every check before any arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.checks import require_usual_dtype
from seedbed.common.config import LoraSettings
from seedbed.common.errors import AdapterMismatchError, ConfigError, SeedbedError
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.common.manifest import BaseIdentity, Manifest
from seedbed.common.routing import Router
from seedbed.common.routing.router_file import read_router
from seedbed.common.storage import AdapterStore, check_update, read_adapter, require_base

Shapes = Mapping[str, tuple[int, int]]
_HEADER_BYTES = 10_000_000
"""Room for the header of a safetensors file, on top of the tensors."""
_RANKS = 512
"""Largest rank of a contribution, in bytes of its file."""
_CONTRIBUTED = ("expert", "external", "joint", "merge")


def expected_adapter(shapes: Shapes, lora: LoraSettings, dtype: torch.dtype = torch.float32) -> Adapter:
    """What every update must be shaped like: modules, shapes, rank and dtype, without any memory behind it."""
    scaling = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    with torch.device("meta"):
        return Adapter(
            {
                name: LoraFactors(
                    torch.empty(lora.rank, columns, dtype=dtype), torch.empty(rows, lora.rank, dtype=dtype), scaling
                )
                for name, (rows, columns) in shapes.items()
            }
        )


def why_not_let_in(hello: Hello, base: BaseIdentity) -> str:
    """Why a participant cannot take part; empty where it can."""
    if hello.version != version("seedbed"):
        return f"it runs seedbed {hello.version}, the coordinator {version('seedbed')}"
    if hello.base.digest != base.digest:
        return (
            f"its base model {hello.base.name} has hash {hello.base.digest[:12]}…, "
            f"expected {base.name} with {base.digest[:12]}…"
        )
    return ""


@dataclass(frozen=True, slots=True)
class Admission:
    """The refusals of one federation.

    Args:
        store: where the tensors are; it verifies digests when it opens.
        shapes: `(out, in)` of every module that an adapter of this federation must have.
        norm_bound: largest Frobenius norm of one module's update.
        base: the federation's base model.
    """

    store: AdapterStore
    shapes: Shapes
    norm_bound: float
    base: BaseIdentity

    def admit(self, job: Job, result: JobResult) -> Manifest:
        """Check one result against the job that it answers.

        Returns:
            The manifest of the adapter as it lies in the store.

        Raises:
            SeedbedError: saying what is wrong, with the module or field, expected and got.
        """
        if result.error:
            raise SeedbedError(result.error, result.hint)
        if result.recipe != job.recipe:
            raise AdapterMismatchError("the answer is for another job")
        directory = self.store.open(result.digest)
        checks = {"gate": self._router, "router": self._router, "molora": self._with_experts}
        return checks.get(job.kind, self._adapter)(job, directory)

    def admit_seed(self, directory: Path, rank: int) -> Adapter:
        """Check an adapter that is given as the seed.

        Raises:
            SeedbedError: saying what is wrong.
        """
        adapter, manifest = read_adapter(directory)
        if manifest.base.digest not in ("", self.base.digest):
            raise AdapterMismatchError(
                f"the given seed {directory} belongs to {manifest.base.name}, expected {self.base.name}",
                "Give a seed of this base model.",
            )
        if {name: factors.shape for name, factors in adapter.items()} != dict(self.shapes):
            raise AdapterMismatchError(
                f"the given seed {directory} does not adapt the modules of lora.targets",
                "Give a seed trained with the same targets, or change lora.targets.",
            )
        ranks = {factors.rank for factors in adapter.values()}
        if ranks != {rank}:
            raise AdapterMismatchError(
                f"the given seed has rank {min(ranks)} to {max(ranks)}, expected {rank}",
                "Set lora.rank to the seed's rank.",
            )
        return adapter

    def admit_contribution(self, digest: str) -> dict[str, float]:
        """Check an expert that was trained elsewhere, whatever its rank.

        Its base model is compared by digest where both are known, else by name: other trainers write no digest.

        Returns:
            metrics that its manifest tells.

        Raises:
            SeedbedError: saying what is wrong, with the module or field, expected and got.
        """
        directory = self.store.open(digest)
        bound = _RANKS * 4 * sum(rows + columns for rows, columns in self.shapes.values()) + _HEADER_BYTES
        adapter, manifest = read_adapter(directory, max_bytes=bound)
        if manifest.kind not in _CONTRIBUTED:
            raise AdapterMismatchError(f"expected an expert, got an adapter of kind '{manifest.kind}'")
        require_base(manifest, self.base, "the update")
        require_usual_dtype(manifest)
        got = {name: factors.shape for name, factors in adapter.items()}
        for name in sorted(set(self.shapes) | set(got)):
            wanted, found = self.shapes.get(name), got.get(name)
            if wanted != found:
                what = f"expected shape {list(wanted) if wanted else 'none'}, got {list(found) if found else 'none'}"
                raise AdapterMismatchError(f"module {name}: {what}", "Train it with the federation's target modules.")
        check_update(adapter, manifest, base=self.base, norm_bound=self.norm_bound)
        return {key: value for key, value in manifest.metrics.items() if math.isfinite(value)}

    def _adapter(self, job: Job, directory: Path) -> Manifest:
        expected = expected_adapter(self.shapes, job.lora)
        adapter, manifest = read_adapter(directory, max_bytes=self._quota(job))
        self._made_for(job, manifest, job.kind)
        self._plain(job, adapter, manifest)
        self._scaling(expected, adapter)
        return manifest

    def _router(self, job: Job, directory: Path) -> Manifest:
        """A gate or a router over the experts that the job names."""
        router, names, manifest = read_router(directory, base=job.base, max_bytes=self._router_quota(len(job.names)))
        self._made_for(job, manifest, job.kind)
        self._routes(job, router, names)
        return manifest

    def _with_experts(self, job: Job, directory: Path) -> Manifest:
        """A router whose experts were trained with it: they are checked as any other adapter."""
        router, names, manifest = read_router(directory, base=job.base, max_bytes=self._router_quota(len(job.names)))
        for what, wanted, got in (
            ("recipe", job.recipe, manifest.recipe),
            ("number of experts", len(job.names), len(manifest.parents)),
        ):
            _same(what, wanted, got)
        self._routes(job, router, names)
        for parent in manifest.parents:
            adapter, own = read_adapter(self.store.open(parent), max_bytes=self._quota(job))
            self._plain(job, adapter, own)
            self._scaling(expected_adapter(self.shapes, job.lora), adapter)
        return manifest

    def _made_for(self, job: Job, manifest: Manifest, kind: str) -> None:
        for what, wanted, got in (
            ("recipe", job.recipe, manifest.recipe),
            ("kind", kind, manifest.kind),
            ("parents", job.parents, manifest.parents),
        ):
            _same(what, wanted, got)

    def _plain(self, job: Job, adapter: Adapter, manifest: Manifest) -> None:
        # What travels in int8 is expanded when it is read.
        dtype = torch.bfloat16 if job.transfer == "bfloat16" else torch.float32
        expected = expected_adapter(self.shapes, job.lora, dtype)
        check_update(adapter, manifest, base=job.base, reference=expected, norm_bound=self.norm_bound)
        _same("dtype", job.transfer, manifest.dtype)

    def _routes(self, job: Job, router: Router, names: Sequence[str]) -> None:
        """Names, kind and shapes; that every number is finite has been checked when it was read."""
        _same("experts", job.names, tuple(names))
        wanted = "phatgoose" if job.kind == "gate" else (job.router.kind if job.router else "learned")
        _same("router", wanted, router.settings.kind)
        try:
            router.require_fits(self.shapes, len(names))
        except ConfigError as error:
            raise AdapterMismatchError(error.message, error.hint) from None
        for name, module in router.tensors.items():
            for key, tensor in module.items():
                size = float(tensor.norm())
                if size > self.norm_bound:
                    raise AdapterMismatchError(
                        f"module {name}: expected a router's {key} of norm {self.norm_bound:.4g} or less, got {size:.4g}",
                        "Lower combine.routing.learning_rate, or raise run.norm_bound if this is right.",
                    )

    def _quota(self, job: Job) -> int:
        return 4 * expected_adapter(self.shapes, job.lora).parameters + _HEADER_BYTES

    def _router_quota(self, experts: int) -> int:
        return 4 * experts * sum(inputs + 1 for _, inputs in self.shapes.values()) + _HEADER_BYTES

    def _scaling(self, expected: Adapter, adapter: Adapter) -> None:
        """Factors of another scaling would enter an average with another weight."""
        for name, factors in adapter.items():
            if abs(factors.scaling - expected[name].scaling) > 1e-6 * expected[name].scaling:
                raise AdapterMismatchError(
                    f"module {name}: expected scaling {expected[name].scaling}, got {factors.scaling}"
                )


def _same(what: str, wanted: object, got: object) -> None:
    if wanted != got:
        raise AdapterMismatchError(f"the update's {what}: expected {_short(wanted)}, got {_short(got)}")


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
