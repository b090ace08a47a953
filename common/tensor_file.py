"""Reading of safetensors files that may come from anyone: nothing is allocated before the header has been checked.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length, the header in JSON, and
the tensors' bytes without gaps. Pickle is never read: loading it runs code. Tensors are read into memory of their own,
not mapped: mapped pages of many large files would pile up in this process for as long as the files are open.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedbed.common.errors import AdapterFormatError
from seedbed.common.files import storing

HEADER_LIMIT = 100_000_000
"""Bytes of header at most, as in the reference implementation."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What adapters are made of."""
_TORCH = DTYPES | {"I8": torch.int8}
"""What tensors can be made of: integers only where a file is opened for them."""
_OTHER_WIDTHS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOAT8_WIDTHS = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
WIDTHS = {name: dtype.itemsize for name, dtype in DTYPES.items()} | _OTHER_WIDTHS | _FLOAT8_WIDTHS
"""Bytes of one number of every dtype that can be copied."""
_CHUNK = 1 << 20
_MOST_AXES, _BEYOND = 16, 1 << 63
"""Of a shape: so many axes, and no number that a file system could not hold."""
_AGAIN = "Copy or write the file again."


class TensorFile:
    """An open safetensors file: names and shapes at once, tensors when asked for, into memory of their own.

    Args:
        path: the file.
        max_bytes: refuse a larger file before reading it.
        any_dtype: also take dtypes whose numbers are only copied, such as integers.
        int8: also take integers of 8 bits, as quantized adapters have them.

    Raises:
        AdapterFormatError: if it is truncated, malformed, too large, or holds other than floating-point numbers.
        StorageError: if it cannot be read.
    """

    def __init__(
        self, path: Path, *, max_bytes: int | None = None, any_dtype: bool = False, int8: bool = False
    ) -> None:
        self.path = path
        with storing("read", path):
            self._handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)
        self.size = os.fstat(self._handle).st_size
        if max_bytes is not None and self.size > max_bytes:
            raise AdapterFormatError(
                f"{path}: expected at most {max_bytes:,} bytes, got {self.size:,}", "Use a lower rank."
            )
        self._start, self._header = self._read_header(WIDTHS if any_dtype else _TORCH if int8 else DTYPES)
        self._hash, self._hashed = hashlib.sha256(), 0

    @property
    def names(self) -> list[str]:
        return sorted(self._header)

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def kind(self, name: str) -> str:
        """The dtype as the format calls it, such as ``BF16``."""
        return str(self._header[name]["dtype"])

    def dtype(self, name: str) -> torch.dtype:
        return _TORCH[self.kind(name)]

    def span(self, name: str) -> tuple[int, int]:
        """First byte of a tensor in the file, and the one after its last."""
        first, last = self._header[name]["data_offsets"]
        return self._start + first, self._start + last

    def tensor(self, name: str) -> Tensor:
        """One tensor, read."""
        first, last = self.span(name)
        return self._read(first, last).view(self.dtype(name)).reshape(self.shape(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start … stop`` of a matrix, read."""
        first, _ = self.span(name)
        width = self.shape(name)[1] * self.dtype(name).itemsize
        return self._read(first + start * width, first + stop * width).view(self.dtype(name)).reshape(stop - start, -1)

    def read_rows(self, name: str, start: int, into: Tensor) -> None:
        """Rows from `start` on of a matrix, read into a contiguous tensor of its dtype and width."""
        first, _ = self.span(name)
        width = self.shape(name)[1] * self.dtype(name).itemsize
        self._fill(into.view(torch.uint8).reshape(-1).numpy().data, first + start * width)

    def chunks(self, name: str, size: int = 1 << 24) -> Iterator[Tensor]:
        """The bytes of a tensor of any dtype, in parts."""
        first, last = self.span(name)
        for start in range(first, last, size):
            yield self._read(start, min(start + size, last))

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the system read these tensors from the disk while something else is computed."""
        if hasattr(os, "posix_fadvise"):
            for first, last in map(self.span, names):
                os.posix_fadvise(self._handle, first, last - first, os.POSIX_FADV_WILLNEED)

    def hash_behind(self, end: int) -> None:
        """Bring the file's hash up to byte `end`: soon after these bytes were read, they are still in memory.

        By one thread at a time; others may read.
        """
        buffer = memoryview(bytearray(min(_CHUNK, max(0, end - self._hashed))))
        while self._hashed < end:
            part = buffer[: min(len(buffer), end - self._hashed)]
            self._fill(part, self._hashed)
            self._hash.update(part)
            self._hashed += len(part)

    def sha256(self) -> str:
        """Of the whole file, in hexadecimal; what `hash_behind` has done is not done again."""
        self.hash_behind(self.size)
        return self._hash.hexdigest()

    def _read(self, first: int, last: int) -> Tensor:
        data = torch.empty(last - first, dtype=torch.uint8)
        self._fill(data.numpy().data, first)
        return data

    def _fill(self, buffer: memoryview, offset: int) -> None:
        done = 0
        with storing("read", self.path):
            while done < len(buffer):
                count = os.preadv(self._handle, [buffer[done:]], offset + done)
                if not count:
                    raise AdapterFormatError(f"{self.path} became shorter while it was read", _AGAIN)
                done += count

    def _read_header(self, dtypes: Iterable[str]) -> tuple[int, dict[str, dict[str, Any]]]:
        path, size = self.path, self.size
        length = int.from_bytes(self._bytes(0, 8), "little") if size >= 8 else 0
        if HEADER_LIMIT < length <= size - 8:
            raise AdapterFormatError(f"{path}: header of {length:,} bytes, at most {HEADER_LIMIT:,} are read", _AGAIN)
        if size < 10 or 8 + length > size:
            raise AdapterFormatError(f"{path} is truncated or not safetensors: {size:,} bytes are too few", _AGAIN)
        header = _parse(path, self._bytes(8, 8 + length), frozenset(dtypes))
        stored = size - 8 - length
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != stored:
            raise AdapterFormatError(
                f"{path} is truncated or damaged: expected {end:,} bytes of tensors, got {stored:,}", _AGAIN
            )
        _require_contiguous(path, header)
        return 8 + length, header

    def _bytes(self, first: int, last: int) -> bytes:
        data = bytearray(last - first)
        self._fill(memoryview(data), first)
        return bytes(data)


def _parse(path: Path, text: bytes, dtypes: frozenset[str]) -> dict[str, dict[str, Any]]:
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            _check_entry(path, name, entry, dtypes)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise AdapterFormatError(f"{path} is not safetensors: its header is malformed", _AGAIN) from None
    return dict(header)


def _check_entry(path: Path, name: str, entry: dict[str, Any], dtypes: frozenset[str]) -> None:
    if entry["dtype"] not in dtypes:
        raise AdapterFormatError(
            f"{path}: tensor {name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}",
            "Save the adapter in one of these.",
        )
    (first, last), shape = entry["data_offsets"], entry["shape"]
    # Bounded before anything is multiplied: a product of a million large numbers would never be done.
    if not isinstance(shape, list) or len(shape) > _MOST_AXES:
        raise ValueError(name)
    if not all(type(number) is int and 0 <= number < _BEYOND for number in (first, last, *shape)) or first > last:
        raise ValueError(name)


def _require_contiguous(path: Path, header: dict[str, dict[str, Any]]) -> None:
    """Every tensor is as long as its shape says and begins where the one before it ends."""
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != position or last - first != math.prod(entry["shape"]) * WIDTHS[entry["dtype"]]:
            raise AdapterFormatError(
                f"{path} is not a valid safetensors file: tensor {name} lies at bytes {first:,} to {last:,}, "
                f"which does not fit its shape and its neighbours",
                _AGAIN,
            )
        position = last
