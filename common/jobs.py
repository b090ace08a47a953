"""The messages of a federation as values: what a coordinator asks, what a participant answers.

Tensors are never in here, only digests: they travel through the adapter store (a claim check), so messages stay small
whatever the size of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from seedbed.common.compression import transfer_of
from seedbed.common.config import BaseModelConfig, LoraSettings, RoutingTuningSettings, TrainingSettings, Transfer
from seedbed.common.manifest import BaseIdentity, Manifest, Record, recipe_hash
from seedbed.common.privacy import PrivacySettings
from seedbed.common.registry import RegistryAccess
from seedbed.common.routing.settings import RouterSettings

JobKind = Literal["seed", "expert", "joint", "gate", "router", "molora"]
GENERAL = "general"
"""Name that general-purpose text has among a participant's data."""
NODES_VARIABLE = "SEEDBED_NODES"
"""Environment variable of a simulation: the directory with one node file for each partition."""


class DataSource(Record):
    """Training examples of one task on a participant's own disk, or a data set of the hub."""

    task: str
    location: str
    """Path of a .jsonl, .parquet or .csv file, or the id of a data set of the hub."""
    prompt: str = "Q: {prompt}\nA:"
    fraction: float = 1.0
    """Share of the examples to use, drawn with `sample_seed`."""
    sample_seed: int = 0
    limit: int | None = None


class Node(Record):
    """A participant: who it is and what it brings. Its data never leaves it; only `tasks` (names) are told."""

    name: str
    base: BaseModelConfig
    store: Path
    """Root of its adapter store (a directory), which with a registry holds copies of what it fetched and trained."""
    work: Path
    """Scratch directory of this participant, for running jobs and their logs."""
    data: tuple[DataSource, ...] = ()
    pooled: bool = False
    """It holds the data of all tasks, as only a simulation can, and does the jobs that need them."""
    threads: int = 0
    """CPU threads of a training process; 0 leaves it to torch."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 300.0
    """Seconds between two checkpoints of a training; 0 is one after every step."""
    privacy: PrivacySettings | None = None
    """How this participant protects its updates; its own choice, told in their manifests. None does not."""
    registry: RegistryAccess | None = None
    """Of the federation; none where the participants share the coordinator's directory, as in a simulation."""


class Hello(Record):
    """What a participant says of itself before it gets work."""

    node: str
    version: str
    base: BaseIdentity
    tasks: tuple[str, ...]
    pooled: bool = False
    devices: tuple[str, ...]
    platform: dict[str, str] = {}


class Job(Record):
    """One training job. Equal jobs have equal recipes, and a recipe is trained once."""

    kind: JobKind
    name: str
    """Readable and unique in its federation, such as `expert:addition`."""
    base: BaseIdentity
    tasks: tuple[str, ...]
    """Tasks whose data the job trains on."""
    prompt: str = "Q: {prompt}\nA:"
    """What stands before a completion."""
    limit: int | None = None
    """Use at most so many examples of a task."""
    fraction: float = 1.0
    """Share of the examples to use, drawn with `sample_seed`."""
    sample_seed: int = 0
    """The same in every round of a seed, so that rounds together see no more than the fraction."""
    parent: str | None = None
    """Digest of the adapter (of a router job: the router) to start from; none starts from a fresh one: A drawn with
    `init_seed`, B = 0, a router of zeros."""
    lora: LoraSettings
    training: TrainingSettings
    init_seed: int = 0
    data_seed: int = 0
    tuning: RoutingTuningSettings | None = None
    """The objective of routing tuning, which needs general text; none is the plain one."""
    experts: tuple[str, ...] = ()
    """Digests of the frozen experts that a gate (one) or a router is trained over."""
    names: tuple[str, ...] = ()
    """What the experts of a gate or router are called; of a `molora` job, those that it trains."""
    router: RouterSettings | None = None
    """What a job of kind `router` or `molora` trains."""
    load_balance: float = 0.0
    """Weight of the loss that spreads tokens over the experts."""

    @property
    def parents(self) -> tuple[str, ...]:
        """Digests that the result's manifest names as its parents: of a router its experts, so that it can be used."""
        return self.experts or ((self.parent,) if self.parent else ())

    @property
    def transfer(self) -> Transfer:
        """In what its adapters are handed in."""
        return transfer_of(self.kind, self.training.transfer)

    @property
    def recipe(self) -> str:
        """Hash of everything that determines the trained result. Parts that a job does not have do not enter it."""
        unused = {
            field for field in ("tuning", "experts", "names", "router", "load_balance") if not getattr(self, field)
        }
        described = self.model_dump(mode="json", exclude={"name", *unused})
        if self.training.transfer == "float32":  # as before there was a choice, so that what was trained is still found
            del described["training"]["transfer"]
        return recipe_hash(described)


class JobResult(Record):
    """The answer to a job: the digest of what lies in the store, or why there is nothing."""

    node: str
    name: str
    recipe: str
    digest: str = ""
    manifest: Manifest | None = None
    seconds: float = 0.0
    cached: bool = False
    """The store already held this recipe, nothing was trained."""
    error: str = ""
    hint: str = ""
