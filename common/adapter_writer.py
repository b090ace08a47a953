"""A PEFT directory written one module at a time, so that an adapter of any size is made in the memory of a module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.adapter_file import CONFIG, MANIFEST, PREFIX, TENSORS, dtype_name
from seedbed.common.checks import is_finite, require_finite, require_finite_metrics
from seedbed.common.compression import INT8, Quantized
from seedbed.common.errors import AdapterFormatError, NonFiniteError
from seedbed.common.files import new_directory, write_file
from seedbed.common.manifest import BaseIdentity, Kind, Manifest
from seedbed.common.peft_config import CAUSAL, make_peft_config
from seedbed.common.tensor_writer import KINDS, TensorWriter
from seedbed.common.versions import software_versions


def file_order(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """The order of modules in a file: by name, wider dtypes first, so that every tensor begins at a multiple of its width."""
    return sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name))


@contextmanager
def new_adapter(
    directory: Path, modules: Sequence[str], expected: Mapping[str, LoraFactors] | None = None, *, int8: bool = False
) -> Iterator[AdapterWriter]:
    """A new PEFT directory to fill; it appears when the body ends and vanishes when it fails.

    Args:
        directory: must not exist.
        modules: names of all modules, in the order in which they will come (see `file_order`).
        expected: factors of the shapes and dtypes that will probably come (on the meta device, to take no memory): if
            they do, one pass over the file is saved.
        int8: factors are integers of 8 bits with their scales, all of which come in one `AdapterWriter.add_int8`.

    Raises:
        StorageError: if the directory is already there or the file system refuses.
        AdapterFormatError: if there are no modules.
    """
    if not modules:
        raise AdapterFormatError("the adapter has no modules, there is nothing to write")
    with (
        new_directory(directory) as aside,
        _int8_writer(aside / TENSORS, modules)
        if int8
        else _tensor_writer(aside / TENSORS, modules, expected) as tensors,
    ):
        yield AdapterWriter(aside, modules, tensors)


class AdapterWriter:
    """See `new_adapter`: `add` every module in order, then `finish`.

    Attributes:
        modules: names of all modules, in the order in which they must come.
    """

    def __init__(self, directory: Path, modules: Sequence[str], tensors: TensorWriter) -> None:
        self.modules = list(modules)
        self._directory = directory
        self._tensors = tensors
        self._shapes: dict[str, LoraFactors] = {}
        self._dtype = ""
        """Of the file, where it is not that of the shapes."""

    def add(self, module: str, factors: LoraFactors) -> None:
        """Write the next module's factors; they must not be changed afterwards.

        Raises:
            AdapterFormatError: if the module has rank 0.
            NonFiniteError: if it holds NaN or infinity.
        """
        if factors.rank == 0:
            raise AdapterFormatError(f"module {module} has rank 0, expected 1 or more")
        require_finite(module, factors)
        for key, tensor in zip(_keys(module), (factors.A, factors.B), strict=True):
            self._tensors.add(key, tensor)
        self._shapes[module] = factors.to(device="meta")

    def add_parts(
        self,
        module: str,
        *,
        shape: tuple[int, int],
        rank: int,
        dtype: torch.dtype,
        scaling: float,
        A: Iterable[Tensor],
        B: Iterable[Tensor],
    ) -> None:
        """`add` for factors that come in parts of rows, so that a module need not be held as a whole.

        Args:
            shape: ``(out, in)``.
            A: parts whose rows together are ``[rank, in]``, in `dtype`.
            B: parts whose rows together are ``[out, rank]``, in `dtype`.

        Raises:
            NonFiniteError: if a part holds NaN or infinity.
        """
        outputs, inputs = shape
        for key, size, parts in zip(_keys(module), ((rank, inputs), (outputs, rank)), (A, B), strict=True):
            self._tensors.add_parts(key, KINDS[dtype], size, _finite(key, parts))
        with torch.device("meta"):
            empty = torch.empty(rank, inputs, dtype=dtype), torch.empty(outputs, rank, dtype=dtype)
        self._shapes[module] = LoraFactors(*empty, scaling)

    def add_int8(self, modules: Mapping[str, tuple[Quantized, Quantized, float]]) -> None:
        """All modules at once, as quantized factors A and B with their scaling.

        Raises:
            NonFiniteError: if a scale is NaN or infinite.
        """
        for module, (A, B, _) in modules.items():
            for key, matrix in zip(_keys(module, "scale"), (A, B), strict=True):
                self._tensors.add_parts(key, "F32", matrix.scales.shape, _finite(key, [matrix.scales.contiguous()]))
        for module, (A, B, scaling) in modules.items():
            for key, matrix in zip(_keys(module, INT8), (A, B), strict=True):
                self._tensors.add_parts(key, "I8", matrix.values.shape, [matrix.values.contiguous()])
            wide = [matrix.values.to(device="meta", dtype=torch.float32) for matrix in (A, B)]
            self._shapes[module] = LoraFactors(wide[0], wide[1], scaling)
        self._dtype = INT8

    def finish(
        self,
        *,
        kind: Kind,
        base: BaseIdentity,
        parents: tuple[str, ...] = (),
        task: str | None = None,
        recipe: str = "",
        settings: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        versions: Mapping[str, str] | None = None,
        base_model_name_or_path: str | None = None,
        task_type: str | None = CAUSAL,
    ) -> Manifest:
        """Write configuration and manifest; arguments and result are those of `write_adapter`.

        Raises:
            NonFiniteError: if a metric is NaN or infinite.
        """
        require_finite_metrics(metrics or {})
        adapter = Adapter(self._shapes)
        path = base.name if base_model_name_or_path is None else base_model_name_or_path
        configuration = _json_bytes(make_peft_config(adapter, path, task_type))
        manifest = Manifest(
            kind=kind,
            base=base,
            tensors_sha256=self._tensors.finish(),
            config_sha256=hashlib.sha256(configuration).hexdigest(),
            rank=max(factors.rank for factors in adapter.values()),
            modules=len(adapter),
            dtype=self._dtype or dtype_name(factors.A.dtype for factors in adapter.values()),
            parents=tuple(parents),
            task=task,
            recipe=recipe,
            settings=dict(settings or {}),
            metrics=dict(metrics or {}),
            versions=dict(software_versions() if versions is None else versions),
        )
        for name, data in ((CONFIG, configuration), (MANIFEST, manifest.canonical())):
            write_file(self._directory / name, data)
        return manifest


def _finite(key: str, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    for part in parts:
        if not is_finite(part):
            raise NonFiniteError(
                f"{key} of the result is NaN or infinite", "Write it in a wider dtype, such as float32."
            )
        yield part


def _tensor_writer(path: Path, modules: Sequence[str], expected: Mapping[str, LoraFactors] | None) -> TensorWriter:
    names = {key: 2 for module in modules for key in _keys(module)}
    if expected is None:
        return TensorWriter(path, names)
    factors = {module: (expected[module].A, expected[module].B) for module in modules}
    layout = {
        key: (KINDS[tensor.dtype], tuple(tensor.shape))
        for module, tensors in factors.items()
        for key, tensor in zip(_keys(module), tensors, strict=True)
    }
    return TensorWriter(path, names, layout)


def _int8_writer(path: Path, modules: Sequence[str]) -> TensorWriter:
    """Scales come first, so that wider numbers stand before narrower ones."""
    return TensorWriter(path, {key: 2 for part in ("scale", INT8) for module in modules for key in _keys(module, part)})


def _keys(module: str, part: str = "weight") -> tuple[str, str]:
    return f"{PREFIX}{module}.lora_A.{part}", f"{PREFIX}{module}.lora_B.{part}"


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, sort_keys=False, indent=2, ensure_ascii=False) + "\n").encode()
