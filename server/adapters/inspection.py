"""`seedbed inspect`: what adapters are, module by module, without a dense update and without writing anything.

Of every module: singular values of ``s B A``, its Frobenius norm, and two measures of how many directions it really uses,

    effective rank = exp(−Σ p_k ln p_k) ,  p_k = σ_k / Σ σ        (Roy and Vetterli, EUSIPCO 2007)
    stable rank    = Σ σ_k² / σ_1²                                (Rudelson and Vershynin, J. ACM 2007)

and of two or more adapters how they stand to each other (`inspection_pairs`). One module of all adapters is in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from seedbed.common.adapter import LoraFactors
from seedbed.common.errors import ConfigError, nearest
from seedbed.common.gram import GramSpectrum
from seedbed.common.manifest import Manifest
from seedbed.common.storage import AdapterFile
from seedbed.server.adapters.inspection_pairs import Pairs, PairSums
from seedbed.server.adapters.plan import common_base, require_same_shapes


@dataclass(frozen=True)
class ModuleFacts:
    """One module of one adapter."""

    rank: int
    scaling: float
    singular_values: tuple[float, ...]
    """Falling; as many as the rank, or as the module is wide."""

    @property
    def norm(self) -> float:
        return math.hypot(*self.singular_values)

    @property
    def effective_rank(self) -> float:
        """0 for a zero update."""
        total = math.fsum(self.singular_values)
        shares = [value / total for value in self.singular_values if value > 0] if total else []
        return math.exp(-math.fsum(p * math.log(p) for p in shares)) if shares else 0.0

    @property
    def stable_rank(self) -> float:
        """0 for a zero update."""
        first = self.singular_values[0]
        return math.fsum((value / first) ** 2 for value in self.singular_values) if first else 0.0


@dataclass(frozen=True)
class AdapterFacts:
    """One adapter."""

    label: str
    """Short and different from the others'."""
    directory: Path
    manifest: Manifest
    modules: Mapping[str, ModuleFacts]
    parameters: int

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole update, over all modules that were looked at."""
        return math.hypot(*(module.norm for module in self.modules.values()))

    @property
    def ranks(self) -> list[int]:
        return sorted({module.rank for module in self.modules.values()})

    @property
    def scalings(self) -> list[float]:
        return sorted({module.scaling for module in self.modules.values()})


@dataclass(frozen=True)
class Inspection:
    """All that was found."""

    adapters: tuple[AdapterFacts, ...]
    pairs: Pairs | None
    """None for one adapter alone."""


def inspect_adapters(directories: Sequence[Path], pattern: str | None = None) -> Inspection:
    """Look at adapters of one base model.

    Args:
        directories: PEFT directories.
        pattern: only modules whose names contain it, or match it if it holds ``*`` or ``?``.

    Raises:
        ConfigError: if there is no adapter, or no module fits the pattern.
        AdapterError: if one is malformed, damaged or does not fit the others.
    """
    if not directories:
        raise ConfigError("there is no adapter to inspect", "Give at least one PEFT directory.")
    files = [AdapterFile(path, verify_later=True) for path in directories]
    common_base(files)
    require_same_shapes(files)
    names = _chosen({name for file in files for name in file.names}, pattern)
    modules: list[dict[str, ModuleFacts]] = [{} for _ in files]
    sums = PairSums({name: _shape(files, name) for name in names}, len(files)) if len(files) > 1 else None
    for name in names:
        updates = [file.factors(name) if name in file.names else None for file in files]
        for found, update in zip(modules, updates, strict=True):
            if update is not None:
                found[name] = ModuleFacts(update.rank, update.scaling, _singular_values(update))
        if sums is not None:
            sums.add(name, updates)
    labels = _labels(directories)
    adapters = tuple(
        AdapterFacts(label, file.directory, file.manifest, found, _parameters(file, found))
        for label, file, found in zip(labels, files, modules, strict=True)
    )
    return Inspection(adapters, sums.result() if sums is not None else None)


def kind_of_module(name: str) -> str:
    """What a module is in any layer: its name after the last number, such as ``self_attn.q_proj``."""
    return re.split(r"(?:^|\.)\d+\.", name)[-1]


def layer_of(name: str) -> int | None:
    """Number of the layer that a module belongs to: the first in its name."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found.group(1)) if found else None


def _chosen(names: set[str], pattern: str | None) -> list[str]:
    if pattern is None:
        return sorted(names)
    wild = any(sign in pattern for sign in "*?[")
    found = [name for name in names if (fnmatch(name, pattern) if wild else pattern in name)]
    if not found:
        kinds = {kind_of_module(name).rpartition(".")[2] for name in names}
        raise ConfigError(f"no module fits --module '{pattern}'", nearest(pattern, kinds))
    return sorted(found)


def _shape(files: Sequence[AdapterFile], name: str) -> tuple[int, int]:
    return next(file.shape(name) for file in files if name in file.names)


def _singular_values(update: LoraFactors) -> tuple[float, ...]:
    values: Tensor = GramSpectrum([update], [update.scaling]).S[: min(update.rank, *update.shape)]
    # What is zero to the precision of the decomposition is rounding, no direction.
    return tuple(torch.where(values > 1e-7 * values[0], values, 0.0).tolist())


def _parameters(file: AdapterFile, modules: Mapping[str, ModuleFacts]) -> int:
    return sum(found.rank * sum(file.shape(name)) for name, found in modules.items())


def _labels(directories: Sequence[Path]) -> list[str]:
    """Names of the directories; with as many parents as it takes to tell them apart, or numbered if nothing does."""
    paths = [path.resolve() for path in directories]
    for depth in range(1, 4):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{index + 1}:{path.name}" for index, path in enumerate(paths)]
