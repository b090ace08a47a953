"""Reading of safetensors files that may come from anyone: nothing is allocated before the header has been checked.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length, the header in JSON, and
the tensors' bytes without gaps. Pickle is never read: loading it runs code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedbed.common.errors import AdapterFormatError
from seedbed.common.files import storing

HEADER_LIMIT = 100_000_000
"""Bytes of header at most, as in the reference implementation."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AGAIN = "Copy or write the file again."


class TensorFile:
    """An open safetensors file: names and shapes at once, tensors when asked for, from a memory map.

    Args:
        path: the file.
        max_bytes: refuse a larger file before reading it.

    Raises:
        AdapterFormatError: if it is truncated, malformed, too large, or holds other than floating-point numbers.
        StorageError: if it cannot be read.
    """

    def __init__(self, path: Path, *, max_bytes: int | None = None) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        self._header = _read_header(path, max_bytes)
        try:
            self._file: Any = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise AdapterFormatError(f"{path} is not a valid safetensors file: {error}", _AGAIN) from None

    @property
    def names(self) -> list[str]:
        return sorted(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._header[name]["dtype"]]

    def tensor(self, name: str) -> Tensor:
        """A view of the memory map, valid as long as the tensor lives; its pages are read when they are touched."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def _read_header(path: Path, max_bytes: int | None) -> dict[str, dict[str, Any]]:
    with storing("read", path), path.open("rb") as file:
        size = path.stat().st_size
        if max_bytes is not None and size > max_bytes:
            raise AdapterFormatError(f"{path}: expected at most {max_bytes:,} bytes, got {size:,}", "Use a lower rank.")
        length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
        if HEADER_LIMIT < length <= size - 8:
            raise AdapterFormatError(f"{path}: header of {length:,} bytes, at most {HEADER_LIMIT:,} are read", _AGAIN)
        if size < 10 or 8 + length > size:
            raise AdapterFormatError(f"{path} is truncated or not safetensors: {size:,} bytes are too few", _AGAIN)
        header = _parse(path, file.read(length))
    stored = size - 8 - length
    ends = [entry["data_offsets"][1] for entry in header.values()]
    if max(ends, default=0) != stored:
        raise AdapterFormatError(
            f"{path} is truncated or damaged: expected {max(ends, default=0):,} bytes of tensors, got {stored:,}",
            _AGAIN,
        )
    return header


def _parse(path: Path, text: bytes) -> dict[str, dict[str, Any]]:
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            _check_entry(path, name, entry)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise AdapterFormatError(f"{path} is not safetensors: its header is malformed", _AGAIN) from None
    return dict(header)


def _check_entry(path: Path, name: str, entry: dict[str, Any]) -> None:
    if entry["dtype"] not in _DTYPES:
        raise AdapterFormatError(
            f"{path}: tensor {name} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}",
            "Seedbed reads unquantized adapters.",
        )
    first, last = entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (first, last, *entry["shape"])) or first > last:
        raise ValueError(name)
