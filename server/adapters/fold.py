"""A merge folded into its base model: ``W + s B A`` in place of W, as a model directory that needs no PEFT.

Weights are streamed tensor by tensor and tile by tile, so a model of any size is folded in the memory of one module's
update. Each new weight is computed in float32 (float64 for a base in float64) and rounded once, to the base's dtype.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedbed.common import basemodel
from seedbed.common.adapter import LoraFactors
from seedbed.common.config import BaseModelConfig
from seedbed.common.errors import AdapterMismatchError, ModelError
from seedbed.common.files import new_directory, storing, write_file
from seedbed.common.storage import require_base
from seedbed.common.tensor_file import DTYPES, WIDTHS, TensorFile
from seedbed.common.tensor_writer import TensorWriter
from seedbed.common.versions import software_versions
from seedbed.server.adapters.files import Progress, require_absent
from seedbed.server.adapters.fold_target import Architecture, Target, architecture_of
from seedbed.server.adapters.plan import MergePlan

RECORD = "seedbed_fold.json"
INDEX = "model.safetensors.index.json"
_TILE = 1 << 24
"""Numbers of a weight that are computed at once."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


@dataclass(frozen=True)
class Folded:
    """What was made: number of changed weights, of all tensors, and bytes."""

    changed: int
    tensors: int
    bytes: int


def fold(plan: MergePlan, model: str, out: Path, *, progress: Progress | None = None) -> Folded:
    """Write a whole model directory: the base model with the merged update in its weights.

    Args:
        plan: the merge, of adapters of this base model.
        model: as in `basemodel.resolve`: `embedded`, `smollm2`, a directory, or an id of the hub.
        out: the directory to make.

    Raises:
        ModelError: if the base model cannot be found, is quantized, or has not the weights that its modules need.
        AdapterError: if the adapters do not fit it.
        StorageError: if `out` is already there or the file system refuses.
    """
    require_absent(out)
    directory = basemodel.resolve(BaseModelConfig(model=model))
    _require_same_model(plan, directory, model)
    architecture = architecture_of(directory)
    shards = _open_shards(directory)
    targets = {
        name: architecture.target(name, plan.holders(name)[0].shape(name), _tensors(shards)) for name in plan.names
    }
    with new_directory(out) as aside:
        digests = _write_shards(plan, shards, targets, aside, progress)
        parents = plan.digests()
        _copy_others(directory, aside, architecture, targets, shards)
        record = {
            "base": model,
            "parents": list(parents),
            "settings": plan.settings(),
            "sha256": digests,
            "versions": software_versions(),
        }
        write_file(aside / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    return Folded(len(targets), len(_tensors(shards)) + _untied(targets), sum(sizes))


def _require_same_model(plan: MergePlan, directory: Path, model: str) -> None:
    """By hash where the adapters carry one; else the modules' names and shapes, which are checked anyway, must do."""
    if plan.base.digest:
        found = basemodel.identify(directory, model)
        for file in plan.files:
            require_base(file.unverified, found, str(file.directory))


def _open_shards(directory: Path) -> dict[str, TensorFile]:
    """The files that hold the model's weights, as its index says if it has one."""
    if (directory / INDEX).is_file():
        with storing("read", directory / INDEX):
            names = sorted(set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(path.name for path in directory.glob("model*.safetensors"))
    if not names:
        raise ModelError(f"{directory} holds no model.safetensors", "Convert it: pickled weights are never read.")
    return {name: TensorFile(directory / name, any_dtype=True) for name in names}


def _tensors(shards: Mapping[str, TensorFile]) -> dict[str, tuple[int, ...]]:
    return {name: file.shape(name) for file in shards.values() for name in file.names}


def _write_shards(
    plan: MergePlan,
    shards: Mapping[str, TensorFile],
    targets: Mapping[str, Target],
    aside: Path,
    progress: Progress | None,
) -> dict[str, str]:
    """Stream every shard; the modules of one shard are merged in the order of its tensors.

    Returns:
        SHA-256 of every new shard.
    """
    digests = {}
    for shard, file in shards.items():
        work = _work(file, targets)
        updates = plan.modules([module for _, module in work.values() if module])
        layout = {name: (file.kind(source), file.shape(source)) for name, (source, _) in work.items()}
        with TensorWriter(aside / shard, {name: len(shape) for name, (_, shape) in layout.items()}, layout) as new:
            for name, (source, module) in work.items():
                kind, shape = layout[name]
                if not module:
                    new.add_parts(name, kind, shape, file.chunks(source))
                    continue
                _, update = next(updates)
                new.add_parts(name, kind, shape, _folded(file, source, update, targets[module].transposed))
                if progress is not None:
                    progress(module, len(targets))
            for _ in updates:  # none are left; but the last hashes are waited for
                raise AssertionError(shard)
            digests[shard] = new.finish()
    return digests


def _work(file: TensorFile, targets: Mapping[str, Target]) -> dict[str, tuple[str, str]]:
    """New tensor -> the tensor that it is made of and the module that is folded into it (or none), in file order."""
    module_of = {target.tensor: module for module, target in targets.items()}
    replaced = {target.tensor for target in targets.values() if target.tensor != target.source}
    work = {name: (name, module_of.get(name, "")) for name in file.names if name not in replaced}
    for module, target in targets.items():
        if target.source != target.tensor and target.source in file:
            work[target.tensor] = target.source, module
    for name, (_, module) in work.items():
        if module and file.kind(work[name][0]) not in DTYPES:
            raise ModelError(
                f"{file.path}: tensor {name} is quantized ({file.kind(work[name][0])})",
                "Fold into the original weights.",
            )
    return dict(sorted(work.items(), key=lambda item: (-WIDTHS[file.kind(item[1][0])], item[0])))


def _folded(file: TensorFile, name: str, update: LoraFactors, transposed: bool) -> Iterator[Tensor]:
    """``W + s B A`` in tiles of rows; of its transpose for a layer that stores it so."""
    wide = torch.promote_types(file.dtype(name), torch.promote_types(update.A.dtype, torch.float32))
    left, right = update.B.to(wide) * update.scaling, update.A.to(wide)
    if transposed:
        left, right = right.T, left.T
    rows, columns = file.shape(name)
    step = max(1, _TILE // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = file.rows(name, start, stop)
        total = torch.addmm(weight.to(wide), left[start:stop], right).to(weight.dtype)
        if not all(map(torch.isfinite, torch.aminmax(total))):
            raise AdapterMismatchError(
                f"tensor {name}: with the update it is not finite in {file.kind(name)}", "Is the update too large?"
            )
        yield total.contiguous()


def _copy_others(
    directory: Path,
    aside: Path,
    architecture: Architecture,
    targets: Mapping[str, Target],
    shards: Mapping[str, TensorFile],
) -> None:
    """Configuration, tokenizer, licence: everything but weights in any format, and the base's model card."""
    for path in sorted(directory.iterdir()):
        left_out = path.name.startswith(".") or path.name.endswith(_WEIGHTS) or path.name.lower() == "readme.md"
        if path.is_file() and not left_out:
            with storing("write", aside / path.name):
                shutil.copyfile(path, aside / path.name)
    if _untied(targets):
        write_file(aside / "config.json", _json({**architecture.config, "tie_word_embeddings": False}))
    if (directory / INDEX).is_file():
        write_file(aside / INDEX, _json(_index(directory, targets, shards)))


def _index(directory: Path, targets: Mapping[str, Target], shards: Mapping[str, TensorFile]) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    for target in targets.values():
        if target.tensor != target.source:
            shard = index["weight_map"][target.source]
            index["weight_map"][target.tensor] = shard
            first, last = shards[shard].span(target.source)
            if "total_size" in index.get("metadata", {}):
                index["metadata"]["total_size"] += last - first
    return index


def _untied(targets: Mapping[str, Target]) -> int:
    return sum(target.tensor != target.source for target in targets.values())


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
