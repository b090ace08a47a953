"""What can be seen of a federation at one moment, as a value. `fold` makes it from events; whatever shows it reads it.

Every part is bounded, so that a federation of a hundred participants over days stays small: what is left out is counted.
All texts that come from participants (names, reasons, devices) are cut to `TEXT` characters and hold no control characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

NODES, JOBS, ARRIVALS, CONTRIBUTIONS, NOTES, CURVE, TEXT = 1000, 2000, 200, 500, 50, 120, 300
"""Most that a status holds of each; `TEXT` is in characters, `CURVE` in points of one loss curve."""

FederationState = Literal["waiting", "running", "finished", "failed"]
JobState = Literal["open", "running", "done", "quarantined"]
NodeState = Literal["here", "gone", "refused"]


@dataclass(frozen=True, slots=True)
class Stage:
    """The stage that is open, or was the last one."""

    name: str = ""
    total: int = 0
    """Units of work, such as jobs or evaluations."""
    done: int = 0
    began: float = 0.0
    advanced: float = 0.0
    """When the last unit was done; when it began, before there is one."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A loss curve that is thinned when it is full: every second point goes, and from then on every second one is kept."""

    kept: tuple[tuple[int, float], ...] = ()
    """(step, loss), by step; at most `CURVE`."""
    newest: tuple[int, float] | None = None
    every: int = 1
    """One in so many reports is kept."""
    seen: int = 0

    def add(self, step: int, loss: float) -> Curve:
        """The curve with one more report. A training that went back to its checkpoint keeps what lies before it."""
        kept, every, seen = self.kept, self.every, self.seen
        if self.newest is not None and step <= self.newest[0]:
            kept = tuple(point for point in kept if point[0] < step)
            seen = len(kept) * every
        if seen % every == 0:
            kept = (*kept, (step, loss))
        if len(kept) > CURVE:
            kept, every = kept[::2], 2 * every
        return Curve(kept, (step, loss), every, seen + 1)

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """What is kept, and the newest."""
        return self.kept if self.newest is None or self.newest in self.kept[-1:] else (*self.kept, self.newest)

    @property
    def last(self) -> float | None:
        """The newest loss."""
        return self.newest[1] if self.newest else None


@dataclass(frozen=True, slots=True)
class JobView:
    """One training job as it is seen from the coordinator."""

    name: str
    node: str = ""
    state: JobState = "open"
    stage: str = ""
    step: int = 0
    steps: int = 0
    """0 where nobody has said how many."""
    curve: Curve = Curve()
    tokens: float = 0.0
    seconds: float = 0.0
    """Of training, as the participant says; of the whole job, once it is done."""
    trained: float = 0.0
    """Seconds in which `step` steps and `tokens` tokens were done."""
    attempts: int = 0
    reason: str = ""
    digest: str = ""
    began: float = 0.0
    ended: float = 0.0

    @property
    def pace(self) -> float | None:
        """Seconds for one step, once one has been seen."""
        return self.trained / self.step if self.step and self.trained > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.trained if self.tokens and self.trained > 0 else None


@dataclass(frozen=True, slots=True)
class NodeView:
    """One participant."""

    name: str
    tasks: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    state: NodeState = "here"
    seen: float = 0.0
    """Unix time of the last event of it."""
    job: str = ""
    """What it trains now."""
    done: int = 0
    """Jobs of it that were accepted."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Arrival:
    """An adapter that was accepted."""

    time: float
    node: str
    name: str
    digest: str
    size: int = 0
    """Bytes; 0 where it is not known."""
    norm: float | None = None
    cosine: float | None = None
    """To the mean of its cohort."""


@dataclass(frozen=True, slots=True)
class ContributionView:
    """An expert that was handed in without Flower."""

    digest: str
    task: str = ""
    name: str = ""
    participant: str = ""
    time: float = 0.0
    withdrawn: bool = False


@dataclass(frozen=True, slots=True)
class Note:
    """Something that a person should read."""

    time: float
    text: str


@dataclass(frozen=True, slots=True)
class Status:
    """All of it. Mappings keep the order in which things were first seen."""

    name: str = ""
    state: FederationState = "waiting"
    reason: str = ""
    """Why it failed."""
    began: float = 0.0
    time: float = 0.0
    """Of the newest event."""
    stage: Stage = Stage()
    nodes: Mapping[str, NodeView] = field(default_factory=dict)
    jobs: Mapping[str, JobView] = field(default_factory=dict)
    dropped: int = 0
    """Finished jobs that were left out because there are too many."""
    arrivals: tuple[Arrival, ...] = ()
    """The newest, oldest first."""
    arrived: int = 0
    contributions: Mapping[str, ContributionView] = field(default_factory=dict)
    """By digest."""
    received: int = 0
    """Bytes of adapters that came in, as far as it was told."""
    sent: int = 0
    uploads: Mapping[str, int] = field(default_factory=dict)
    """Bytes that came in, by digest, of the newest adapters."""
    notes: tuple[Note, ...] = ()
    unknown: int = 0
    """Events of kinds that this version does not know."""

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "failed")

    def count(self, state: JobState) -> int:
        """Number of jobs in a state, with those that were left out, which were finished."""
        return sum(job.state == state for job in self.jobs.values()) + self.dropped * (state == "done")

    @property
    def contributed(self) -> int:
        """Number of contributions that are not withdrawn."""
        return sum(not one.withdrawn for one in self.contributions.values())
