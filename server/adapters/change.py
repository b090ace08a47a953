"""Taking an expert out of an exact average, or adding a late one, without the files of the others.

An average is ``Σ w_i dW_i`` with each expert's columns in a block of its own. Without expert k it is

    Σ_{i≠k} w_i dW_i / (1 − w_k) ,

the other blocks as they stand and another scaling; a late expert is one more block. Nothing that stays is rounded again,
so a participant can withdraw, and another join, any number of times. The manifest is as if the average had been made anew.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from seedbed.common.adapter import LoraFactors
from seedbed.common.adapter_writer import file_order, new_adapter
from seedbed.common.errors import AdapterFormatError, AdapterMismatchError, ConfigError
from seedbed.common.manifest import Manifest, recipe_hash
from seedbed.common.storage import AdapterFile
from seedbed.server.adapters.files import Progress, require_absent
from seedbed.server.adapters.layout import Blocks, decode_ranks, encode_ranks
from seedbed.server.adapters.plan import common_base, require_same_shapes

_PREFIX = re.compile(r"[0-9a-f]{4,64}")
_ANEW = "Average the remaining adapters anew."


@dataclass(frozen=True)
class _Average:
    """An average on disk, and what its manifest says of its parents."""

    file: AdapterFile
    parents: tuple[str, ...]
    weights: tuple[float, ...]
    blocks: Blocks
    settings: Mapping[str, Any]


def change_average(
    merged: Path,
    out: Path,
    *,
    without: Sequence[str] = (),
    added: Sequence[Path] = (),
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Make an exact average with other participants.

    Args:
        merged: a directory that ``seedbed merge --method average`` wrote.
        out: the directory to make.
        without: experts to take out: directories, digests, or beginnings of digests.
        added: PEFT directories to add.
        weights: one for each of `added`, where 1 is the mean weight of those who stay; None is 1 each.

    Returns:
        The manifest of the result: parents and weights as if averaged anew.

    Raises:
        ConfigError: if an expert is not one of the average's, none would be left, or a weight makes no sense.
        AdapterError: if a file is malformed, does not fit, or `merged` is not an exact average.
        StorageError: if `out` is already there or the file system refuses.
    """
    require_absent(out)
    average = _open(merged)
    late = tuple(AdapterFile(path, verify_later=True) for path in added)
    relative = _relative_weights(weights, len(late))
    base = common_base([average.file, *late])
    require_same_shapes([average.file, *late])
    kept = _kept(average, without)
    mass = math.fsum(average.weights[index] for index in kept)
    if mass <= 0:
        raise ConfigError("only experts of weight 0 would be left", _ANEW)
    # The mean weight of those who stay is 1, so all weights together are their number and the late ones' weights.
    total = len(kept) + math.fsum(relative)
    scale = len(kept) / (mass * total)
    shares = [average.weights[index] * scale for index in kept] + [weight / total for weight in relative]
    change = _Change(average, kept, late, scale, tuple(shares[len(kept) :]))
    names = change.names()
    blocks = {name: change.block(name) for name in names}
    with new_adapter(out, names) as new:
        for name in names:
            new.add(name, change.module(name))
            if progress is not None:
                progress(name, len(names))
        _ = average.file.manifest  # verified before the result is believed
        parents = (*(average.parents[index] for index in kept), *(file.manifest.digest for file in late))
        settings = {**average.settings, "weights": shares, "ranks": encode_ranks(blocks)}
        return new.finish(
            kind="merge",
            base=base,
            parents=parents,
            recipe=recipe_hash({"merge": settings, "parents": list(parents)}),
            settings=settings,
            base_model_name_or_path=str(average.file.config.get("base_model_name_or_path") or base.name),
            task_type=average.file.task_type,
        )


@dataclass(frozen=True)
class _Change:
    average: _Average
    kept: Sequence[int]
    late: tuple[AdapterFile, ...]
    scale: float
    """By which the kept blocks' weights grow."""
    shares: tuple[float, ...]
    """Of the late ones."""

    def names(self) -> list[str]:
        """All modules that someone has, in the order of the result's file."""
        held = [name for name in self.average.file.names if self._rank_kept(name)]
        files = {name: [self.average.file] for name in held}
        for file in self.late:
            for name in file.names:
                files.setdefault(name, []).append(file)
        return file_order(
            {name: reduce(torch.promote_types, (file.dtype(name) for file in found)) for name, found in files.items()}
        )

    def block(self, name: str) -> tuple[int, ...]:
        """Ranks of all parents in a module of the result."""
        ranks = self.average.blocks.get(name)
        before = tuple(ranks[index] if ranks else 0 for index in self.kept)
        return before + tuple(file.rank(name) if name in file.names else 0 for file in self.late)

    def module(self, name: str) -> LoraFactors:
        parts = [self._kept_part(name)] if self._rank_kept(name) else []
        for file, share in zip(self.late, self.shares, strict=True):
            if name in file.names:
                factors = file.factors(name)
                parts.append(LoraFactors(factors.A, factors.B, factors.scaling * share))
        return _stack(parts)

    def _rank_kept(self, name: str) -> int:
        ranks = self.average.blocks.get(name)
        return sum(ranks[index] for index in self.kept) if ranks else 0

    def _kept_part(self, name: str) -> LoraFactors:
        factors, ranks = self.average.file.factors(name), self.average.blocks[name]
        starts = [sum(ranks[:index]) for index in self.kept]
        columns = torch.cat(
            [torch.arange(start, start + ranks[index]) for start, index in zip(starts, self.kept, strict=True)]
        )
        return LoraFactors(factors.A[columns], factors.B[:, columns], factors.scaling * self.scale)


def _stack(parts: Sequence[LoraFactors]) -> LoraFactors:
    """The sum of the parts, in which the first stands bit by bit and only later ones are scaled to its scaling."""
    scaling = parts[0].scaling or 1.0
    dtype = reduce(torch.promote_types, (part.A.dtype for part in parts))
    B = [parts[0].B.to(dtype) if parts[0].scaling else torch.zeros_like(parts[0].B, dtype=dtype)]
    for part in parts[1:]:
        ratio = part.scaling / scaling
        exact = math.isclose(ratio, 1.0, rel_tol=1e-12)
        B.append((part.B if exact else part.B.to(torch.promote_types(dtype, torch.float32)) * ratio).to(dtype))
    return LoraFactors(torch.cat([part.A.to(dtype) for part in parts]), torch.cat(B, dim=1), scaling)


def _open(directory: Path) -> _Average:
    file = AdapterFile(directory, verify_later=True)
    settings = file.claimed.settings if file.claimed is not None else {}
    if file.claimed is None or settings.get("method") != "average":
        what = f"method '{settings['method']}'" if "method" in settings else file.unverified.kind
        raise AdapterFormatError(
            f"{directory} is not an exact average that Seedbed made ({what})",
            "Only `seedbed merge --method average` keeps every expert apart.",
        )
    options = settings.get("options", {})
    if options.get("task_scale", 1.0) != 1.0 or options.get("include_seed", False):
        raise AdapterFormatError(f"{directory} is an average with a part of the seed in it", _ANEW)
    if "ranks" not in settings:
        raise AdapterFormatError(f"{directory} does not say where its experts lie", _ANEW)
    blocks = decode_ranks(settings["ranks"], list(file.names))
    weights, parents = settings.get("weights", []), file.claimed.parents
    if not len(weights) == len(parents) == len(settings["ranks"]) or any(
        sum(ranks) != file.rank(name) for name, ranks in blocks.items()
    ):
        raise AdapterFormatError(f"{directory}: its manifest does not fit its tensors", _ANEW)
    return _Average(file, parents, tuple(weights), blocks, settings)


def _kept(average: _Average, without: Sequence[str]) -> list[int]:
    """Indices of the parents that stay."""
    kept = list(range(len(average.parents)))
    for expert in without:
        gone = _find(expert, average, kept)
        kept.remove(gone)
    if not kept:
        raise ConfigError("no expert would be left", "Keep one, or delete the adapter.")
    return kept


def _find(expert: str, average: _Average, kept: Sequence[int]) -> int:
    path = Path(expert)
    wanted = AdapterFile(path).manifest.digest if path.is_dir() else expert.lower()
    parents = {index: average.parents[index] for index in kept}
    found = [index for index, digest in parents.items() if _PREFIX.fullmatch(wanted) and digest.startswith(wanted)]
    if len({parents[index] for index in found}) > 1:
        raise ConfigError(f"'{expert}' is the beginning of {len(found)} experts' digests", "Give more of its digits.")
    if not found:
        known = ", ".join(digest[:12] for digest in dict.fromkeys(parents.values()))
        raise AdapterMismatchError(
            f"'{expert}' is not an expert of {average.file.directory}",
            f"Its experts are {known or 'none any more'}.",
        )
    return found[0]


def _relative_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(
            f"expected {count} weights, one for each adapter that is added, got {len(weights)}",
            "Those that stay keep their weights among each other.",
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"weight {weight} of a late adapter is not above 0", "1 is the mean weight of the others."
            )
    return list(weights)
