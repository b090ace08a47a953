"""`seedbed merge`: PEFT directories in, one PEFT directory out.

Modules are merged one at a time from memory maps, so what is in memory is the result and one module of the inputs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError, ConfigError, StorageError
from seedbed.common.manifest import BaseIdentity, Kind, Manifest, recipe_hash
from seedbed.common.storage import AdapterFile, require_base, write_adapter
from seedbed.server.merging import Method, Options, method_named


def merge_directories(
    inputs: Sequence[Path],
    method: str,
    out: Path,
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    *,
    kind: Kind = "merge",
) -> Manifest:
    """Merge adapters of one base model.

    Args:
        inputs: PEFT directories, by Seedbed or by other programs.
        method: a name in the table of methods.
        out: the directory to make.
        rank: rank of the result, for a method that takes one; modules whose inputs have less together get that.
        weights: one for each input, not negative; divided by their sum. None weighs all the same.
        kind: what the result is called in its manifest.

    Returns:
        The manifest of the result; its parents are the digests of the inputs.

    Raises:
        ConfigError: if method, rank or weights make no sense.
        AdapterError: if an input is malformed or does not fit the others.
        StorageError: if `out` is already there or the file system refuses.
    """
    row = method_named(method)
    if os.path.lexists(out):
        raise StorageError(f"{out} is already there", "Choose another output, or remove it first.")
    shares = row.shares(weights, len(inputs))
    files = [AdapterFile(path) for path in inputs]
    base = _common_base(files)
    _require_same_shapes(files)
    options = _options(row, rank, files)
    digests = tuple(file.manifest.digest for file in files)
    settings = {"method": row.name, "weights": shares, "options": options.model_dump(mode="json")}
    return write_adapter(
        out,
        _merge(row, files, shares, options),
        kind=kind,
        base=base,
        parents=digests,
        recipe=recipe_hash({"merge": settings, "parents": list(digests)}),
        settings=settings,
        base_model_name_or_path=_base_path(files, base),
    )


def _merge(row: Method, files: Sequence[AdapterFile], shares: Sequence[float], options: Options) -> Adapter:
    merged: dict[str, LoraFactors] = {}
    for name in _names(files):
        updates = [file.factors(name) if name in file.names else None for file in files]
        merged[name] = row.merge_module(name, updates, shares, options)
    return Adapter(merged)


def _common_base(files: Sequence[AdapterFile]) -> BaseIdentity:
    """The base model of all, as the input says it that knows it best."""
    best = max((file.manifest.base for file in files), key=lambda base: (bool(base.digest), bool(base.name)))
    for file in files:
        require_base(file.manifest, best, str(file.directory))
    return best


def _base_path(files: Sequence[AdapterFile], base: BaseIdentity) -> str:
    """What PEFT shall load as the base: as it stands in the first input that says it."""
    stated = (str(file.config.get("base_model_name_or_path") or "") for file in files)
    return next((path for path in stated if path), base.name)


def _require_same_shapes(files: Sequence[AdapterFile]) -> None:
    for name in _names(files):
        first, *others = [file for file in files if name in file.names]
        for file in others:
            if file.shape(name) != first.shape(name):
                raise AdapterMismatchError(
                    f"module {name}: expected shape {list(first.shape(name))} as in {first.directory}, "
                    f"got {list(file.shape(name))} in {file.directory}",
                    "Merge adapters of one base model.",
                )


def _options(row: Method, rank: int | None, files: Sequence[AdapterFile]) -> Options:
    if rank is None:
        return row.parse({})
    if not row.takes_rank:
        raise ConfigError(
            f"method '{row.name}' does not take a rank: it gives rank {row.rank}", "Use the method 'svd'."
        )
    most = max(_largest_rank(name, files) for name in _names(files))
    if not 1 <= rank <= most:
        raise ConfigError(
            f"expected a rank from 1 to {most}, which is what the inputs have together, got {rank}",
            "Use 'average' to keep everything.",
        )
    return row.parse({"rank": rank})


def _largest_rank(name: str, files: Sequence[AdapterFile]) -> int:
    holders = [file for file in files if name in file.names]
    return min(sum(file.rank(name) for file in holders), *holders[0].shape(name))


def _names(files: Sequence[AdapterFile]) -> list[str]:
    return sorted({name for file in files for name in file.names})
