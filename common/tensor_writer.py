"""Writing of safetensors files tensor by tensor, of shapes that are not known before they are computed.

The header stands first in the file but is known last, so space for the longest that it could be is reserved, filled in
at the end, and padded with blanks, as the format allows. The space depends on the names alone: the same tensors give the
same bytes, whatever was known when.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from seedbed.common.errors import AdapterFormatError
from seedbed.common.files import storing
from seedbed.common.tensor_file import DTYPES, HEADER_LIMIT, WIDTHS

KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
"""The format's names of torch's dtypes."""
_METADATA = '"__metadata__":{"format":"pt"}'
_ENTRY = len(',:{"dtype":"F8_E4M3","shape":[],"data_offsets":[,]}') + 2 * 20
_DIMENSION = 21
"""Digits and comma of one dimension, at most."""

Layout = Mapping[str, tuple[str, Sequence[int]]]
"""Dtype, as the format calls it, and shape of every tensor, in the order of the file."""


class TensorWriter:
    """A safetensors file in the making; use as a context manager, and `finish` it.

    Args:
        path: must not exist.
        names: of all tensors that will come, with their number of dimensions, in the order of the file.
        expected: what the tensors will probably be. If they are, the file's hash is computed while it is written;
            otherwise the file is read again for it.
    """

    def __init__(self, path: Path, names: Mapping[str, int], expected: Layout | None = None) -> None:
        self.path = path
        self._awaited = list(names)
        self._space = _space(names)
        self._entries: dict[str, tuple[str, list[int]]] = {}
        self._position = 0
        self._guess = _header(expected, self._space) if expected is not None and list(expected) == list(names) else None
        self._hash = hashlib.sha256(self._guess or b"")
        # The write alone takes longest of all that happens to a part, so that nothing else is done in its thread.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hasher")
        self._pending: list[Future[None]] = []
        with storing("write", path):
            self._file = path.open("xb", buffering=0)
            self._file.write(self._guess or bytes(8 + self._space))

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()
        self._hasher.shutdown()
        self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor; it must not be changed afterwards."""
        data = tensor.detach().to("cpu").contiguous()
        self.add_parts(name, KINDS[data.dtype], data.shape, [data])

    def add_parts(self, name: str, kind: str, shape: Sequence[int], parts: Iterable[Tensor]) -> None:
        """Write the next tensor in parts: contiguous tensors on the CPU whose bytes in a row are its own."""
        expected = self._awaited.pop(0) if self._awaited else None
        if name != expected or self._position % WIDTHS[kind]:
            raise ValueError(f"tensor {name} at byte {self._position}, expected {expected}, aligned")
        begin = self._position
        for part in parts:
            self._write(part)
        if self._position - begin != math.prod(shape) * WIDTHS[kind]:
            raise ValueError(f"{name}: {self._position - begin} bytes do not make {kind} {list(shape)}")
        self._entries[name] = kind, list(shape)

    def finish(self) -> str:
        """Write the header and everything to the disk.

        Returns:
            SHA-256 of the file, in hexadecimal.
        """
        if self._awaited:
            raise ValueError(f"tensor {self._awaited[0]} is missing")
        header = _header(self._entries, self._space)
        self._written()
        with storing("write", self.path):
            if header != self._guess:
                self._file.seek(0)
                self._file.write(header)
            self._file.flush()
            os.fsync(self._file.fileno())
        if header == self._guess:
            return self._hash.hexdigest()
        with storing("read", self.path), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _write(self, part: Tensor) -> None:
        data = part.reshape(-1).view(torch.uint8).numpy().data
        self._position += len(data)
        # One part is written and hashed while the next is made, and no more wait in memory.
        self._written()
        self._pending = [self._writer.submit(self._write_all, data)]
        if self._guess is not None:
            self._pending.append(self._hasher.submit(self._hash.update, data))

    def _write_all(self, data: memoryview) -> None:
        done = 0
        with storing("write", self.path):
            while done < len(data):
                done += self._file.write(data[done:]) or 0

    def _written(self) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()


def _space(names: Mapping[str, int]) -> int:
    """Bytes to reserve for the header: enough for any shape, and such that tensors begin at a multiple of 8."""
    size = 2 + len(_METADATA)
    size += sum(len(json.dumps(name)) + _ENTRY + _DIMENSION * dimensions for name, dimensions in names.items())
    if size > HEADER_LIMIT:
        raise AdapterFormatError(f"{len(names):,} tensors are too many for one file", "Adapt fewer modules.")
    return -(-size // 8) * 8


def _header(entries: Layout, space: int) -> bytes:
    texts, position = [_METADATA], 0
    for name, (kind, shape) in entries.items():
        end = position + math.prod(shape) * WIDTHS[kind]
        entry = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
        texts.append(f"{json.dumps(name)}:{json.dumps(entry, separators=(',', ':'))}")
        position = end
    text = ("{" + ",".join(texts) + "}").encode().ljust(space)
    return len(text).to_bytes(8, "little") + text
