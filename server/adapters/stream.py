"""The exact average from files to a file in a few megabytes, whatever the size of the model and the number of adapters.

    A = [A_1; …; A_N]                     the experts' rows, one after the other
    B = [w_1 s_1 B_1 | … | w_N s_N B_N]   a slice of rows of every expert, side by side

It is what `merging.average` computes, to the bit, without ever holding a module of all adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from seedbed.common.adapter_writer import AdapterWriter
from seedbed.common.checks import is_finite, require_finite
from seedbed.common.storage import AdapterFile
from seedbed.server.adapters.layout import Blocks
from seedbed.server.adapters.plan import MergePlan

_PART = 1 << 22
"""Bytes that are read, joined and written at a time."""

Term = tuple[AdapterFile, float]
"""An adapter, and what its B is multiplied by."""


def write_average(
    new: AdapterWriter, plan: MergePlan, blocks: Blocks, progress: Callable[[str, int], None] | None = None
) -> None:
    """Write all modules of an exact average.

    Args:
        new: the adapter in the making.
        plan: of the method `average`, without a part of the seed.
        blocks: the rank of every input in every module.

    Raises:
        NonFiniteError: if an input holds NaN or infinity.
        AdapterFormatError: if a file becomes shorter while it is read.
    """
    with ThreadPoolExecutor(1, "sha256") as hasher:
        hashing: Future[None] | None = None
        names = plan.names
        for index, name in enumerate(names):
            for file in plan.holders(names[index + 1]) if index + 1 < len(names) else ():
                file.prefetch(names[index + 1])  # the disk reads ahead while this module is written
            _write_module(new, plan, name, blocks[name])
            if hashing is not None:
                hashing.result()  # what was just read is hashed while it is still in memory, and no more waits
            hashing = hasher.submit(_hash_behind, plan.files, name)
            if progress is not None:
                progress(name, len(names))
        if hashing is not None:
            hashing.result()


def _write_module(new: AdapterWriter, plan: MergePlan, name: str, ranks: Sequence[int]) -> None:
    used = [(file, weight) for file, weight, rank in zip(plan.files, plan.weights, ranks, strict=True) if rank]
    terms = [(file, weight * file.scaling(name)) for file, weight in used]
    same = len({coefficient for _, coefficient in terms}) == 1
    dtype = plan.dtype_of(name)
    new.add_parts(
        name,
        shape=used[0][0].shape(name),
        rank=sum(ranks),
        dtype=dtype,
        # One coefficient for all becomes the scaling, and bytes are copied as they are.
        scaling=terms[0][1] if same else 1.0,
        A=_rows_of_all(terms, name, dtype),
        B=_slices(terms, name, dtype, scaled=not same),
    )


def _rows_of_all(terms: Sequence[Term], name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for file, _ in terms:
        held.append(_read(file, name, "A").to(dtype))
        if sum(part.nbytes for part in held) >= _PART:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _slices(terms: Sequence[Term], name: str, dtype: torch.dtype, *, scaled: bool) -> Iterator[Tensor]:
    rows = terms[0][0].shape(name)[0]
    width = sum(file.rank(name) for file, _ in terms) * dtype.itemsize
    step = max(1, _PART // width)
    for start in range(0, rows, step):
        parts = [(_read(file, name, "B", start, min(start + step, rows)), factor) for file, factor in terms]
        yield torch.cat([_scaled(part, factor, scaled).to(dtype) for part, factor in parts], dim=1)


def _read(file: AdapterFile, name: str, factor: Literal["A", "B"], start: int = 0, stop: int | None = None) -> Tensor:
    part = file.part(name, factor, start, stop)
    if not is_finite(part):
        require_finite(name, file.factors(name))  # says which numbers of which factor
    return part


def _scaled(part: Tensor, factor: float, scaled: bool) -> Tensor:
    return part.to(torch.promote_types(part.dtype, torch.float32)) * factor if scaled else part


def _hash_behind(files: Sequence[AdapterFile], name: str) -> None:
    for file in files:
        if name in file.names:
            file.hash_behind(name)
