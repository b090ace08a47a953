"""How much memory a training job takes on each device, from the shape of the base model and of the job.

With P base parameters of b bytes, L trained (LoRA) parameters, N ranks, and per rank T tokens in one pass:

    base          P b                    cut N-fold by ZeRO 3; in host memory with offload_parameters
    adapter       4 L                    float32; cut N-fold by ZeRO 3
    gradients     4 L                    cut N-fold by ZeRO 2 and 3
    optimizer     8 L                    AdamW's two moments; cut N-fold by ZeRO 1, 2, 3; host memory with offload_optimizer
    activations   T c (9 h + 4 i) ℓ      what ℓ layers of width h (MLP i) keep for the backward pass in c bytes a number:
                                         norms, queries, keys, values, attention and its projection (9 h); gate, up, the
                                         gate's activation and their product (4 i). Attention scores are not kept (fused
                                         attention). After Korthikanti et al., *Reducing Activation Recomputation in Large
                                         Transformer Models*, 2022, for gated MLPs and frozen weights.
    logits        T V (c + 8)            in c bytes, in float32, and their gradient; at most, since only labels have logits
    overhead      1.2 GB on a GPU        CUDA context, kernels and fragmentation; 0.4 GB of libraries on a CPU

It is an estimate, right within a factor of about 1.5; what it is for is to tell a job that fits from one that cannot.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from seedbed.common.config import LoraSettings, TrainingSettings
from seedbed.common.errors import ModelError
from seedbed.common.targets import target_shapes

_GPU_OVERHEAD, _CPU_OVERHEAD = 1.2e9, 0.4e9
_NF4_BYTES = 0.57
"""A weight in 4 bits with its doubly quantized scales (0.516), and what is not quantized beside it."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a base model decides over memory."""

    parameters: int
    adapted: int
    """Parameters of a LoRA on it."""
    layers: int
    width: int
    mlp: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device; `host` in the memory of the machine, for one rank."""

    base: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    overhead: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        states = self.base + self.adapter + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.overhead


def model_shape(directory: Path, lora: LoraSettings) -> ModelShape:
    """Read a model's shape from its configuration; no weight is loaded.

    Raises:
        ModelError: if the configuration cannot be used, or the LoRA's targets do not fit.
    """
    try:
        shapes = target_shapes(directory, lora)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        mlp, vocabulary = int(config.get("intermediate_size", 4 * width)), int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the shape of the base model in {directory} is not known: {error}", "Memory is not checked."
        ) from None
    return ModelShape(
        parameters=_parameters(directory),
        adapted=sum(lora.rank * (rows + columns) for rows, columns in shapes.values()),
        layers=layers,
        width=width,
        mlp=mlp,
        vocabulary=vocabulary,
    )


def _parameters(directory: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def estimate(
    shape: ModelShape, training: TrainingSettings, *, bytes_each: int, ranks: int, gpu: bool, nf4: bool = False
) -> MemoryEstimate:
    """Memory of one rank; see the module's description.

    Args:
        bytes_each: of a number that the model computes with: 2 in bfloat16, 4 in float32.
        ranks: devices that share the job.
        gpu: whether the device is one.
        nf4: the base model's weights are held in 4 bits.
    """
    settings = training.deepspeed
    stage = settings.zero_stage if gpu or training.engine == "deepspeed" else 0
    tokens = math.ceil(training.batch_size / (training.accumulation * ranks)) * training.max_tokens
    base = shape.parameters * (_NF4_BYTES if nf4 else bytes_each) / (ranks if stage >= 3 else 1)
    optimizer = 8.0 * shape.adapted / (ranks if stage >= 1 else 1)
    to_host = base if settings.offload_parameters and stage >= 3 else 0.0
    optimizer_to_host = optimizer if settings.offload_optimizer and stage >= 1 else 0.0
    return MemoryEstimate(
        base=base - to_host,
        adapter=4.0 * shape.adapted / (ranks if stage >= 3 else 1),
        gradients=4.0 * shape.adapted / (ranks if stage >= 2 else 1),
        optimizer=optimizer - optimizer_to_host,
        activations=float(tokens * bytes_each * (9 * shape.width + 4 * shape.mlp) * shape.layers),
        logits=float(tokens * shape.vocabulary * (bytes_each + 8)),
        overhead=_GPU_OVERHEAD if gpu else _CPU_OVERHEAD,
        host=to_host + optimizer_to_host,
    )
