"""The part of `federation.yaml` that says what is made of the experts: candidates, merge methods, routers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from seedbed.common.config_section import NonNegative, Section

Group = Literal["experts", "unseeded", "tuned"]
RouterKind = Literal["uniform", "learned", "arrow", "phatgoose", "sequence", "molora"]
ROUTER_KINDS: tuple[str, ...] = get_args(RouterKind)


class RoutingSettings(Section):
    """How routers that are trained come about; the experts stay frozen (except for `molora`)."""

    mode: Literal["federated", "public"] = "federated"
    """Of the learned router. `federated`: every client trains it on its own data, the weights are averaged, `rounds` times.
    `public`: one participant trains it on the sample `data`."""
    data: Path | None = None
    rounds: PositiveInt = 2
    steps: PositiveInt = 30
    """Optimizer steps of a client in one round (or of the one participant, for `public`)."""
    gate_steps: PositiveInt = 100
    """Optimizer steps of each expert's own gate, for `phatgoose`."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """Of routers and gates."""
    load_balance: NonNegative = 0.0
    """Weight of the loss that spreads tokens over the experts, for `learned` and `molora`."""

    @model_validator(mode="after")
    def _public_needs_data(self) -> RoutingSettings:
        if self.mode == "public" and self.data is None:
            raise ValueError("routing mode 'public' needs combine.routing.data, a file of examples")
        return self


class CandidateSettings(Section):
    """One candidate that is more than a name: a merge method or a router with options, over one group of adapters."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """What tables call it, and its folder under adapters/."""
    method: str | None = None
    """A row of `seedbed merge --list`."""
    router: RouterKind | None = None
    of: Group = "experts"
    """Which adapters: `experts` from the seed, `unseeded` ones, or `tuned` from the seed under `routing_tuning`."""
    options: dict[str, Any] = {}
    """Of the merge method, as for `seedbed merge --opt`."""
    order: Annotated[int, Field(ge=0)] | None = None
    """Merge the adapters in a random order drawn from this number; none is the order of the tasks."""
    over: Literal["learned", "arrow", "phatgoose"] = "arrow"
    """Whose choice `sequence` averages over the tokens of a sequence."""
    top_k: PositiveInt | None = None
    """Experts that a token uses at most; none is the router's own default."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the router's softmax."""

    @model_validator(mode="after")
    def _one_way(self) -> CandidateSettings:
        if (self.method is None) == (self.router is None):
            raise ValueError(f"candidate '{self.name}' needs either a method or a router")
        if self.router is None and (self.top_k is not None or self.temperature != 1.0):
            raise ValueError(f"candidate '{self.name}': top_k and temperature belong to a router")
        if self.method is None and self.options:
            raise ValueError(f"candidate '{self.name}': options belong to a merge method")
        if self.method is None and self.order is not None:
            raise ValueError(f"candidate '{self.name}': order belongs to a merge method")
        return self


_Entry = Annotated[
    Annotated[str, Tag("name")] | Annotated[CandidateSettings, Tag("mapping")],
    # Decided by its form, so that a mistake in a mapping is told as such.
    Discriminator(lambda value: "name" if isinstance(value, str) else "mapping"),
]


class CombineSettings(Section):
    """Which candidates are made and compared."""

    candidates: tuple[_Entry, ...] = (
        "base",
        "seed",
        "experts",
        "average",
        "compressed",
        "unseeded",
        "joint",
    )
    """Names, or mappings (`CandidateSettings`). `base` no adapter; `seed` the seed alone; `experts` every expert alone,
    `tuned` every routing-tuned expert alone, `individual` every unseeded expert alone (LoRA per task); `average` the exact
    mean of the experts' outputs; `compressed` the same cut to `rank`; `unseeded` the exact mean of experts that never saw the
    seed but trained as many steps; `joint` one adapter trained on all tasks at once, in as many steps in all. Any other
    method of `seedbed merge --list` and any router (uniform, learned, arrow, phatgoose, sequence, molora) by its name, over
    the experts and with its defaults."""
    rank: PositiveInt | None = None
    """Rank of `compressed`; none means the rank that the experts have."""
    routing: RoutingSettings = RoutingSettings()

    @model_validator(mode="after")
    def _no_duplicates(self) -> CombineSettings:
        if not self.candidates:
            raise ValueError("combine.candidates is empty")
        if len(set(self.names)) != len(self.names):
            raise ValueError("combine.candidates names a candidate twice")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all candidates, in order."""
        return tuple(entry if isinstance(entry, str) else entry.name for entry in self.candidates)
