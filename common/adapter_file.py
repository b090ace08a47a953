"""Reading of PEFT directories that may come from anyone: checked before anything is computed, one module at a time.

Beside PEFT's own tensors ``….lora_A.weight`` one form is Seedbed's: ``….lora_A.int8 [r, in]`` with ``….lora_A.scale [r, 1]``
and ``….lora_B.int8 [out, r]`` with ``….lora_B.scale [1, r]`` (see `compression`), which is expanded as it is read. PEFT does
not know it, and finds no tensors in it rather than wrong ones; `peft_format.expand_adapter` writes it out for PEFT.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, KeysView
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from seedbed.common.adapter import LoraFactors
from seedbed.common.checks import require_finite
from seedbed.common.compression import Quantized
from seedbed.common.errors import AdapterFormatError, AdapterMismatchError, NonFiniteError
from seedbed.common.files import storing
from seedbed.common.manifest import BaseIdentity, Manifest
from seedbed.common.peft_config import PeftConfig, parse_peft_config
from seedbed.common.tensor_file import TensorFile

TENSORS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "seedbed.json"
FILES = (TENSORS, CONFIG, MANIFEST)
PREFIX = "base_model.model."
_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.int8|(\.(?!weight$)[^.]+)?\.weight)$")
_FROZEN = re.compile(r"^(?P<module>.+)\.base_layer\.weight$")
_INT8, _SCALE = ".int8", ".scale"
_JSON_LIMIT = 20_000_000
_LONGEST_KEY = 200
_MOST_MATCHES = 20_000
"""Of patterns that are not plain names against modules."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class AdapterFile:
    """An adapter on disk, checked and open, whose modules are read one at a time.

    Args:
        directory: a PEFT directory, with or without ``seedbed.json``; if that is there, its hashes are verified.
        max_bytes: refuse a larger tensor file before reading it.
        verify_later: leave the tensors' hash until `manifest` is asked for, so that one pass over a large file does for
            reading and hashing. Whoever says so must ask before anything computed from the tensors is believed.

    Attributes:
        config: the contents of ``adapter_config.json``.
        claimed: the contents of ``seedbed.json``, or None; not verified where `verify_later`.

    Raises:
        AdapterFormatError: if the directory, a file or a tensor is missing, malformed, misshapen, or not plain LoRA.
        AdapterMismatchError: if the files are not those that the manifest vouches for.
        StorageError: if a file cannot be read.
    """

    def __init__(self, directory: Path, *, max_bytes: int | None = None, verify_later: bool = False) -> None:
        self.directory = directory
        _require_files(directory)
        self.config = _read_json(directory / CONFIG)
        self._peft: PeftConfig = parse_peft_config(self.config, str(directory / CONFIG))
        self._tensors = TensorFile(directory / TENSORS, max_bytes=max_bytes, int8=True)
        self._keys = _pair_keys(self._tensors)
        if self._peft.costly * len(self._keys) > _MOST_MATCHES:
            raise AdapterFormatError(
                f"{directory}: {self._peft.costly} patterns with repeats or alternatives for {len(self._keys)} modules",
                f"Name the modules one by one in {CONFIG}.",
            )
        for module in self._keys:
            self._check_shapes(module)
        self._scales = _scale_keys(self._tensors, self._keys)
        self.claimed = read_manifest(directory) if (directory / MANIFEST).exists() else None
        self._found = self._facts()
        self._require_claimed("config_sha256", "rank", "modules", "dtype")
        if not verify_later:
            _ = self.manifest

    @cached_property
    def manifest(self) -> Manifest:
        """That of the directory, verified, or one of kind `external` made from what was found.

        Raises:
            AdapterMismatchError: if the tensors are not those that the directory's manifest vouches for.
        """
        self._found = self._found.model_copy(update={"tensors_sha256": self._tensors.sha256()})
        self._require_claimed("tensors_sha256")
        return self.claimed or self._found

    @property
    def unverified(self) -> Manifest:
        """What is known before all tensors are read: base model, rank, lineage; the tensors' hash is only claimed."""
        return self.claimed or self._found

    @property
    def task_type(self) -> str | None:
        """PEFT's, as the configuration has it."""
        found = self.config.get("task_type")
        return found if isinstance(found, str) else None

    @property
    def names(self) -> KeysView[str]:
        """Names of the adapted modules, sorted."""
        return self._keys.keys()

    def rank(self, module: str) -> int:
        return self._tensors.shape(self._keys[module]["A"])[0]

    def shape(self, module: str) -> tuple[int, int]:
        """``(out, in)`` of the module."""
        return self._tensors.shape(self._keys[module]["B"])[0], self._tensors.shape(self._keys[module]["A"])[1]

    def dtype(self, module: str) -> torch.dtype:
        """Of the module's factors as `factors` gives them."""
        return torch.promote_types(self.factor_dtype(module, "A"), self.factor_dtype(module, "B"))

    def scaling(self, module: str) -> float:
        return self._peft.scaling_of(module)

    def factors(self, module: str) -> LoraFactors:
        """One module's factors, read from the file.

        Raises:
            NonFiniteError: if they hold NaN or infinity.
        """
        dtype = self.dtype(module)
        A, B = (self._expanded(self._keys[module][factor]).to(dtype) for factor in "AB")
        factors = LoraFactors(A, B, self.scaling(module))
        try:
            require_finite(module, factors)
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.directory}: {error.message}", error.hint) from None
        return factors

    def read_part(self, module: str, factor: Literal["A", "B"], start: int, into: Tensor) -> None:
        """Rows from `start` on of one factor, unchecked, into a contiguous tensor of `factor_dtype` and the factor's width."""
        key = self._keys[module][factor]
        if key not in self._scales:
            return self._tensors.read_rows(key, start, into)
        stop = start + into.shape[0]
        scales = self._tensors.tensor(self._scales[key])
        part = scales[start:stop] if factor == "A" else scales
        into.copy_(self._tensors.rows(key, start, stop).to(into.dtype) * part)

    def factor_dtype(self, module: str, factor: Literal["A", "B"]) -> torch.dtype:
        """Of a factor as it is read: integers are expanded to float32."""
        dtype = self._tensors.dtype(self._keys[module][factor])
        return torch.float32 if dtype == torch.int8 else dtype

    def _expanded(self, key: str) -> Tensor:
        tensor = self._tensors.tensor(key)
        if key not in self._scales:
            return tensor
        return Quantized(tensor, self._tensors.tensor(self._scales[key])).expanded()

    def prefetch(self, module: str) -> None:
        """Have the system read a module from the disk while something else is computed."""
        self._tensors.prefetch(self._keys[module].values())

    def hash_behind(self, module: str) -> None:
        """Hash the file as far as this module, which was just read; by one thread at a time."""
        self._tensors.hash_behind(max(self._tensors.span(key)[1] for key in self._keys[module].values()))

    def _check_shapes(self, module: str) -> None:
        a, b = (self._tensors.shape(self._keys[module][factor]) for factor in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not all((*a, *b)):
            raise AdapterFormatError(
                f"{self.directory}: module {module}: expected lora_A [r, in] and lora_B [out, r], "
                f"got {list(a)} and {list(b)}",
                "Seedbed reads LoRA of linear layers.",
            )
        rank = self._peft.rank_of(module)
        if a[0] != rank:
            raise AdapterFormatError(
                f"{self.directory}: module {module} has rank {a[0]}, expected {rank} from {CONFIG}",
                "The scaling would be wrong: restore the configuration that belongs to these tensors.",
            )

    def _facts(self) -> Manifest:
        """What can be said of the files before all tensors are read."""
        return Manifest(
            kind="external",
            base=BaseIdentity(name=self._peft.base_name),
            tensors_sha256="",
            config_sha256=_sha256(self.directory / CONFIG),
            rank=max(self.rank(module) for module in self._keys),
            modules=len(self._keys),
            dtype=dtype_name(self._tensors.dtype(key) for pair in self._keys.values() for key in pair.values()),
        )

    def _require_claimed(self, *fields: str) -> None:
        for field in fields:
            claimed, found = getattr(self.claimed, field, None), getattr(self._found, field)
            if self.claimed is not None and claimed != found:
                raise AdapterMismatchError(
                    f"{self.directory}: expected {field} {claimed} from {MANIFEST}, got {found}",
                    "The files were changed after they were written; fetch or make the adapter again.",
                )


def read_manifest(directory: Path) -> Manifest:
    """Read ``seedbed.json`` alone, without a look at the tensors.

    Raises:
        AdapterFormatError: if it is missing, malformed, or not byte for byte as Seedbed writes it.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise AdapterFormatError(f"{directory} has no {MANIFEST}", "Only adapters that Seedbed wrote have one.")
    with storing("read", path), path.open("rb") as file:
        text = file.read(_JSON_LIMIT + 1)
    if len(text) > _JSON_LIMIT:
        raise AdapterFormatError(f"{path} is larger than {_JSON_LIMIT:,} bytes", "Make the adapter again.")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        reason = error.errors()[0]
        where = ".".join(str(part) for part in reason["loc"])
        raise AdapterFormatError(
            f"{path} is not a manifest: {where} {reason['msg']}", "Make the adapter again."
        ) from None
    if manifest.canonical() != text:
        raise AdapterFormatError(f"{path} is not as Seedbed writes it", "It was edited; restore it or make it again.")
    return manifest


def dtype_name(dtypes: Iterable[torch.dtype]) -> str:
    """The dtypes that occur, such as `float32`, or `bfloat16,float32`."""
    return ",".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def _require_files(directory: Path) -> None:
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise AdapterFormatError(f"{directory} {what}", f"Give a PEFT directory, one that holds {TENSORS}.")
    present = {entry.name for entry in directory.iterdir()}
    for name in FILES:
        if name in present and not (directory / name).is_file():  # a pipe would be read for ever
            raise AdapterFormatError(f"{directory / name} is not a regular file", "Save the adapter again.")
    if TENSORS not in present:
        pickles = sorted(name for name in present if name.lower().endswith(_PICKLES))
        if pickles:
            raise AdapterFormatError(
                f"{directory / pickles[0]} is a pickle, which can run code when loaded: never read",
                "Save the adapter as safetensors: model.save_pretrained(directory, safe_serialization=True).",
            )
        if "router.safetensors" in present:
            raise AdapterFormatError(
                f"{directory} is a mixture of experts or a router, expected one adapter",
                f"Give the adapters of a mixture one by one: {directory / 'experts'}/*.",
            )
        raise AdapterFormatError(f"{directory} has no {TENSORS}", "Give a PEFT directory.")
    if CONFIG not in present:
        raise AdapterFormatError(f"{directory} has no {CONFIG}", "Without it the scaling is unknown; restore it.")


def _pair_keys(tensors: TensorFile) -> dict[str, dict[str, str]]:
    """``module -> {"A": key, "B": key}``, sorted by module; every tensor must be of a pair, or of its frozen module."""
    pairs: dict[str, dict[str, str]] = {}
    for key in tensors.names:
        if key.endswith(_SCALE) and f"{key.removesuffix(_SCALE)}{_INT8}" in tensors:
            continue  # see `_scale_keys`
        frozen = _FROZEN.match(key)
        if frozen is not None and f"{frozen['module']}.lora_A.weight" in tensors:
            continue  # PEFT puts the frozen weight of an adapted output head beside its factors
        match = _KEY.match(key)
        if match is None:
            raise AdapterFormatError(
                f"{tensors.path}: tensor {key} is not a LoRA factor of a linear layer",
                "Seedbed reads plain LoRA: no embeddings, biases, DoRA magnitudes or whole modules.",
            )
        if len(key) > _LONGEST_KEY:  # patterns are matched against it
            raise AdapterFormatError(f"{tensors.path}: a tensor's name has {len(key):,} characters", "Rename it.")
        pair = pairs.setdefault(match["module"].removeprefix(PREFIX), {})
        if match["factor"] in pair:
            raise AdapterFormatError(f"{tensors.path}: {pair[match['factor']]} and {key} are one factor, held twice")
        pair[match["factor"]] = key
    for module, pair in pairs.items():
        for factor in "AB":
            if factor not in pair:
                raise AdapterFormatError(f"{tensors.path}: module {module} has no lora_{factor}", "Save it again.")
    if not pairs:
        raise AdapterFormatError(f"{tensors.path} holds no LoRA factors", "Is it an adapter?")
    return dict(sorted(pairs.items()))


def _scale_keys(tensors: TensorFile, pairs: dict[str, dict[str, str]]) -> dict[str, str]:
    """The key of the scales of every factor that is held in integers of 8 bits, checked."""
    found = {}
    for factor, key in ((factor, key) for pair in pairs.values() for factor, key in pair.items()):
        whole = tensors.dtype(key) == torch.int8
        if whole != key.endswith(_INT8):
            raise AdapterFormatError(
                f"{tensors.path}: tensor {key} has dtype {tensors.kind(key)}", "Seedbed reads int8 as it writes it."
            )
        if not whole:
            continue
        scale = f"{key.removesuffix(_INT8)}{_SCALE}"
        shape = tensors.shape(key)
        expected = (shape[0], 1) if factor == "A" else (1, shape[-1])
        if scale not in tensors or tensors.kind(scale) != "F32" or tensors.shape(scale) != expected:
            raise AdapterFormatError(
                f"{tensors.path}: {key} needs {scale} of dtype F32 and shape {list(expected)}",
                "Fetch or make it again.",
            )
        found[key] = scale
    return found


def _read_json(path: Path) -> dict[str, Any]:
    with storing("read", path), path.open("rb") as file:
        text = file.read(_JSON_LIMIT + 1)
    if len(text) > _JSON_LIMIT:
        raise AdapterFormatError(f"{path} is larger than {_JSON_LIMIT:,} bytes", "Is it an adapter's configuration?")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise AdapterFormatError(f"{path} is not valid JSON", "Restore it or save the adapter again.") from None
    if not isinstance(values, dict):
        raise AdapterFormatError(f"{path} does not hold a mapping", "Restore it or save the adapter again.")
    return values


def _sha256(path: Path) -> str:
    with storing("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
