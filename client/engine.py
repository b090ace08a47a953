"""Two engines that carry out one optimizer step: plain torch, and DeepSpeed.

Both minimize the same thing: the cross-entropy summed over all passes and ranks of a step, divided by the number of
labels in the step. So one big batch, many small passes and many ranks give the same factors up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from seedbed.client.data import Batch
from seedbed.client.lora import extract
from seedbed.client.objective import is_same, label_losses
from seedbed.common.adapter import Adapter
from seedbed.common.config import DeepSpeedSettings, TrainingSettings


class Engine(Protocol):
    """Carries out optimizer steps; one object for each rank."""

    rank: int
    ranks: int

    def step(self, passes: Sequence[Batch], labels: int, learning_rate: float) -> float:
        """One optimizer step.

        Args:
            passes: this rank's part of the step, one batch for each forward pass.
            labels: number of labels in the whole step, over all ranks.

        Returns:
            the mean loss of a label over the whole step, before the update; the same on every rank.
        """
        ...

    def same(self, one: Batch, other: Batch) -> bool:
        """Whether the model gives two layouts of the same examples the same losses; every rank must call it."""
        ...

    def adapter(self) -> Adapter:
        """The factors as they are now; every rank must call it."""
        ...

    def close(self) -> None:
        """Let go of what binds the ranks together."""
        ...


class TorchEngine:
    """AdamW on one device."""

    rank, ranks = 0, 1

    def __init__(self, peft_model: Any, training: TrainingSettings, device: torch.device) -> None:
        self._model = peft_model
        self._head = peft_model.get_output_embeddings()
        self._device = device
        self._clip = training.clip_norm
        self._parameters = _trainable(peft_model)
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=training.learning_rate, weight_decay=training.weight_decay
        )

    def step(self, passes: Sequence[Batch], labels: int, learning_rate: float) -> float:
        total = 0.0
        for batch in passes:
            loss = label_losses(self._model, self._head, batch.to(self._device)).sum() / labels
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        _set_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def same(self, one: Batch, other: Batch) -> bool:
        return _same(self._model, self._head, self._device, one, other)

    def adapter(self) -> Adapter:
        return extract(self._model)

    def close(self) -> None:
        pass


class DeepSpeedEngine:
    """AdamW under DeepSpeed: ZeRO, offload and several ranks.

    The frozen weights keep their own dtype and the factors stay float32, so DeepSpeed's bf16 mode, which casts every
    parameter, is not used: a bfloat16 base model on GPUs costs no more than with it.
    """

    def __init__(self, peft_model: Any, training: TrainingSettings, device: torch.device) -> None:
        import deepspeed

        start_ranks(device)
        self.rank, self.ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        self._head = peft_model.get_output_embeddings()
        self._device = device
        self._model = peft_model
        self._passes = training.accumulation
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=peft_model, model_parameters=_trainable(peft_model), config=deepspeed_config(training, self.ranks)
        )

    def step(self, passes: Sequence[Batch], labels: int, learning_rate: float) -> float:
        _set_rate(self._optimizer, learning_rate)
        total = torch.zeros((), device=self._device)
        for batch in passes:
            loss = label_losses(self._engine, self._head, batch.to(self._device)).sum() / labels
            total += loss.detach()
            # DeepSpeed takes the mean over ranks and passes; we want the sum.
            self._engine.backward(loss * (self.ranks * self._passes))
            self._engine.step()
        if self.ranks > 1:
            torch.distributed.all_reduce(total)
        return float(total)

    def same(self, one: Batch, other: Batch) -> bool:
        return _same(self._engine, self._head, self._device, one, other)

    def adapter(self) -> Adapter:
        import deepspeed

        # Under ZeRO 3 every rank holds a slice of each factor.
        with deepspeed.zero.GatheredParameters(_trainable(self._model)):
            return extract(self._model)

    def close(self) -> None:
        self._engine.destroy()
        torch.distributed.destroy_process_group()


def deepspeed_config(training: TrainingSettings, ranks: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for a training job."""
    own: DeepSpeedSettings = training.deepspeed
    zero: dict[str, Any] = {"stage": own.zero_stage}
    if own.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if own.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    passes = training.accumulation * ranks
    return {
        "train_micro_batch_size_per_gpu": -(-training.batch_size // passes),
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": training.clip_norm,
        "zero_optimization": zero,
        # LoRA's optimizer state is small: torch's AdamW needs no compiler on the machine and loses no time.
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.learning_rate,
                "weight_decay": training.weight_decay,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "torch_adam": True,
            },
        },
        "steps_per_print": 1 << 30,
    }


@contextmanager
def sharded_loading(training: TrainingSettings, ranks: int, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within the body, transformers loads a model straight into the slices of ZeRO 3, so that it never has to fit whole
    into one device; under the other stages nothing is changed."""
    if training.deepspeed.zero_stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    start_ranks(device)
    # Only here: it decides the dtype of the slices. The engine itself must not cast, see `DeepSpeedEngine`.
    precision = {"bf16": {"enabled": dtype == torch.bfloat16}}
    held = HfDeepSpeedConfig({**deepspeed_config(training, ranks), **precision})  # in force as long as it lives
    try:
        yield
    finally:
        del held


def start_ranks(device: torch.device) -> None:
    """Join the other ranks, as the environment variables of a launcher say; alone where there are none."""
    import deepspeed

    if deepspeed.comm.is_initialized():
        return
    if device.type == "cpu":
        # Its shared-memory collectives take a compiler and over a minute to build; gloo is enough for LoRA's gradients.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def _same(model: nn.Module, head: nn.Module | None, device: torch.device, one: Batch, other: Batch) -> bool:
    model.eval()  # dropout would make any two passes differ
    try:
        return is_same(model, head, one.to(device), other.to(device))
    finally:
        model.train()


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
