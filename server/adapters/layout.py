"""Where each expert's columns lie in an exact average: what lets one expert be taken out again.

An average stands as ``[w_1 s_1 B_1 | … | w_N s_N B_N] · [A_1; …; A_N]``. Its manifest keeps the rank of every parent, one
number where all modules have the same, else one for each module in the order of the names, with repetitions counted:
``"8*12 4"`` are twelve modules of rank 8 and one of rank 4. Rank 0 is a parent without the module, or of weight 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from seedbed.common.errors import AdapterFormatError
from seedbed.common.storage import AdapterFile

Blocks = Mapping[str, tuple[int, ...]]
"""Module -> rank of every parent in it."""


def blocks_of(files: Sequence[AdapterFile], weights: Sequence[float]) -> Blocks:
    """The blocks of the average of these files, as `merging.average.stack` lays them."""
    return {name: _block(files, weights, name) for name in sorted({name for file in files for name in file.names})}


def _block(files: Sequence[AdapterFile], weights: Sequence[float], name: str) -> tuple[int, ...]:
    ranks = [file.rank(name) if name in file.names else 0 for file in files]
    used = [rank if weight != 0 else 0 for rank, weight in zip(ranks, weights, strict=True)]
    if not any(used):
        # Only adapters of weight 0 have the module: the first of them stands for a zero update.
        first = next(index for index, rank in enumerate(ranks) if rank)
        used[first] = ranks[first]
    return tuple(used)


def encode_ranks(blocks: Blocks) -> list[int | str]:
    """One entry for each parent; see the module's description."""
    return [_encode(ranks) for ranks in zip(*(blocks[name] for name in sorted(blocks)), strict=True)]


def decode_ranks(encoded: Sequence[int | str], names: Sequence[str]) -> Blocks:
    """The inverse of `encode_ranks`.

    Raises:
        AdapterFormatError: if an entry is malformed or does not fit the number of modules.
    """
    columns = [_decode(entry, len(names)) for entry in encoded]
    return {name: tuple(column[index] for column in columns) for index, name in enumerate(sorted(names))}


def _encode(ranks: Sequence[int]) -> int | str:
    runs = [(rank, len(list(run))) for rank, run in groupby(ranks)]
    if len(runs) == 1:
        return ranks[0]
    return " ".join(f"{rank}*{count}" if count > 1 else str(rank) for rank, count in runs)


def _decode(entry: int | str, count: int) -> list[int]:
    if isinstance(entry, int):
        return [entry] * count
    try:
        pairs = [(int(rank), int(times or 1)) for rank, _, times in (part.partition("*") for part in entry.split())]
    except (AttributeError, ValueError):
        raise AdapterFormatError(f"the manifest's ranks hold {entry!r}", "Make the average again.") from None
    if sum(times for _, times in pairs) != count:
        raise AdapterFormatError(
            f"the manifest's ranks {entry!r} are not of {count} modules", "Make the average again."
        )
    return [rank for rank, times in pairs for _ in range(times)]
