"""`federation.yaml`: what a federation is made of, validated before anything starts.

Small classes, one for each part; the documentation of a field stands beside it. How adapters are combined is in
`config_combine`; `config_file` reads files and presets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from seedbed.common.config_combine import ROUTER_KINDS, CandidateSettings, CombineSettings, Group, RouterKind
from seedbed.common.config_section import Fraction, NonNegative, Section

# Named here, too, so that whoever wants a part of the configuration need not know in which file it stands.
__all__ = [
    "ROUTER_KINDS",
    "BaseModelConfig",
    "CandidateSettings",
    "CombineSettings",
    "DeepSpeedSettings",
    "EvaluationSettings",
    "FederationConfig",
    "Group",
    "LoraSettings",
    "RouterKind",
    "RoutingTuningSettings",
    "RunSettings",
    "SeedSettings",
    "StageSettings",
    "TaskSettings",
    "TrainingSettings",
    "Transfer",
]

Transfer = Literal["float32", "bfloat16", "int8"]
"""In what an adapter travels and is stored; arithmetic with it is in float32 whatever it is."""


class BaseModelConfig(Section):
    """The frozen model that every participant holds."""

    model: str = "embedded"
    """`embedded`, `smollm2`, a directory, or a model id of the hub."""
    revision: str | None = None
    """Commit or tag, for a model of the hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen weights; `auto` is bfloat16 on a GPU and float32 on a CPU. Adapters train in float32."""
    quantization: Literal["none", "nf4"] = "none"
    """Of the frozen linear layers in memory: `nf4` holds them in 4 bits and computes in `dtype`, so that a model four times
    as large fits (Dettmers et al., *QLoRA*, NeurIPS 2023). Needs the extra `qlora`."""


class LoraSettings(Section):
    """Shape of every adapter that the federation trains."""

    rank: PositiveInt = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the head), or endings of module names, such as [q_proj, v_proj]."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class DeepSpeedSettings(Section):
    """How DeepSpeed spreads a training job; used by `engine: deepspeed`."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    """Stage 3 only."""
    processes: PositiveInt | Literal["auto"] = "auto"
    """Ranks on this machine; `auto` is one for each GPU, one on a CPU."""
    hostfile: Path | None = None
    """DeepSpeed hostfile, for a client of several machines."""

    @model_validator(mode="after")
    def _parameters_need_stage_3(self) -> DeepSpeedSettings:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage 3, got {self.zero_stage}")
        return self


class TrainingSettings(Section):
    """One training job on one client. `steps` are optimizer steps; a step sees `batch_size` examples."""

    engine: Literal["auto", "deepspeed", "torch"] = "auto"
    """`auto` is deepspeed where there is a GPU and torch on a CPU."""
    steps: PositiveInt = 100
    batch_size: PositiveInt = 8
    """Examples in one optimizer step, over all ranks and accumulation steps."""
    accumulation: PositiveInt = 1
    """Forward passes that one optimizer step is split into."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    """Linear rise to the learning rate; then it falls linearly to zero at the last step."""
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    max_tokens: PositiveInt = 256
    """An example longer than this loses the beginning of its prompt."""
    log_every: PositiveInt = 5
    transfer: Transfer = "float32"
    """In what trained adapters are handed in: `bfloat16` halves the bytes, `int8` quarters them. Manifests state the error."""
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainingSettings:
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        return self


class SeedSettings(Section):
    """How the shared seed adapter comes about."""

    mode: Literal["federated", "public", "given", "none"] = "federated"
    """`federated`: every client trains on a small fraction of its own data from one initialization, factors are averaged,
    `rounds` times. `public`: one client trains on the sample `data`. `given`: the adapter in `adapter`. `none`: no seed;
    every expert starts from the same untrained initialization."""
    fraction: Fraction = 0.1
    """Share of each client's training data that the seed may see."""
    rounds: PositiveInt = 1
    steps: PositiveInt = 20
    """Optimizer steps of a client in one round (or of the one client, for `public`)."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Instead of the training's own."""
    tasks: tuple[str, ...] | None = None
    """Of `federated`: only the clients of these tasks train the seed; none is all. The others still train experts from it."""
    data: Path | None = None
    adapter: Path | None = None

    @model_validator(mode="after")
    def _sources(self) -> SeedSettings:
        if self.mode == "public" and self.data is None:
            raise ValueError("seed mode 'public' needs seed.data, a file of examples")
        if self.mode == "given" and self.adapter is None:
            raise ValueError("seed mode 'given' needs seed.adapter, a PEFT directory")
        if self.tasks is not None and not self.tasks:
            raise ValueError("seed.tasks is empty: leave it out for all tasks, or set seed.mode to none")
        return self

    @property
    def local_steps(self) -> int:
        """Optimizer steps of one client towards the seed; 0 where no client trains for it on its own task."""
        return self.rounds * self.steps if self.mode == "federated" else 0

    def steps_on(self, task: str) -> int:
        """Optimizer steps of the client of a task towards the seed."""
        return self.local_steps if self.tasks is None or task in self.tasks else 0


class TaskSettings(Section):
    """Which tasks there are, and where their examples lie."""

    data: Path | None = None
    """Directory with NAME.train.jsonl (or .parquet, .csv) and NAME.test.jsonl; none for the embedded tasks."""
    experts: tuple[str, ...] = ()
    """Held-in tasks: one client each, trained and evaluated."""
    held_out: tuple[str, ...] = ()
    """Zero-shot tasks: evaluated only."""
    prompt: str = "Q: {prompt}\nA:"
    """What the model reads before it answers; `{prompt}` and `{instruction}` are the example's own."""
    train_limit: PositiveInt | None = None
    """Use at most so many training examples of a task."""
    general: Path | None = None
    """General-purpose text, one {"text": …} a line. None is `data`/general_text.jsonl where that exists; the embedded tasks
    bring their own."""
    general_test: PositiveInt = 100
    """The last so many texts of it only measure (drift from the base model); routing tuning trains on the others."""

    @model_validator(mode="after")
    def _distinct(self) -> TaskSettings:
        both = sorted(set(self.experts) & set(self.held_out))
        if both:
            raise ValueError(f"task {both[0]} is both an expert's and held out")
        for name in (*self.experts, *self.held_out):
            if (*self.experts, *self.held_out).count(name) > 1:
                raise ValueError(f"task {name} is named twice")
        if "{prompt}" not in self.prompt:
            raise ValueError("tasks.prompt must contain {prompt}")
        return self


class RoutingTuningSettings(Section):
    """The objective of I-LoRA, under which the experts of the group `tuned` train:

    ``task_weight · LM(task) + kl_weight · KL(base ‖ adapted; general text) + norm_weight · mean ‖s B A x‖₂ (general text)``.

    The paper publishes neither weights nor the share of general text: these are our choices. A weight of 0 removes a term."""

    task_weight: NonNegative = 1.0
    kl_weight: NonNegative = 1.0
    norm_weight: NonNegative = 0.1
    general_batch: PositiveInt = 8
    """General texts in one optimizer step, beside the step's own examples of the task."""

    @model_validator(mode="after")
    def _something_is_minimized(self) -> RoutingTuningSettings:
        if not (self.task_weight or self.kl_weight or self.norm_weight):
            raise ValueError("all weights of routing_tuning are 0, which leaves nothing to train for")
        return self

    @property
    def needs_general_text(self) -> bool:
        return bool(self.kl_weight or self.norm_weight)

    @property
    def is_plain(self) -> bool:
        """Whether this is the ordinary objective, under which a tuned expert is an expert like any other."""
        return self.task_weight == 1.0 and not self.needs_general_text


class EvaluationSettings(Section):
    """How candidates are measured."""

    limit: PositiveInt | None = None
    """Score at most so many examples of a task (the first of its test file)."""
    expert_tasks: Literal["all", "own"] = "all"
    """Whether an expert alone is measured on every task or only on its own; a routing-tuned one always on its own."""
    batch_tokens: PositiveInt = 8192
    """Bound on the tokens of one forward pass."""
    drift: bool = True
    """Measure every candidate on general text, too, where there is some: divergence from the base model and perplexity."""
    extra: tuple[str, ...] = ()
    """Further lm-eval tasks by name, or the battery `zero-shot-16`, scored as held out; they need a hub."""


class StageSettings(Section):
    """When a stage is over."""

    deadline: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds to wait for the participants of one stage."""
    quorum: Fraction = 0.75
    """Share of the asked participants whose results are needed to go on."""
    attempts: PositiveInt = 2
    """How often a participant may fail a job before its result is missing; in a deployed federation only."""
    silence: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a sign of life after which a participant is asked for the same job again, which does not train it
    twice; doubled each time."""
    patience: Fraction = 0.5
    """Share of the deadline after which a job that is not answered is also given to another participant that brings the
    same task."""
    max_norm_ratio: Annotated[float, Field(gt=1)] | None = None
    """An expert whose update has more than so many times the others' median norm is not used; none is no gate."""
    min_cosine: Annotated[float, Field(ge=-1, lt=1)] | None = None
    """An expert whose update has a smaller cosine to the mean of the others is not used; none is no gate."""


class RunSettings(Section):
    """Where and how jobs run on this machine."""

    workers: PositiveInt | Literal["auto"] = "auto"
    """Clients that work at the same time in a simulation; `auto` is one for each core, or each GPU."""
    random_seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    norm_bound: Annotated[float, Field(gt=0)] = 1e4
    """Largest Frobenius norm that the update of one module may have."""


class FederationConfig(Section):
    """A whole federation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "federation"
    base: BaseModelConfig = BaseModelConfig()
    tasks: TaskSettings = TaskSettings()
    lora: LoraSettings = LoraSettings()
    seed: SeedSettings = SeedSettings()
    training: TrainingSettings = TrainingSettings()
    routing_tuning: RoutingTuningSettings = RoutingTuningSettings()
    combine: CombineSettings = CombineSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    stages: StageSettings = StageSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _whole(self) -> FederationConfig:
        if not self.tasks.experts:
            raise ValueError("tasks.experts is empty: a federation needs at least one expert task")
        if self.base.quantization != "none" and self.training.deepspeed.zero_stage == 3:
            raise ValueError("base.quantization needs zero_stage 0, 1 or 2: weights in 4 bits are not cut into slices")
        if self.seed.mode == "none" and "seed" in self.combine.names:
            raise ValueError("candidate 'seed' needs a seed, but seed.mode is 'none'")
        strangers = sorted(set(self.seed.tasks or ()) - set(self.tasks.experts))
        if strangers:
            raise ValueError(f"seed.tasks names {strangers[0]}, which is not among tasks.experts")
        return self
