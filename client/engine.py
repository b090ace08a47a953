"""Two engines that carry out one optimizer step: plain torch, and DeepSpeed.

Both minimize the same thing: an `Objective`, summed over all passes and ranks of a step and divided by the number of tokens
in the step. So one big batch, many small passes and many ranks give the same result up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from seedbed.client.data import Batch
from seedbed.client.objective import TERMS, Objective, Pass, Totals, is_same, summed
from seedbed.common.config import DeepSpeedSettings, TrainingSettings


class Engine(Protocol):
    """Carries out optimizer steps; one object for each rank."""

    rank: int
    ranks: int

    def step(self, passes: Sequence[Pass], totals: Totals, learning_rate: float) -> dict[str, float]:
        """One optimizer step.

        Args:
            passes: this rank's part of the step.
            totals: numbers of predicted tokens in the whole step, over all ranks.

        Returns:
            the terms of the objective over the whole step, before the update, and their weighted sum as `loss`; the same
            on every rank.
        """
        ...

    def same(self, one: Batch, other: Batch) -> bool:
        """Whether the model gives two layouts of the same examples the same losses; every rank must call it."""
        ...

    def result(self) -> Any:
        """What has been trained, as it is now; every rank must call it."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, on the CPU, for `restore` and `Trainee.load`: whole on the first rank,
        empty on the others; every rank must call it."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a `state` of as many ranks; the parameters in it must have been loaded before the engine was made."""
        ...

    def first_says(self, answer: bool) -> bool:
        """The first rank's answer, on every rank; every rank must call it."""
        ...

    def close(self) -> None:
        """Let go of what binds the ranks together."""
        ...


class TorchEngine:
    """AdamW on one device."""

    rank, ranks = 0, 1

    def __init__(self, objective: Objective, training: TrainingSettings, device: torch.device) -> None:
        self._objective = objective
        self._trainee = objective.trainee
        self._device = device
        self._clip = training.clip_norm
        self._parameters = self._trainee.parameters
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=training.learning_rate, weight_decay=training.weight_decay
        )

    def step(self, passes: Sequence[Pass], totals: Totals, learning_rate: float) -> dict[str, float]:
        found = []
        for one in passes:
            terms = self._objective.terms(self._trainee.model, one.to(self._device), totals)
            self._objective.total(terms).backward()  # type: ignore[no-untyped-call]
            found.append({name: float(value.detach()) for name, value in terms.items()})
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        _set_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return summed(self._objective, found)

    def same(self, one: Batch, other: Batch) -> bool:
        return _same(self._trainee.model, self._trainee.head, self._device, one, other)

    def result(self) -> Any:
        return self._trainee.result()

    def state(self) -> dict[str, Tensor]:
        own = _own_state(self._optimizer, self._parameters, self._device)
        return {**self._trainee.state(), **_of_rank(0, own)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        _restore_own(self._optimizer, self._parameters, self._device, tensors, 0)

    def first_says(self, answer: bool) -> bool:
        return answer

    def close(self) -> None:
        pass


class DeepSpeedEngine:
    """AdamW under DeepSpeed: ZeRO, offload and several ranks.

    The frozen weights keep their own dtype and the factors stay float32, so DeepSpeed's bf16 mode, which casts every
    parameter, is not used: a bfloat16 base model on GPUs costs no more than with it.
    """

    def __init__(self, objective: Objective, training: TrainingSettings, device: torch.device) -> None:
        import deepspeed

        start_ranks(device)
        self.rank, self.ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        self._objective = objective
        self._trainee = objective.trainee
        self._device = device
        self._passes = training.accumulation * (2 if objective.tuned else 1)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self._trainee.model,
            model_parameters=self._trainee.parameters,
            config=deepspeed_config(training, self.ranks, tuned=objective.tuned),
        )

    def step(self, passes: Sequence[Pass], totals: Totals, learning_rate: float) -> dict[str, float]:
        _set_rate(self._optimizer, learning_rate)
        found = []
        for one in passes:
            terms = self._objective.terms(self._engine, one.to(self._device), totals)
            # DeepSpeed takes the mean over ranks and passes; we want the sum.
            self._engine.backward(self._objective.total(terms) * (self.ranks * self._passes))
            self._engine.step()
            found.append({name: value.detach() for name, value in terms.items()})
        return summed(self._objective, self._over_ranks(found))

    def _over_ranks(self, found: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, float]]:
        names = [name for name in TERMS if any(name in terms for terms in found)]
        zero = torch.zeros((), device=self._device)
        sums = torch.stack([torch.stack([terms.get(name, zero) for terms in found]).sum() for name in names])
        if self.ranks > 1:
            torch.distributed.all_reduce(sums)
        return [dict(zip(names, sums.tolist(), strict=True))]

    def same(self, one: Batch, other: Batch) -> bool:
        return _same(self._engine, self._trainee.head, self._device, one, other)

    def result(self) -> Any:
        import deepspeed

        # Under ZeRO 3 every rank holds a slice of each parameter.
        with deepspeed.zero.GatheredParameters(self._trainee.parameters):
            return self._trainee.result()

    def state(self) -> dict[str, Tensor]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(self._trainee.parameters):
            found = self._trainee.state() if self.rank == 0 else {}
        own = _own_state(self._inner, self._stepped, self._device)
        for name, tensor in own.items():
            for rank, share in enumerate(self._gathered(tensor)):
                found.update(_of_rank(rank, {name: share}))
        return found if self.rank == 0 else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        _restore_own(self._inner, self._stepped, self._device, tensors, self.rank)

    def first_says(self, answer: bool) -> bool:
        if self.ranks == 1:
            return answer
        told = torch.tensor(int(answer), device=self._device)
        torch.distributed.broadcast(told, 0)
        return bool(told)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """torch's AdamW inside DeepSpeed's optimizer."""
        inner: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        return inner

    @property
    def _stepped(self) -> Sequence[Tensor]:
        """The tensors that AdamW steps on this rank, always in one order: under ZeRO its share of all parameters."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # stage 3; stages 1 and 2
            if hasattr(self._optimizer, name):
                return list(getattr(self._optimizer, name))
        return self._trainee.parameters

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of every rank, all of one size, on the CPU."""
        if self.ranks == 1:
            return [tensor]
        own = tensor.to(self._device)
        shares = [torch.empty_like(own) for _ in range(self.ranks)]
        torch.distributed.all_gather(shares, own)
        return [share.cpu() for share in shares]

    def close(self) -> None:
        self._engine.destroy()
        torch.distributed.destroy_process_group()


def deepspeed_config(training: TrainingSettings, ranks: int, *, tuned: bool = False) -> dict[str, Any]:
    """DeepSpeed's own configuration for a training job.

    Args:
        tuned: each pass over the task is followed by one over general text.
    """
    own: DeepSpeedSettings = training.deepspeed
    zero: dict[str, Any] = {"stage": own.zero_stage}
    if own.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if own.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    passes = training.accumulation * ranks
    return {
        "train_micro_batch_size_per_gpu": -(-training.batch_size // passes),
        "gradient_accumulation_steps": training.accumulation * (2 if tuned else 1),
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


def agreed(number: int, device: torch.device) -> bool:
    """Whether all ranks come with the same number."""
    start_ranks(device)
    own = torch.tensor([number, -number], device=device)
    torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX)
    return bool(own[0] == -own[1])


def _own_state(optimizer: torch.optim.Optimizer, stepped: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
    """What only this rank has: the moments of what it steps, and the state of its random numbers (dropout's)."""
    own = {
        f"optimizer/{index}/{key}": value.detach().to("cpu", copy=True)
        for index, tensor in enumerate(stepped)
        for key, value in optimizer.state.get(tensor, {}).items()
    }
    own["random/cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        own["random/cuda"] = torch.cuda.get_rng_state(device)
    return own


def _of_rank(rank: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"rank/{rank}/{name}": tensor for name, tensor in tensors.items()}


def _restore_own(
    optimizer: torch.optim.Optimizer,
    stepped: Sequence[Tensor],
    device: torch.device,
    tensors: Mapping[str, Tensor],
    rank: int,
) -> None:
    prefix = f"rank/{rank}/"
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for index, tensor in enumerate(stepped):
        start = f"optimizer/{index}/"
        found = {name.removeprefix(start): value for name, value in own.items() if name.startswith(start)}
        if found:  # the count of steps stays on the CPU, where AdamW keeps it
            moved = {key: value if key == "step" else value.to(tensor.device) for key, value in found.items()}
            optimizer.state[tensor] = moved
    torch.set_rng_state(own["random/cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(own["random/cuda"], device)


def _same(model: nn.Module, head: nn.Module | None, device: torch.device, one: Batch, other: Batch) -> bool:
    model.eval()  # dropout would make any two passes differ
    try:
        return is_same(model, head, one.to(device), other.to(device))
    finally:
        model.train()


def _set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
