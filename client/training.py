"""The training loop: from a `TrainSpec` to what it trains, knowing nothing of Flower or of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from seedbed.client.checkpoint import Checkpoint, Keeper, Progress, read_checkpoint
from seedbed.client.data import Batch, Steps, Tokens, collate, pack, split
from seedbed.client.engine import DeepSpeedEngine, Engine, TorchEngine, agreed, sharded_loading
from seedbed.client.objective import Objective, Pass, Totals
from seedbed.client.spec import TrainSpec
from seedbed.client.trainee import make_trainee
from seedbed.common import basemodel
from seedbed.common.adapter import Adapter
from seedbed.common.config import TrainingSettings
from seedbed.common.errors import ConfigError, TrainingError
from seedbed.common.jobs import DataSource
from seedbed.common.manifest import recipe_hash
from seedbed.common.routing import Mixture, Router

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of a training job. `metrics` holds nothing that differs when the same job is done again."""

    value: Adapter | Router | Mixture
    metrics: dict[str, float]
    start: Adapter | Router | Mixture | None = None
    """What it was trained from, where the participant's privacy asks for the difference."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the manifest says beside the job."""


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
            over the labels since the last report, `tokens` counts what the model has read. One that goes on from its
            checkpoint says ``{"event": "resumed", "step", "steps"}`` after the start; ``{"event": "note", "message"}`` says
            why a checkpoint could not be used or written.

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
    digests = [given.digest for given in (steps, general) if given is not None]
    engine, progress, keeper, start = _start(spec, recipe_hash({"data": digests}), report)
    report({"event": "start", "steps": len(steps), "examples": steps.examples, "ranks": engine.ranks})
    if progress.step:
        report({"event": "resumed", "step": progress.step, "steps": len(steps)})

    def after_step(now: Progress, seconds: float) -> None:
        if spec.checkpoint is not None:
            _keep(engine, keeper, now, seconds)

    try:
        metrics = _loop(engine, steps, general, training, int(tokenizer.pad_token_id), report, progress, after_step)
        value = engine.result()
    finally:
        engine.close()
    _require_finite(value)
    return Trained(value, {**metrics, "examples": float(steps.examples)}, start)


def _steps(spec: TrainSpec, sources: Sequence[DataSource], tokenizer: Any, batch_size: int) -> Steps:
    return Steps(
        sources,
        tokenizer,
        steps=spec.training.steps,
        batch_size=batch_size,
        max_tokens=spec.training.max_tokens,
        seed=spec.data_seed,
    )


def _start(spec: TrainSpec, data: str, report: Report) -> tuple[Engine, Progress, Keeper | None, Any]:
    """The engine, with the parameters and moments of a checkpoint where there is one of this very job; how far that is, who
    keeps the next ones, and for a private job what is trained as it was before the first step."""
    chosen = choose_engine(spec.training)
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if chosen == "deepspeed" else 1
    _require_pieces("training.batch_size", spec.training.batch_size, ranks, spec.training.accumulation)
    if spec.general is not None and spec.tuning is not None:
        _require_pieces("routing_tuning.general_batch", spec.tuning.general_batch, ranks, spec.training.accumulation)
    device = basemodel.device()
    fingerprint = recipe_hash({**spec.identifying(), "data": data, "engine": chosen, "ranks": ranks})
    found, keeper = _checkpoint(spec, fingerprint, report)
    if ranks > 1 and spec.checkpoint is not None and not agreed(found.progress.step if found else 0, device):
        report({"event": "note", "message": "the ranks read different checkpoints: training starts anew"})
        found = None
    loading = (
        sharded_loading(spec.training, ranks, device, basemodel.dtype_of(spec.base, device))
        if chosen == "deepspeed"
        else nullcontext()
    )
    with loading:
        trainee = make_trainee(spec, device)
    start = trainee.result() if spec.privacy is not None else None
    if found is not None:
        trainee.load(found.tensors)
    trainee.model.train()  # switches the LoRA's dropout on
    make = DeepSpeedEngine if chosen == "deepspeed" else TorchEngine
    engine: Engine = make(Objective(trainee, spec.tuning, spec.load_balance), spec.training, device)
    if found is not None:
        engine.restore(found.tensors)
    return engine, found.progress if found is not None else Progress(), keeper, start


def _checkpoint(spec: TrainSpec, fingerprint: str, report: Report) -> tuple[Checkpoint | None, Keeper | None]:
    """The checkpoint to go on from, and who writes the next ones: on the first rank, unless none are wanted."""

    def note(message: str) -> None:
        report({"event": "note", "message": message})

    if spec.checkpoint is None:
        return None, None
    first = int(os.environ.get("RANK", "0")) == 0
    keeper = Keeper(spec.checkpoint, fingerprint, spec.checkpoint_seconds, note) if first else None
    return read_checkpoint(spec.checkpoint, fingerprint, note), keeper


def _require_pieces(setting: str, examples: int, ranks: int, accumulation: int) -> None:
    pieces = ranks * accumulation
    if examples < pieces:
        raise ConfigError(
            f"a batch of {examples} examples cannot be cut for {ranks} ranks with {accumulation} passes each",
            f"Set {setting} to a multiple of {pieces}.",
        )


def _loop(
    engine: Engine,
    steps: Steps,
    general: Steps | None,
    training: TrainingSettings,
    pad: int,
    report: Report,
    progress: Progress,
    after_step: Callable[[Progress, float], None],
) -> dict[str, float]:
    started = time.monotonic() - progress.seconds
    lay_out = _layout(engine, _share(engine, steps[0], training), training, pad)
    for step in range(progress.step, len(steps)):
        rows, texts = steps[step], general[step] if general is not None else []
        totals = Totals(sum(row.targets for row in rows), sum(text.targets for text in texts))
        # A pass over the task and one over general text in turn, so that memory holds one of them.
        passes = [Pass(lay_out(piece)) for piece in _share(engine, rows, training)]
        silent = [Pass(lay_out(piece), general=True) for piece in _share(engine, texts, training)] if texts else []
        rate = learning_rate(step, training)
        terms = engine.step([*passes, *silent], totals, rate)
        _require_finite_loss(terms["loss"], step, len(steps))
        progress = progress.after(terms, totals.task, sum(len(row.ids) for row in (*rows, *texts)))
        if (step + 1) % training.log_every == 0 or step + 1 == len(steps):
            progress = progress.reported()
            now = {"step": step + 1, "steps": len(steps), **progress.means, "lr": rate, "tokens": progress.tokens}
            report({"event": "step", **now, "seconds": time.monotonic() - started})
        after_step(progress, time.monotonic() - started)
    counts = {"steps": len(steps), "tokens": progress.tokens, "labels": progress.labels}
    return {**progress.means, "first_loss": progress.first_loss, **{name: float(n) for name, n in counts.items()}}


def _keep(engine: Engine, keeper: Keeper | None, progress: Progress, seconds: float) -> None:
    """Write a checkpoint if the first rank's clock says so; every rank must call it."""
    if not engine.first_says(keeper is not None and keeper.due()):
        return
    began = time.monotonic()
    tensors = engine.state()
    if keeper is not None:
        keeper.keep(began, progress.model_copy(update={"seconds": seconds}), tensors)


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
