"""The training loop: from a `TrainSpec` to a trained `Adapter`, knowing nothing of Flower or of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from seedbed.client.data import Batch, Steps, Tokens, collate, pack, split
from seedbed.client.engine import DeepSpeedEngine, Engine, TorchEngine, sharded_loading
from seedbed.client.lora import attach, load_factors
from seedbed.client.objective import Objective, Pass, Totals
from seedbed.client.trainee import LoraTrainee, RoutedTrainee, Trainee
from seedbed.common import basemodel
from seedbed.common.adapter import Adapter
from seedbed.common.config import BaseModelConfig, LoraSettings, RoutingTuningSettings, TrainingSettings
from seedbed.common.errors import ConfigError, DataError, TrainingError
from seedbed.common.jobs import GENERAL, DataSource, Job, JobKind, Node
from seedbed.common.manifest import BaseIdentity, Record
from seedbed.common.routing import Mixture, RoutedModel, Router, RouterSettings
from seedbed.common.routing.router_file import read_router
from seedbed.common.storage import read_adapter
from seedbed.common.targets import selected_shapes

Report = Callable[[dict[str, Any]], None]


class TrainSpec(Record):
    """Everything that a training process needs to know. Equal specs give bit-identical factors on one machine."""

    base: BaseModelConfig
    lora: LoraSettings
    training: TrainingSettings
    data: tuple[DataSource, ...]
    output: Path
    """Directory that is written; must not be there yet."""
    start: Path | None = None
    """Directory of the adapter, or router, to start from; none starts from a fresh one, drawn with `init_seed`, with B = 0."""
    tuning: RoutingTuningSettings | None = None
    """The objective of routing tuning; none is the plain one."""
    general: DataSource | None = None
    """General text, for routing tuning."""
    init_seed: int = 0
    data_seed: int = 0
    threads: int = 0
    """CPU threads of each rank; 0 leaves it to torch."""

    kind: JobKind = "expert"
    """What is trained: a LoRA (`seed`, `expert`, `joint`), a `gate`, a `router`, or experts with their router (`molora`)."""
    experts: tuple[Path, ...] = ()
    """Directories of the frozen experts of a gate or router."""
    names: tuple[str, ...] = ()
    """What the experts of a gate, router or `molora` are called."""
    router: RouterSettings | None = None
    load_balance: float = 0.0
    """Weight of the auxiliary loss that spreads tokens over the experts."""

    identity: BaseIdentity | None = None
    """Of the base model, for the manifest; none has it computed."""
    parents: tuple[str, ...] = ()
    task: str | None = None
    recipe: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What the manifest says of the job."""

    @classmethod
    def of(
        cls, job: Job, node: Node, output: Path, start: Path | None = None, experts: Sequence[Path] = ()
    ) -> TrainSpec:
        """The spec of a job on a participant.

        Args:
            output: where the result goes.
            start: directory of what `job.parent` names.
            experts: directories of what `job.experts` names.

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
            tuning=job.tuning,
            general=_own(node, GENERAL) if job.tuning and job.tuning.needs_general_text else None,
            init_seed=job.init_seed,
            data_seed=job.data_seed,
            threads=node.threads,
            kind=job.kind,
            identity=job.base,
            experts=tuple(experts),
            names=job.names,
            router=job.router,
            load_balance=job.load_balance,
            parents=job.parents,
            task=job.tasks[0] if len(job.tasks) == 1 else None,
            recipe=job.recipe,
            settings=job.model_dump(mode="json"),
        )


def _source(node: Node, task: str, job: Job) -> DataSource:
    source = _own(node, task)
    limits = [limit for limit in (source.limit, job.limit) if limit is not None]
    share = source.fraction * job.fraction
    update = {"fraction": share, "prompt": job.prompt, "limit": min(limits, default=None)}
    return source.model_copy(update={**update, "sample_seed": job.sample_seed})


def _own(node: Node, task: str) -> DataSource:
    for source in node.data:
        if source.task == task:
            return source
    has = ", ".join(source.task for source in node.data) or "none"
    raise DataError(f"participant '{node.name}' has no data of the task '{task}'", f"It has: {has}.")


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
        trainee = _trainee(spec, device)
    trainee.model.train()  # switches the LoRA's dropout on
    make = DeepSpeedEngine if chosen == "deepspeed" else TorchEngine
    return make(Objective(trainee, spec.tuning, spec.load_balance), spec.training, device)


def _trainee(spec: TrainSpec, device: torch.device) -> Trainee:
    model, tokenizer = basemodel.load(spec.base, device)
    makers: dict[str, Callable[[TrainSpec, Any], Trainee]] = {"gate": _gate, "router": _router, "molora": _molora}
    trainee = makers.get(spec.kind, _lora)(spec, model)
    if isinstance(trainee.model, RoutedModel):
        trainee.model.padding = int(tokenizer.pad_token_id)
    return trainee


def _lora(spec: TrainSpec, model: Any) -> Trainee:
    peft_model = attach(model, spec.lora, spec.init_seed)
    if spec.start is not None:
        load_factors(peft_model, read_adapter(spec.start)[0])
    return LoraTrainee(peft_model)


def _gate(spec: TrainSpec, model: Any) -> Trainee:
    (expert,) = _experts(spec)
    return RoutedTrainee(RoutedModel.gated(model, expert), spec.names, whole=False, balanced=False)


def _router(spec: TrainSpec, model: Any) -> Trainee:
    start = read_router(spec.start)[0] if spec.start is not None else None
    routed = RoutedModel.learned(model, _experts(spec), spec.router or RouterSettings(kind="learned"), start)
    return RoutedTrainee(routed, spec.names, whole=False, balanced=spec.load_balance > 0)


def _molora(spec: TrainSpec, model: Any) -> Trainee:
    lora = spec.lora
    scaling = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    routed = RoutedModel.molora(
        model,
        list(selected_shapes(model, lora, spec.base.model)),
        experts=len(spec.names),
        rank=lora.rank,
        alpha=scaling * lora.rank,
        seed=spec.init_seed,
        settings=spec.router,
    )
    return RoutedTrainee(routed, spec.names, whole=True, balanced=spec.load_balance > 0)


def _experts(spec: TrainSpec) -> list[Adapter]:
    return [read_adapter(directory)[0] for directory in spec.experts]


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
