"""The stages of a federation: seed, experts, references, routers, combine.

Each stage is a function of earlier artifacts; `server.stages` has their jobs done. Evaluation and report follow in
`server.evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from seedbed.common.config import Group, SeedSettings
from seedbed.common.errors import ConfigError
from seedbed.common.events import Event
from seedbed.common.jobs import Job, JobResult
from seedbed.common.manifest import BaseIdentity
from seedbed.common.routing.settings import RouterSettings
from seedbed.server.admission import Admission, Shapes
from seedbed.server.candidates import Candidate
from seedbed.server.cohort import outliers, standings
from seedbed.server.combination import Combination, Combiner, Parts
from seedbed.server.messenger import Messenger
from seedbed.server.observer import Observer
from seedbed.server.plan import Planner
from seedbed.server.rundir import RunDirectory
from seedbed.server.stages import Stages
from seedbed.server.workforce import Workforce


class Federation:
    """Drives one run from its first message to its combined candidates.

    Args:
        run: the open run directory.
        workforce: the participants; they are greeted only when some job is missing. Those behind a `Messenger` come and go.
        base: the base model that everybody must have.
        shapes: ``(out, in)`` of every module that an adapter must have.
        observe: who is told of progress.
    """

    def __init__(
        self, run: RunDirectory, workforce: Workforce | Messenger, base: BaseIdentity, shapes: Shapes, observe: Observer
    ) -> None:
        self.run = run
        self.base = base
        self.observe = observe
        self.planner = Planner(run.config, base)
        self.admission = Admission(run.store, shapes, run.config.run.norm_bound, base)
        self.combiner = Combiner(run, base, observe)
        pooled = self.planner.needs_pooled_data
        self.stages = Stages(run, workforce, base, self.admission, observe, pooled=pooled)
        self.diagnostics: dict[str, float] = {}
        """What the combination says of itself, such as `factor_gap_seeded`."""
        self.parts: Parts | None = None
        """What the candidates were made of, once they are there."""

    def conduct(self, *, diagnose: bool = True) -> list[Combination]:
        """All stages up to the candidates, and what can be said of their combination, which takes merging in other orders.

        Raises:
            QuorumError: if a stage ends with too few results.
        """
        parts = self.train()
        if diagnose:
            self.diagnostics = self.combiner.diagnostics(parts)
        return self.combiner.combine(parts)

    def train(self) -> Parts:
        """All stages in which participants are asked.

        Raises:
            QuorumError: if a stage ends with too few results.
        """
        seed = self.seed()
        experts = self.experts(seed)
        guests = self.stages.contributions.guests()
        self._gate(experts, guests, seed)
        parts = self.references(seed)
        contributed = frozenset((*self.stages.contributions.places().values(), *guests.values()))
        groups: dict[Group, Mapping[str, str]] = {"experts": experts, **parts.groups}
        parts = replace(parts, groups=groups, guests=guests, contributed=contributed)
        self.parts = replace(parts, routers=self.routers(parts))
        return self.parts

    # -- seed ---------------------------------------------------------------------------------------------------------

    def seed(self) -> str | None:
        """The digest of the seed adapter; none for a federation without one."""
        settings = self.run.config.seed
        makers: dict[str, Callable[[SeedSettings], str | None]] = {
            "none": lambda _: None,
            "given": self._given_seed,
            "public": self._public_seed,
            "federated": self._federated_seed,
        }
        return makers[settings.mode](settings)

    def _given_seed(self, settings: SeedSettings) -> str:
        assert settings.adapter is not None  # config has checked it
        return self.combiner.given_seed(self.admission.admit_seed(settings.adapter, self.run.config.lora.rank))

    def _public_seed(self, settings: SeedSettings) -> str:
        (digest,) = self.stages.have("seed", [self.planner.public_seed()], late=True).values()
        return digest

    def _federated_seed(self, settings: SeedSettings) -> str:
        parent: str | None = None
        for index in range(settings.rounds):
            name = "seed" if settings.rounds == 1 else f"seed {index + 1}/{settings.rounds}"
            results = self.stages.have(name, self.planner.seed_round(index, parent, self.stages.tasks), late=True)
            parent = self.combiner.seed(list(results.values()), index)
        assert parent is not None  # rounds is positive
        return parent

    # -- experts ------------------------------------------------------------------------------------------------------

    def experts(self, seed: str | None) -> dict[str, str]:
        """Digests of the experts by task, a contributed one where a participant has not delivered."""
        done = self.stages.have("experts", self.planner.experts(seed, self.stages.tasks), contributed=True)
        found = {**self.stages.contributions.places(), **_by_task(done)}
        return {task: found[task] for task in self.run.config.tasks.experts if task in found}

    def _gate(self, experts: dict[str, str], guests: dict[str, str], seed: str | None) -> None:
        """Tell how every expert stands among the others, and take outliers out, where that is asked for."""
        names = {
            **{f"expert:{task}": digest for task, digest in experts.items()},
            **{f"contributed:{name}": digest for name, digest in guests.items()},
        }
        settings = self.run.config.stages
        gated = settings.max_norm_ratio is not None or settings.min_cosine is not None
        if not self.stages.deployed and not gated:  # a simulation shows nobody, and the report has its own diagnostics
            return
        start = self.run.store.open(seed) if seed else None
        found = standings({name: self.run.store.open(digest) for name, digest in names.items()}, start)
        entries = {entry.digest: entry for entry in self.run.ledger.of("accepted")}
        for name, standing in found.items():
            entry = entries.get(names[name])
            told = {"digest": names[name], "norm": standing.norm}
            told |= {"cosine": standing.cosine} if standing.cosine is not None else {}
            told |= {"again": True} if self.stages.again else {}  # it is no sign of life
            self.observe.tell(
                Event(
                    kind="accepted", node=entry.node if entry else "", name=entry.name if entry else name, detail=told
                )
            )
        bad = outliers(found, max_norm_ratio=settings.max_norm_ratio, min_cosine=settings.min_cosine)
        for name, reason in bad.items():
            entry = entries.get(names[name])
            self.stages.shut_out(entry.node if entry else "", name, reason)
            (experts if name.startswith("expert:") else guests).pop(name.partition(":")[2])
        if bad:
            self.stages.require_quorum("experts", len(experts), len(self.run.config.tasks.experts))

    # -- references -----------------------------------------------------------------------------------------------------

    def references(self, seed: str | None) -> Parts:
        """The trainings beside the experts. They share one stage to keep workers busy."""
        plan = self.planner
        jobs: list[Job] = plan.molora(self.stages.tasks)  # the longest first
        jobs += [plan.joint(self.stages.tasks)] if plan.wants("joint") else []
        jobs += plan.unseeded(self.stages.tasks) if plan.wants_group("unseeded") else []
        jobs += plan.tuned(seed, self.stages.tasks) if plan.wants_group("tuned") else []
        done = self.stages.have("references", jobs, shrink=False) if jobs else {}
        groups: dict[Group, dict[str, str]] = {
            group: _by_task({name: digest for name, digest in done.items() if name.startswith(f"{group}:")})
            for group in ("unseeded", "tuned")
        }
        alone = {name: digest for name, digest in done.items() if not name.startswith(("unseeded:", "tuned:"))}
        return Parts(seed, {group: digests for group, digests in groups.items() if digests}, alone)

    # -- routers --------------------------------------------------------------------------------------------------------

    def routers(self, parts: Parts) -> dict[str, str]:
        """Digests of the trained routers, by candidate; all others are computed when candidates are combined."""
        found: dict[str, str] = {}
        gates: dict[Group, dict[str, str]] = {}
        for candidate in self.planner.candidates:
            experts = parts.trained_here(candidate.of)
            if candidate.routing is not None and not _possible(candidate.routing, len(experts)):
                continue  # experts are missing; `Combiner.combine` says so
            if candidate.trains_gates:
                if candidate.of not in gates:
                    gates[candidate.of] = self._gates(candidate.of, experts)
                found[candidate.name] = self.combiner.mixer.of_gates(candidate, experts, gates[candidate.of])
            elif candidate.trains_router:
                found[candidate.name] = self._learned(candidate, experts)
        return found

    def _gates(self, group: Group, experts: Mapping[str, str]) -> dict[str, str]:
        """Digests of gates by task. A router without a gate for each of its experts is none: nobody may be missing."""
        return _by_task(self.stages.have("gates", self.planner.gates(group, experts), shrink=False, everybody=True))

    def _learned(self, candidate: Candidate, experts: Mapping[str, str]) -> str:
        parent: str | None = None
        for index in range(self.planner.router_rounds):
            jobs = self.planner.routers(candidate, index, parent, experts)
            done = self.stages.have(f"router {candidate.name}", jobs, shrink=False)
            parent = self.combiner.mixer.mean(candidate, index, experts, list(done.values()))
        assert parent is not None  # there is at least one round
        return parent

    # -- for those who give jobs out themselves ---------------------------------------------------------------------------

    def take(self, job: Job, answer: JobResult) -> str:
        """See `Stages.take`."""
        return self.stages.take(job, answer)

    def node_for(self, job: Job) -> int | None:
        """See `Stages.node_for`."""
        return self.stages.node_for(job)


def _possible(routing: RouterSettings, experts: int) -> bool:
    try:
        routing.require(experts)
    except ConfigError:
        return False
    return True


def _by_task(done: Mapping[str, str]) -> dict[str, str]:
    return {name.rpartition(":")[2]: digest for name, digest in done.items()}
