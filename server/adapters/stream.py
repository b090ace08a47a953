"""The exact average from files to a file in a few megabytes, whatever the size of the model and the number of adapters.

    A = [A_1; …; A_N]                     the experts' rows, one after the other
    B = [w_1 s_1 B_1 | … | w_N s_N B_N]   a slice of rows of every expert, side by side

It is what `merging.average` computes, to the bit, without ever holding a module of all adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor

from seedbed.common.adapter_writer import AdapterWriter
from seedbed.common.errors import NonFiniteError
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
    with _one_thread(), ThreadPoolExecutor(1, "sha256") as hasher:
        room = _Room()
        hashing: Future[None] | None = None
        names = plan.names
        for index, name in enumerate(names):
            for file in plan.holders(names[index + 1]) if index + 1 < len(names) else ():
                file.prefetch(names[index + 1])  # the disk reads ahead while this module is written
            try:
                _write_module(new, plan, name, blocks[name], room)
            except NonFiniteError:  # of the result: looked at once, as it is written
                _blame(plan, name)
                raise
            if hashing is not None:
                hashing.result()  # what was just read is hashed while it is still in memory, and no more waits
            hashing = hasher.submit(_hash_behind, plan.files, name)
            if progress is not None:
                progress(name, len(names))
        if hashing is not None:
            hashing.result()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch with one thread: what is copied here is short, and threads that wait for more of it keep the hashes from a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_module(new: AdapterWriter, plan: MergePlan, name: str, ranks: Sequence[int], room: _Room) -> None:
    used = [(file, weight) for file, weight, rank in zip(plan.files, plan.weights, ranks, strict=True) if rank]
    for file in plan.holders(name):
        if all(file is not one for one, _ in used):
            file.factors(name)  # of weight 0: nothing of it is written, but what is damaged is refused all the same
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
        A=_rows_of_all(terms, name, dtype, room),
        B=_slices(terms, name, dtype, room, scaled=not same),
    )


def _rows_of_all(terms: Sequence[Term], name: str, dtype: torch.dtype, room: _Room) -> Iterator[Tensor]:
    columns = terms[0][0].shape(name)[1]
    rows = max(1, _PART // (columns * dtype.itemsize)) + max(file.rank(name) for file, _ in terms)
    buffers = cycle(room.tensor(f"A{turn}", rows, columns, dtype) for turn in range(2))
    filled, buffer = 0, next(buffers)
    for file, _ in terms:
        rank = file.rank(name)
        _read(file, name, "A", 0, buffer[filled : filled + rank])
        filled += rank
        if filled * columns * dtype.itemsize >= _PART:
            yield buffer[:filled]
            filled, buffer = 0, next(buffers)
    if filled:
        yield buffer[:filled]


def _slices(terms: Sequence[Term], name: str, dtype: torch.dtype, room: _Room, *, scaled: bool) -> Iterator[Tensor]:
    rows = terms[0][0].shape(name)[0]
    ranks = [file.rank(name) for file, _ in terms]
    step = min(rows, max(1, _PART // (sum(ranks) * dtype.itemsize)))
    buffers = cycle(room.tensor(f"B{turn}", step, sum(ranks), dtype) for turn in range(2))
    parts = [
        room.tensor(f"part{index}", step, rank, file.factor_dtype(name, "B"))
        for index, ((file, _), rank) in enumerate(zip(terms, ranks, strict=True))
    ]
    for start in range(0, rows, step):
        count = min(step, rows - start)
        columns = []
        for (file, factor), whole in zip(terms, parts, strict=True):
            part = whole[:count]
            _read(file, name, "B", start, part)
            if scaled:
                part = part.to(torch.promote_types(part.dtype, torch.float32)) * factor
            columns.append(part.to(dtype))
        buffer = next(buffers)[:count]
        torch.cat(columns, dim=1, out=buffer)  # four times as fast as a copy into each expert's few columns
        yield buffer


class _Room:
    """Memory that all modules use one after the other: given back and asked for anew, it leaves holes that pile up.

    What is written comes in two tensors that take turns: while one is written and hashed, the other is filled.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def tensor(self, use: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """An uninitialized matrix; the one before for the same use is lost."""
        size = rows * columns * dtype.itemsize
        if use not in self._held or len(self._held[use]) < size:
            self._held[use] = torch.empty(size, dtype=torch.uint8)
        return self._held[use][:size].view(dtype).view(rows, columns)


def _read(file: AdapterFile, name: str, factor: Literal["A", "B"], start: int, into: Tensor) -> None:
    """Rows from `start` on, cast to the dtype of `into`."""
    own = file.factor_dtype(name, factor)
    part = into if own == into.dtype else torch.empty(into.shape, dtype=own)
    file.read_part(name, factor, start, part)
    if part is not into:
        into.copy_(part)


def _blame(plan: MergePlan, name: str) -> None:
    """Say which input holds NaN or infinity, and where; nothing if the result alone overflowed."""
    for file in plan.holders(name):
        file.factors(name)


def _hash_behind(files: Sequence[AdapterFile], name: str) -> None:
    for file in files:
        if name in file.names:
            file.hash_behind(name)
