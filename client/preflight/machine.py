"""Checks of the machine: devices, their memory against the job, disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from seedbed.client.preflight.estimate import MemoryEstimate, ModelShape, estimate
from seedbed.client.preflight.report import Check
from seedbed.common.config import BaseModelConfig, TrainingSettings

_COMFORT = 0.85
"""Share of the free memory that an estimate may take before it is worth a warning."""
_KEPT_COPIES = 12
"""Adapters of one size that a participant's directory comes to hold: seed, expert, checkpoints with their moments, gates."""
_SPARE_BYTES = 500e6


@dataclass(frozen=True, slots=True)
class Devices:
    """What trains here."""

    names: tuple[str, ...]
    free: tuple[int, ...]
    """Bytes of each."""
    gpu: bool


def devices(gpus: Sequence[str] | None) -> tuple[Devices, Check]:
    """The GPUs that this participant may use, or the CPU where there is none.

    Args:
        gpus: indices or UUIDs; none is all that there are, an empty one is the CPU.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 or (gpus is not None and not gpus):
        return _cpu(gpus)
    missing = [gpu for gpu in gpus or () if gpu.isdigit() and int(gpu) >= count]
    chosen = [int(gpu) for gpu in gpus or () if gpu.isdigit() and int(gpu) < count] or list(range(count))
    names = tuple(torch.cuda.get_device_name(index) for index in chosen)
    free = tuple(int(torch.cuda.mem_get_info(index)[0]) for index in chosen)
    found = Devices(names, free, gpu=True)
    if missing:
        remedy = f"Name those that are there: 0 to {count - 1}."
        return found, Check("devices", "fail", f"there is no GPU {', '.join(missing)}, only {count}", remedy)
    return found, Check("devices", "ok", f"{', '.join(names)} (CUDA {torch.version.cuda})")


def _cpu(gpus: Sequence[str] | None) -> tuple[Devices, Check]:
    cores, free = len(psutil.Process().cpu_affinity() or [0]), psutil.virtual_memory().available
    found = Devices((f"cpu ({cores} cores)",), (free,), gpu=False)
    if gpus:
        remedy = "Check the driver (nvidia-smi) and that this build of torch has CUDA, or leave --gpus out."
        return found, Check("devices", "fail", f"GPU {', '.join(gpus)} is wanted, torch sees none", remedy)
    if gpus is not None:
        return found, Check("devices", "ok", f"{found.names[0]}, as wanted")
    remedy = "Nothing, if that is meant: a CPU trains small models in minutes and large ones in days."
    return found, Check("devices", "warn", f"no GPU: training runs on the CPU ({cores} cores)", remedy)


def memory(
    shape: ModelShape, training: TrainingSettings, base: BaseModelConfig, found: Devices, *, known: bool
) -> Check:
    """A training job's estimate against what is free on the smallest device.

    Args:
        known: whether `training` is the federation's own; otherwise it is the default and the check says so.
    """
    import torch

    from seedbed.common.basemodel import dtype_of

    dtype = dtype_of(base, torch.device("cuda" if found.gpu else "cpu"))
    wanted = training.deepspeed.processes
    ranks = min(len(found.names), wanted if isinstance(wanted, int) else len(found.names)) if found.gpu else 1
    needed = estimate(
        shape,
        training,
        bytes_each=dtype.itemsize,
        ranks=ranks,
        gpu=found.gpu,
        nf4=base.quantization == "nf4",
    )
    return _compare(needed, min(found.free), training, known=known)


def _compare(needed: MemoryEstimate, free: int, training: TrainingSettings, *, known: bool) -> Check:
    job = f"{training.batch_size} × {training.max_tokens} tokens{'' if known else ' assumed'}"
    found = (
        f"a job takes about {_size(needed.total)} (base {_size(needed.base)}, activations "
        f"{_size(needed.activations + needed.logits)}, {job}), {_size(free)} is free"
    )
    remedy = (
        "Free memory, or have the coordinator lower training.max_tokens, raise accumulation, or use ZeRO 3 and offload."
    )
    if needed.base + needed.adapter > free or (known and needed.total > 1.5 * free):
        return Check("memory", "fail", found, remedy)
    return Check("memory", "warn", found, remedy) if needed.total > _COMFORT * free else Check("memory", "ok", found)


def disk(root: Path, shape: ModelShape | None) -> Check:
    """Room for adapters, checkpoints and logs in the participant's directory, which need not be there yet."""
    there = root
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Check("disk", "fail", f"{there}: {error.strerror or error}", "Choose another --work directory.")
    needed = _SPARE_BYTES + _KEPT_COPIES * 4.0 * (shape.adapted if shape is not None else 0)
    found = f"{_size(free)} free in {there}, about {_size(needed)} needed"
    if free < needed:
        return Check("disk", "fail", found, "Free some space, or choose another --work directory.")
    return Check("disk", "ok", found)


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
