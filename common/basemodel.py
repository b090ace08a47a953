"""The frozen base model: where it lies, which one it is, and how it is loaded.

Only safetensors weights are read, never pickle. The identity of a base model is a hash of its architecture and tensors,
so that two copies in different folders, or in different shards, are the same model.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seedbed.common.config import BaseModelConfig
from seedbed.common.errors import ModelError, StorageError
from seedbed.common.files import atomic_write
from seedbed.common.manifest import BaseIdentity

#: Keys of a config.json that change without changing what the model computes.
_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "use_cache")
#: Version of `_digest`; what an older one computed is forgotten.
_HASHING = 1
_FETCH_HINT = "Run `seedbed model fetch smollm2` first."


def cache_dir() -> Path:
    """``$SEEDBED_CACHE``, else ``$XDG_CACHE_HOME/seedbed``, else ``~/.cache/seedbed``; not created here."""
    if own := os.environ.get("SEEDBED_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "seedbed"


def smollm2_directory() -> Path:
    """Where `seedbed.common.smollm2.fetch` puts the model."""
    return cache_dir() / "models" / "SmolLM2-135M-Instruct"


def device() -> torch.device:
    """The fastest device of this machine: cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_names() -> list[str]:
    """What this machine computes on, such as ``["NVIDIA A100 80GB", …]`` or ``["cpu (8 cores)"]``."""
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ["mps" if torch.backends.mps.is_available() else f"cpu ({len(os.sched_getaffinity(0))} cores)"]


def dtype_of(config: BaseModelConfig, target: torch.device) -> torch.dtype:
    """Of the frozen weights: as configured, where `auto` is bfloat16 on a GPU and float32 elsewhere."""
    if config.dtype == "auto":
        return torch.bfloat16 if target.type == "cuda" else torch.float32
    return torch.float32 if config.dtype == "float32" else torch.bfloat16


def resolve(config: BaseModelConfig) -> Path:
    """Find the directory of a base model, downloading it where it is an id of the hub.

    Raises:
        ModelError: if it is not there, cannot be reached, or holds no config.json.
    """
    if config.model == "embedded":
        from seedbed.common.embedded import MODEL_DIR

        return _checked(Path(MODEL_DIR), config.model)
    if config.model == "smollm2":
        if not (smollm2_directory() / "config.json").is_file():
            raise ModelError(f"the base model 'smollm2' is not in {smollm2_directory()}", _FETCH_HINT)
        return smollm2_directory()
    if Path(config.model).expanduser().is_dir():
        return _checked(Path(config.model).expanduser(), config.model)
    return _checked(_download(config.model, config.revision), config.model)


def _checked(directory: Path, name: str) -> Path:
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"the base model '{name}' has no config.json in {directory}", "Name a directory that transformers can load."
        )
    return directory


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen unrelated types: no network, no such id, no right
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"the base model '{model}'{at} is neither a directory here nor a reachable model of the hub "
            f"({type(error).__name__})",
            "Check the name and the network, or name a local directory, `embedded` or `smollm2`.",
        ) from None


def identify(directory: Path, name: str) -> BaseIdentity:
    """Hash a base model: SHA-256 over its architecture and, by name, every tensor's dtype, shape and bytes.

    Independent of the folder and of how the tensors are sharded. Remembered in the cache by each file's path, size and
    modification time, since tens of gigabytes take long to read.

    Raises:
        ModelError: if the directory holds no safetensors weights or a damaged file.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"the base model '{name}' has no *.safetensors in {directory}",
            "Convert it: pickled weights are never read.",
        )
    note = cache_dir() / "identities" / _fingerprint([directory / "config.json", *files])
    with contextlib.suppress(OSError):
        return BaseIdentity(name=name, digest=note.read_text(encoding="ascii"))
    digest = _digest(directory, files)
    with contextlib.suppress(StorageError):  # a cache that cannot be written costs time, not correctness
        atomic_write(note, digest.encode("ascii"))
    return BaseIdentity(name=name, digest=digest)


def _fingerprint(files: list[Path]) -> str:
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([_HASHING, stats]).encode()).hexdigest()


def _digest(directory: Path, files: list[Path]) -> str:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    architecture = {key: value for key, value in config.items() if key not in _VOLATILE and key[0] != "_"}
    total = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    where = {name: (file, entry) for file in files for name, entry in _tensors(file)}
    for name, (file, entry) in sorted(where.items()):
        total.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        with file.open("rb") as stream:
            stream.seek(entry["begin"])
            for chunk in _chunks(stream, entry["end"] - entry["begin"]):
                total.update(chunk)
    return total.hexdigest()


def _tensors(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name, dtype, shape and byte range of every tensor, from the safetensors header."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 100_000_000)))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                yield name, {"dtype": entry["dtype"], "shape": entry["shape"], "begin": begin, "end": end}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{file} is not a safetensors file", "Fetch the base model again.") from None


def _chunks(stream: Any, length: int, size: int = 1 << 24) -> Iterator[bytes]:
    while length > 0:
        chunk = stream.read(min(size, length))
        if not chunk:
            raise ModelError(f"{stream.name} is truncated: {length} bytes are missing", "Fetch the base model again.")
        length -= len(chunk)
        yield chunk


def load(config: BaseModelConfig, device: torch.device | str | None = None) -> tuple[nn.Module, Any]:
    """Load the frozen base model and its tokenizer.

    Args:
        device: where the weights go; none is the fastest device of this machine.

    Returns:
        the model, in evaluation mode and without gradients, and a tokenizer that has a padding token and pads on the
        right.

    Raises:
        ModelError: if it cannot be found or loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar of its own for every load would break into ours
    directory = resolve(config)
    target = torch.device(device) if device is not None else globals()["device"]()
    tokenizer = load_tokenizer(directory)
    options = {"dtype": dtype_of(config, target), **_quantized(config, target)}
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _unloadable(directory, error) from error
    if config.quantization == "none":
        model = model.to(target)  # what is quantized was loaded where it belongs
    else:
        _keep_layout(model)
    return model.eval().requires_grad_(False), tokenizer


def _quantized(config: BaseModelConfig, target: torch.device) -> dict[str, Any]:
    """What transformers must be told so that it quantizes the weights as it loads them."""
    if config.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization {config.quantization} of the base model needs bitsandbytes, which is not installed",
            "Run `pip install 'seedbed[qlora]'`, or leave base.quantization out.",
        )
    from transformers import BitsAndBytesConfig

    # The paper's setting: NormalFloat of 4 bits, whose scales are quantized once more; the head stays as it is.
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_of(config, target),
    )
    return {"quantization_config": settings, "device_map": {"": target}}


def _keep_layout(model: nn.Module) -> None:
    """On some CPUs bitsandbytes repacks a layer's weights in place when it first runs without gradients, for a kernel that
    fits only widths of whole blocks and from which no training goes on. Ours must do both in turn."""
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def load_tokenizer(directory: Path) -> Any:
    """Load a tokenizer that pads on the right; see `load`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(directory, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"
    return tokenizer


def _unloadable(directory: Path, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"the base model in {directory} cannot be loaded: {reason}", "Check the directory, or fetch the model again."
    )
