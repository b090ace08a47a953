"""The training loop: from a `TrainSpec` to what it trains, knowing nothing of Flower or of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from seedbed.client.data import Batch, Steps, Tokens, collate, pack, split
from seedbed.client.engine import DeepSpeedEngine, Engine, TorchEngine, sharded_loading
from seedbed.client.objective import Objective, Pass, Totals
from seedbed.client.spec import TrainSpec
from seedbed.client.trainee import make_trainee
from seedbed.common import basemodel
from seedbed.common.adapter import Adapter
from seedbed.common.config import TrainingSettings
from seedbed.common.errors import ConfigError, TrainingError
from seedbed.common.jobs import DataSource
from seedbed.common.routing import Mixture, Router

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of a training job. `metrics` holds nothing that differs when the same job is done again."""

    value: Adapter | Router | Mixture
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
            "seconds"}`` every `log_every` steps, with the terms of the objective where there are several; `loss` is the mean
            over the labels since the last report, `tokens` counts what the model has read.

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
    steps = _steps(spec, spec.data, tokenizer, training.batch_size)
    general = None
    if spec.general is not None and spec.tuning is not None:
        general = _steps(spec, (spec.general,), tokenizer, spec.tuning.general_batch)
    engine = _engine(spec)
    report({"event": "start", "steps": len(steps), "examples": steps.examples, "ranks": engine.ranks})
    try:
        metrics = _loop(engine, steps, general, training, int(tokenizer.pad_token_id), report)
        value = engine.result()
    finally:
        engine.close()
    _require_finite(value)
    return Trained(value, {**metrics, "examples": float(steps.examples)})


def _steps(spec: TrainSpec, sources: Sequence[DataSource], tokenizer: Any, batch_size: int) -> Steps:
    return Steps(
        sources,
        tokenizer,
        steps=spec.training.steps,
        batch_size=batch_size,
        max_tokens=spec.training.max_tokens,
        seed=spec.data_seed,
    )


def _engine(spec: TrainSpec) -> Engine:
    chosen = choose_engine(spec.training)
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if chosen == "deepspeed" else 1
    _require_pieces("training.batch_size", spec.training.batch_size, ranks, spec.training.accumulation)
    if spec.general is not None and spec.tuning is not None:
        _require_pieces("routing_tuning.general_batch", spec.tuning.general_batch, ranks, spec.training.accumulation)
    device = basemodel.device()
    loading = (
        sharded_loading(spec.training, ranks, device, basemodel.dtype_of(spec.base, device))
        if chosen == "deepspeed"
        else nullcontext()
    )
    with loading:
        trainee = make_trainee(spec, device)
    trainee.model.train()  # switches the LoRA's dropout on
    make = DeepSpeedEngine if chosen == "deepspeed" else TorchEngine
    return make(Objective(trainee, spec.tuning, spec.load_balance), spec.training, device)


def _require_pieces(setting: str, examples: int, ranks: int, accumulation: int) -> None:
    pieces = ranks * accumulation
    if examples < pieces:
        raise ConfigError(
            f"a batch of {examples} examples cannot be cut for {ranks} ranks with {accumulation} passes each",
            f"Set {setting} to a multiple of {pieces}.",
        )


def _loop(
    engine: Engine, steps: Steps, general: Steps | None, training: TrainingSettings, pad: int, report: Report
) -> dict[str, float]:
    started = time.monotonic()
    lay_out = _layout(engine, _share(engine, steps[0], training), training, pad)
    window = _Window()
    read, seen, first = 0, 0, 0.0
    for step in range(len(steps)):
        rows, texts = steps[step], general[step] if general is not None else []
        totals = Totals(sum(row.targets for row in rows), sum(text.targets for text in texts))
        # A pass over the task and one over general text in turn, so that memory holds one of them.
        passes = [Pass(lay_out(piece)) for piece in _share(engine, rows, training)]
        silent = [Pass(lay_out(piece), general=True) for piece in _share(engine, texts, training)] if texts else []
        rate = learning_rate(step, training)
        terms = engine.step([*passes, *silent], totals, rate)
        _require_finite_loss(terms["loss"], step, len(steps))
        window.add(terms, totals.task)
        read += sum(len(row.ids) for row in (*rows, *texts))
        seen += totals.task
        first = terms["loss"] if step == 0 else first
        if (step + 1) % training.log_every == 0 or step + 1 == len(steps):
            means = window.take()
            now = {"step": step + 1, "steps": len(steps), **means, "lr": rate, "tokens": read}
            report({"event": "step", **now, "seconds": time.monotonic() - started})
    return {**means, "first_loss": first, "steps": float(len(steps)), "tokens": float(read), "labels": float(seen)}


class _Window:
    """Means of the objective's terms since the last report, weighted by the labels of each step."""

    def __init__(self) -> None:
        self._seen: list[tuple[dict[str, float], int]] = []

    def add(self, terms: dict[str, float], labels: int) -> None:
        self._seen.append((terms, labels))

    def take(self) -> dict[str, float]:
        labels = sum(count for _, count in self._seen)
        # Of a plain objective the loss says everything.
        names = [name for name in self._seen[0][0] if name == "loss" or len(self._seen[0][0]) > 2]
        means = {name: sum(terms[name] * count for terms, count in self._seen) / labels for name in names}
        self._seen = []
        return means


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


def _require_finite_loss(loss: float, step: int, steps: int) -> None:
    if not (abs(loss) < float("inf")):
        raise TrainingError(
            f"the loss became {loss} at step {step + 1} of {steps}",
            "Lower training.learning_rate, or set clip_norm to 1.",
        )


def _require_finite(value: Adapter | Router | Mixture) -> None:
    for name, tensor in _tensors(value):
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"the last step left numbers in '{name}' that are not finite", "Lower training.learning_rate."
            )


def _tensors(value: Adapter | Router | Mixture) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, Mixture):
        for expert in value.experts:
            yield from _tensors(expert)
        yield from _tensors(value.router)
    elif isinstance(value, Router):
        yield from ((name, tensor) for name, module in value.tensors.items() for tensor in module.values())
    else:
        yield from ((name, tensor) for name, factors in value.items() for tensor in (factors.A, factors.B))
