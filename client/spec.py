"""What a training process is told: a job made concrete on one participant, with paths in place of digests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from seedbed.common.config import BaseModelConfig, LoraSettings, RoutingTuningSettings, TrainingSettings
from seedbed.common.errors import DataError
from seedbed.common.jobs import GENERAL, DataSource, Job, JobKind, Node
from seedbed.common.manifest import BaseIdentity, Record
from seedbed.common.privacy import PrivacySettings
from seedbed.common.routing import RouterSettings


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
    checkpoint: Path | None = None
    """Directory of the training's own checkpoint (`client.checkpoint`); none keeps none."""
    checkpoint_seconds: float = 300.0
    """Between two checkpoints at least; 0 is after every step."""

    privacy: PrivacySettings | None = None
    """How the participant protects what leaves it; none does not."""
    privacy_ledger: Path | None = None
    """File in which the participant counts its private releases."""

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
            checkpoint=output.with_name("checkpoint"),
            checkpoint_seconds=node.checkpoint_seconds,
            privacy=node.privacy,
            privacy_ledger=node.work / "privacy.jsonl",
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

    def identifying(self) -> dict[str, Any]:
        """What tells this training from another one, as JSON values: all but where it is done, how fast, and what becomes
        of its result."""
        places = {"output", "checkpoint", "checkpoint_seconds", "threads", "privacy", "privacy_ledger"}
        return self.model_dump(mode="json", exclude=places)


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
