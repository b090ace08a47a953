"""The training loop: from a `TrainSpec` to a trained `Adapter`, knowing nothing of Flower or of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from seedbed.client.data import Batch, Steps, Tokens, collate, pack, split
from seedbed.client.engine import DeepSpeedEngine, Engine, TorchEngine, sharded_loading
from seedbed.client.lora import attach, load_factors
from seedbed.common import basemodel
from seedbed.common.adapter import Adapter
from seedbed.common.config import BaseModelConfig, LoraSettings, TrainingSettings
from seedbed.common.errors import ConfigError, DataError, TrainingError
from seedbed.common.jobs import DataSource, Job, Node
from seedbed.common.manifest import BaseIdentity, Kind, Record
from seedbed.common.storage import read_adapter

Report = Callable[[dict[str, Any]], None]


class TrainSpec(Record):
    """Everything that a training process needs to know. Equal specs give bit-identical factors on one machine."""

    base: BaseModelConfig
    lora: LoraSettings
    training: TrainingSettings
    data: tuple[DataSource, ...]
    output: Path
    """PEFT directory that is written; must not be there yet."""
    start: Path | None = None
    """Adapter directory to start from; none starts from a fresh one, drawn with `init_seed`, with B = 0."""
    init_seed: int = 0
    data_seed: int = 0
    threads: int = 0
    """CPU threads of each rank; 0 leaves it to torch."""

    kind: Kind = "expert"
    identity: BaseIdentity | None = None
    """Of the base model, for the manifest; none has it computed."""
    parents: tuple[str, ...] = ()
    task: str | None = None
    recipe: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What the manifest says of the job."""

    @classmethod
    def of(cls, job: Job, node: Node, output: Path, start: Path | None = None) -> TrainSpec:
        """The spec of a job on a participant.

        Args:
            output: where the trained adapter goes.
            start: directory of the adapter whose digest is `job.parent`.

        Raises:
            DataError: if the participant lacks the data of one of the job's tasks.
        """
        return cls(
            base=node.base,
            lora=job.lora,
            training=job.training,
            data=tuple(_source(node, task, job) for task in job.tasks),
            output=output,
            start=start,
            init_seed=job.init_seed,
            data_seed=job.data_seed,
            threads=node.threads,
            kind=job.kind,
            identity=job.base,
            parents=(job.parent,) if job.parent else (),
            task=job.tasks[0] if len(job.tasks) == 1 else None,
            recipe=job.recipe,
            settings=job.model_dump(mode="json"),
        )


def _source(node: Node, task: str, job: Job) -> DataSource:
    for source in node.data:
        if source.task == task:
            limits = [limit for limit in (source.limit, job.limit) if limit is not None]
            share = source.fraction * job.fraction
            update = {"fraction": share, "prompt": job.prompt, "limit": min(limits, default=None)}
            update["sample_seed"] = job.sample_seed
            return source.model_copy(update=update)
    has = ", ".join(source.task for source in node.data) or "none"
    raise DataError(f"participant '{node.name}' has no data of the task '{task}'", f"It has: {has}.")


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of a training job. `metrics` holds nothing that differs when the same job is done again."""

    adapter: Adapter
    metrics: dict[str, float]


def choose_engine(training: TrainingSettings) -> Literal["torch", "deepspeed"]:
    """Resolve `auto`: deepspeed where there is a GPU, torch elsewhere."""
    if training.engine != "auto":
        return training.engine
    return "deepspeed" if torch.cuda.is_available() else "torch"


def learning_rate(step: int, training: TrainingSettings) -> float:
    """The rate of a step, counted from 0: a linear rise that reaches the peak at the last warm-up step, then a linear
    fall that would reach zero one step after the last."""
    warmup = min(training.warmup_steps, training.steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    return training.learning_rate * (training.steps - step) / (training.steps - warmup)


def train(spec: TrainSpec, report: Report) -> Trained:
    """Fine-tune a LoRA; with several ranks every rank calls this and gets the same result.

    Args:
        report: told ``{"event": "start", …}`` once and ``{"event": "step", "step", "steps", "loss", "lr", "tokens",
            "seconds"}`` every `log_every` steps; `loss` is the mean over the labels since the last report, `tokens`
            counts what the model has read.

    Raises:
        ConfigError: if the batch cannot be cut for so many ranks, or the targets do not fit the model.
        DataError: if the data cannot be used.
        AdapterMismatchError: if the adapter to start from does not fit.
        ModelError: if the base model cannot be loaded.
        TrainingError: if the loss or a factor is no longer finite.
    """
    if spec.threads:
        torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.data_seed)
    training = spec.training
    tokenizer = basemodel.load_tokenizer(basemodel.resolve(spec.base))
    steps = Steps(
        spec.data,
        tokenizer,
        steps=training.steps,
        batch_size=training.batch_size,
        max_tokens=training.max_tokens,
        seed=spec.data_seed,
    )
    engine = _engine(spec)
    report({"event": "start", "steps": len(steps), "examples": steps.examples, "ranks": engine.ranks})
    try:
        metrics = _loop(engine, steps, training, int(tokenizer.pad_token_id), report)
        adapter = engine.adapter()
    finally:
        engine.close()
    _require_finite(adapter)
    return Trained(adapter, {**metrics, "examples": float(steps.examples)})


def _engine(spec: TrainSpec) -> Engine:
    chosen = choose_engine(spec.training)
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if chosen == "deepspeed" else 1
    pieces = ranks * spec.training.accumulation
    if spec.training.batch_size < pieces:
        raise ConfigError(
            f"a batch of {spec.training.batch_size} examples cannot be cut for {ranks} ranks with "
            f"{spec.training.accumulation} passes each",
            f"Set training.batch_size to a multiple of {pieces}.",
        )
    device = basemodel.device()
    loading = (
        sharded_loading(spec.training, ranks, device, basemodel.dtype_of(spec.base, device))
        if chosen == "deepspeed"
        else nullcontext()
    )
    with loading:
        model, _ = basemodel.load(spec.base, device)
        peft_model = attach(model, spec.lora, spec.init_seed)
    if spec.start is not None:
        load_factors(peft_model, read_adapter(spec.start)[0])
    peft_model.train()  # switches the LoRA's dropout on
    make = DeepSpeedEngine if chosen == "deepspeed" else TorchEngine
    return make(peft_model, spec.training, device)


def _loop(engine: Engine, steps: Steps, training: TrainingSettings, pad: int, report: Report) -> dict[str, float]:
    started = time.monotonic()
    lay_out = _layout(engine, _share(engine, steps[0], training), training, pad)
    window: list[tuple[float, int]] = []
    read, seen, first = 0, 0, 0.0
    for step in range(len(steps)):
        rows = steps[step]
        pieces = _share(engine, rows, training)
        labels = sum(row.targets for row in rows)
        rate = learning_rate(step, training)
        loss = engine.step([lay_out(piece) for piece in pieces], labels, rate)
        _require_finite_loss(loss, step, len(steps))
        window.append((loss, labels))
        read += sum(len(row.ids) for row in rows)
        seen += labels
        first = loss if step == 0 else first
        if (step + 1) % training.log_every == 0 or step + 1 == len(steps):
            mean = _mean(window)
            window = window[:0] if step + 1 < len(steps) else window
            report(
                {
                    "event": "step",
                    "step": step + 1,
                    "steps": len(steps),
                    "loss": mean,
                    "lr": rate,
                    "tokens": read,
                    "seconds": time.monotonic() - started,
                }
            )
    return {
        "loss": _mean(window),
        "first_loss": first,
        "steps": float(len(steps)),
        "tokens": float(read),
        "labels": float(seen),
    }


def _share(engine: Engine, rows: Sequence[Tokens], training: TrainingSettings) -> list[list[Tokens]]:
    """This rank's passes of a step; at any moment all ranks work on examples of like length."""
    return split(rows, engine.ranks * training.accumulation)[engine.rank :: engine.ranks]


def _layout(
    engine: Engine, pieces: Sequence[Sequence[Tokens]], training: TrainingSettings, pad: int
) -> Callable[[Sequence[Tokens]], Batch]:
    """Pack the examples where the model computes the same then, which saves the padding; else one row each."""

    def packed(examples: Sequence[Tokens]) -> Batch:
        return pack(examples, pad, training.max_tokens)

    def padded(examples: Sequence[Tokens]) -> Batch:
        return collate(examples, pad)

    probe = max(pieces, key=len)[:2]
    together = pack(probe, pad, sum(len(example.ids) for example in probe))
    return packed if engine.same(padded(probe), together) else padded


def _mean(window: list[tuple[float, int]]) -> float:
    return sum(loss * labels for loss, labels in window) / sum(labels for _, labels in window)


def _require_finite_loss(loss: float, step: int, steps: int) -> None:
    if not (abs(loss) < float("inf")):
        raise TrainingError(
            f"the loss became {loss} at step {step + 1} of {steps}",
            "Lower training.learning_rate, or set clip_norm to 1.",
        )


def _require_finite(adapter: Adapter) -> None:
    for name, factors in adapter.items():
        if not (torch.isfinite(factors.A).all() and torch.isfinite(factors.B).all()):
            raise TrainingError(
                f"the last step left numbers in '{name}' that are not finite", "Lower training.learning_rate."
            )
