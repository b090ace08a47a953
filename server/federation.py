"""The stages of a federation: hello, seed, experts, references, routers, combine.

Each stage is a function of earlier artifacts. What the ledger holds is not done again, so a stage after a crash asks only
for what is missing. Evaluation and report follow in `server.evaluation`; Flower is known only to the `Workforce`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from seedbed.common.config import Group, SeedSettings
from seedbed.common.errors import AdapterMismatchError, EnvironmentFailure, QuorumError, SeedbedError
from seedbed.common.events import Event
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.common.manifest import BaseIdentity, recipe_hash
from seedbed.common.storage import read_adapter
from seedbed.server.admission import Admission, Shapes
from seedbed.server.candidates import Candidate
from seedbed.server.cohort import outliers, standings
from seedbed.server.combination import Combination, Combiner, Parts
from seedbed.server.contributions import Contributions
from seedbed.server.exchange import Exchange
from seedbed.server.gathering import Gathering, Pulse, Stage
from seedbed.server.ledger import Entry
from seedbed.server.observer import Observer
from seedbed.server.plan import PUBLIC, PUBLIC_ROUTER, Planner
from seedbed.server.rundir import RunDirectory
from seedbed.server.workforce import Failure, Workforce


@dataclass
class Roster:
    """Who takes part: nodes by the task that they bring, and the node (of a simulation) that holds all data."""

    by_task: dict[str, int] = field(default_factory=dict)
    pooled: int | None = None
    names: dict[int, str] = field(default_factory=dict)

    def drop(self, task: str) -> None:
        self.by_task.pop(task, None)


class Federation:
    """Drives one run from its first message to its combined candidates.

    Args:
        run: the open run directory.
        workforce: the participants; they are greeted only when some job is missing. Those of an `Exchange` come and go.
        base: the base model that everybody must have.
        shapes: ``(out, in)`` of every module that an adapter must have.
        observe: who is told of progress.
    """

    def __init__(
        self, run: RunDirectory, workforce: Workforce | Exchange, base: BaseIdentity, shapes: Shapes, observe: Observer
    ) -> None:
        self.run = run
        self.workforce = workforce
        self.base = base
        self.observe = observe
        self.planner = Planner(run.config, base)
        self.admission = Admission(run.store, shapes, run.config.run.norm_bound, base)
        self.combiner = Combiner(run, base, observe)
        self.tasks = list(run.config.tasks.experts)
        """Expert tasks whose participants are still in."""
        self.diagnostics: dict[str, float] = {}
        """What the combination says of itself, such as `factor_gap_seeded`."""
        self.parts: Parts | None = None
        """What the candidates were made of, once they are there."""
        tasks = run.config.tasks.experts
        self.contributions = Contributions(run.root, self.admission, run.ledger, observe, tasks)
        self._roster: Roster | None = None
        self._gathering = None if isinstance(workforce, Workforce) else Gathering(workforce, self._let_in, observe)
        self._over = self._gathering is not None and run.ledger.contributed is not None
        """The run had finished before: it is only combined again, and nobody is waited for."""
        self._pulse = Pulse(run.root)

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
        guests = self.contributions.guests()
        self._gate(experts, guests, seed)
        parts = self.references(seed)
        contributed = frozenset((*self.contributions.places().values(), *guests.values()))
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
        adapter, manifest = read_adapter(settings.adapter)
        if manifest.base.digest not in ("", self.base.digest):
            raise AdapterMismatchError(
                f"the given seed {settings.adapter} belongs to {manifest.base.name}, expected {self.base.name}",
                "Give a seed of this base model.",
            )
        if {name: factors.shape for name, factors in adapter.items()} != dict(self.admission.shapes):
            raise AdapterMismatchError(
                f"the given seed {settings.adapter} does not adapt the modules of lora.targets",
                "Give a seed trained with the same targets, or change lora.targets.",
            )
        ranks = {factors.rank for factors in adapter.values()}
        if ranks != {self.run.config.lora.rank}:
            raise AdapterMismatchError(
                f"the given seed has rank {min(ranks)} to {max(ranks)}, expected {self.run.config.lora.rank}",
                "Set lora.rank to the seed's rank.",
            )
        return self.combiner.given_seed(adapter)

    def _public_seed(self, settings: SeedSettings) -> str:
        (digest,) = self._stage("seed", [self.planner.public_seed()], late=True).values()
        return digest

    def _federated_seed(self, settings: SeedSettings) -> str:
        parent: str | None = None
        for index in range(settings.rounds):
            name = "seed" if settings.rounds == 1 else f"seed {index + 1}/{settings.rounds}"
            results = self._stage(name, self.planner.seed_round(index, parent, self.tasks), late=True)
            parent = self.combiner.seed(list(results.values()), index)
        assert parent is not None  # rounds is positive
        return parent

    # -- experts ------------------------------------------------------------------------------------------------------

    def experts(self, seed: str | None) -> dict[str, str]:
        """Digests of the experts by task, a contributed one where a participant has not delivered."""
        done = self._stage("experts", self.planner.experts(seed, self.tasks), contributed=True)
        found = {**self.contributions.places(), **self._by_task(done)}
        return {task: found[task] for task in self.run.config.tasks.experts if task in found}

    def _gate(self, experts: dict[str, str], guests: dict[str, str], seed: str | None) -> None:
        """Tell how every expert stands among the others, and take outliers out, where that is asked for."""
        names = {
            **{f"expert:{task}": digest for task, digest in experts.items()},
            **{f"contributed:{name}": digest for name, digest in guests.items()},
        }
        settings = self.run.config.stages
        gated = settings.max_norm_ratio is not None or settings.min_cosine is not None
        if self._gathering is None and not gated:  # a simulation shows nobody, and the report has its own diagnostics
            return
        start = self.run.store.open(seed) if seed else None
        found = standings({name: self.run.store.open(digest) for name, digest in names.items()}, start)
        entries = {entry.digest: entry for entry in self.run.ledger.of("accepted")}
        for name, standing in found.items():
            entry = entries.get(names[name])
            told = {"digest": names[name], "norm": standing.norm}
            told |= {"cosine": standing.cosine} if standing.cosine is not None else {}
            self.observe.tell(
                Event(
                    kind="accepted", node=entry.node if entry else "", name=entry.name if entry else name, detail=told
                )
            )
        bad = outliers(found, max_norm_ratio=settings.max_norm_ratio, min_cosine=settings.min_cosine)
        for name, reason in bad.items():
            entry = entries.get(names[name])
            self._shut_out(entry.node if entry else "", name, reason)
            (experts if name.startswith("expert:") else guests).pop(name.partition(":")[2])
        if bad:
            self._quorum("experts", len(experts), len(self.run.config.tasks.experts))

    # -- references -----------------------------------------------------------------------------------------------------

    def references(self, seed: str | None) -> Parts:
        """The trainings beside the experts. They share one stage to keep workers busy."""
        plan = self.planner
        jobs: list[Job] = plan.molora(self.tasks)  # the longest first
        jobs += [plan.joint(self.tasks)] if plan.wants("joint") else []
        jobs += plan.unseeded(self.tasks) if plan.wants_group("unseeded") else []
        jobs += plan.tuned(seed, self.tasks) if plan.wants_group("tuned") else []
        done = self._stage("references", jobs, shrink=False) if jobs else {}
        groups: dict[Group, dict[str, str]] = {
            group: self._by_task({name: digest for name, digest in done.items() if name.startswith(f"{group}:")})
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
            if candidate.trains_gates:
                if candidate.of not in gates:
                    gates[candidate.of] = self._gates(candidate.of, experts)
                found[candidate.name] = self.combiner.mixer.of_gates(candidate, experts, gates[candidate.of])
            elif candidate.trains_router:
                found[candidate.name] = self._learned(candidate, experts)
        return found

    def _gates(self, group: Group, experts: Mapping[str, str]) -> dict[str, str]:
        """Digests of gates by task. A router without a gate for each of its experts is none: nobody may be missing."""
        return self._by_task(self._stage("gates", self.planner.gates(group, experts), shrink=False, everybody=True))

    def _learned(self, candidate: Candidate, experts: Mapping[str, str]) -> str:
        parent: str | None = None
        for index in range(self.planner.router_rounds):
            jobs = self.planner.routers(candidate, index, parent, experts)
            done = self._stage(f"router {candidate.name}", jobs, shrink=False)
            parent = self.combiner.mixer.mean(candidate, index, experts, list(done.values()))
        assert parent is not None  # there is at least one round
        return parent

    @staticmethod
    def _by_task(done: Mapping[str, str]) -> dict[str, str]:
        return {name.rpartition(":")[2]: digest for name, digest in done.items()}

    # -- asking ---------------------------------------------------------------------------------------------------------

    def _stage(
        self,
        name: str,
        jobs: Sequence[Job],
        *,
        shrink: bool = True,
        everybody: bool = False,
        late: bool = False,
        contributed: bool = False,
    ) -> dict[str, str]:
        """Have jobs done, except those that the ledger holds; returns digests by job name, in the order of the jobs.

        Args:
            shrink: a participant that fails leaves the federation (else only its result is missing).
            everybody: the quorum is all of them.
            late: a participant that was merely not there may take part in later stages.
            contributed: contributed experts take the places of tasks without a result.
        """
        ledger = self.run.ledger
        done = {job.name: entry.digest for job in jobs if (entry := ledger.accepted(job.recipe))}
        places = self._places(jobs, done) if contributed else {}
        missing = [job for job in jobs if job.name not in done and job.name not in places]
        closed = next((entry for entry in ledger.of("closed") if entry.key == _stage_key(name, jobs)), None)
        self.observe.stage(name, 0 if closed or self._over else len(missing))
        absent = set(closed.detail.get("absent", [])) if closed else set()
        if missing and not closed and not self._over:
            absent = self._ask(missing, done, contributed)
            places = self._places(jobs, done) if contributed else {}
        for job in jobs:
            if job.name not in done and shrink and not (late and job.name in absent):
                self._leave(job)
        found = {**places, **done}
        self._quorum(name, len(found), len(jobs), 1.0 if everybody else None)
        if self._gathering is not None and not closed and not self._over:
            detail = {"absent": sorted(absent)}
            ledger.append(Entry(event="closed", name=name, key=_stage_key(name, jobs), detail=detail))
        return {job.name: found[job.name] for job in jobs if job.name in found}

    def _places(self, jobs: Sequence[Job], done: Mapping[str, str]) -> dict[str, str]:
        """Contributed experts for jobs without a result, by job name."""
        places = self.contributions.places()
        return {job.name: places[job.tasks[0]] for job in jobs if job.name not in done and job.tasks[0] in places}

    def _ask(self, jobs: Sequence[Job], done: dict[str, str], contributed: bool) -> set[str]:
        """Give jobs out; results are added to `done`. Returns the names of those that nobody was there for."""
        if self._gathering is not None:
            return self._ask_whoever_comes(self._gathering, jobs, done, contributed)
        assert isinstance(self.workforce, Workforce)
        roster = self._greeted()
        assignments = [(node, job) for job in jobs if (node := self._node_for(job, roster)) is not None]
        lost = [job for job in jobs if self._node_for(job, roster) is None]
        for job in lost:
            self._quarantine("nobody", job, "no participant brings this task")

        def on_answer(node: int, job: Job, answer: JobResult | Failure) -> None:
            try:
                if isinstance(answer, Failure):
                    raise SeedbedError(answer.reason)
                done[job.name] = self.take(job, answer)
            except SeedbedError as error:
                self._quarantine(roster.names.get(node, str(node)), job, error.message)
            self.observe.advance(job.name)

        self.workforce.perform(assignments, self.run.config.stages.deadline, on_answer)
        return set()

    def _ask_whoever_comes(
        self, gathering: Gathering, jobs: Sequence[Job], done: dict[str, str], contributed: bool
    ) -> set[str]:
        settings = self.run.config.stages
        absent: set[str] = set()

        def take(job: Job, answer: JobResult) -> None:
            done[job.name] = self.take(job, answer)
            self.observe.advance(job.name)

        def give_up(node: str, job: Job, reason: str, failed: bool) -> None:
            self._quarantine(node, job, reason)
            self.observe.advance(job.name)
            if not failed:
                absent.add(job.name)

        gathering.work(
            Stage(
                jobs=jobs,
                deadline=settings.deadline,
                attempts=settings.attempts,
                silence=settings.silence,
                patience=settings.patience * settings.deadline,
                take=take,
                give_up=give_up,
                elsewhere=(lambda: tuple(self._places(jobs, done))) if contributed else tuple,
                alive=self._pulse.alive,
            )
        )
        return absent

    def take(self, job: Job, answer: JobResult) -> str:
        """Check a participant's answer, record it, and return its digest.

        Raises:
            SeedbedError: if it is not what was asked for.
        """
        if answer.error:
            raise SeedbedError(answer.error, answer.hint)
        if answer.recipe != job.recipe:
            raise AdapterMismatchError("the answer is for another job")
        manifest = self.admission.admit(job, answer)
        detail = {"steps": job.training.steps, **manifest.metrics}
        self.run.ledger.accept(answer, detail)
        told = {**detail, "digest": answer.digest, "seconds": answer.seconds}
        self.observe.tell(Event(kind="accepted", node=answer.node, name=job.name, detail=told))
        return answer.digest

    def node_for(self, job: Job) -> int | None:
        """Who can do a job; none where nobody brings its data. Greets everybody first."""
        return self._node_for(job, self._greeted())

    def _node_for(self, job: Job, roster: Roster) -> int | None:
        if job.kind in ("joint", "molora") or job.tasks[0] in (PUBLIC, PUBLIC_ROUTER):
            return roster.pooled
        return roster.by_task.get(job.tasks[0])

    def _leave(self, job: Job) -> None:
        for task in job.tasks:
            if task in self.tasks:
                self.tasks.remove(task)
            if self._roster is not None:
                self._roster.drop(task)

    def _quarantine(self, node: str, job: Job, reason: str) -> None:
        self._shut_out(node, job.name, reason)

    def _shut_out(self, node: str, name: str, reason: str) -> None:
        self.run.ledger.quarantine(node, name, reason)
        self.observe.note(f"quarantined {node}, {name}: {reason}")
        self.observe.tell(Event(kind="quarantined", node=node, name=name, detail={"reason": reason}))

    def _quorum(self, stage: str, got: int, asked: int, share: float | None = None) -> None:
        needed = math.ceil(asked * (share or self.run.config.stages.quorum) - 1e-9)
        if got < needed:
            reasons = "; ".join(
                f"{entry.node} ({entry.name}): {entry.reason}"
                for entry in list(self.run.ledger.of("quarantined"))[-(asked - got) :]
            )
            raise QuorumError(
                f"stage '{stage}' has {got} of {asked} results and needs {needed}: {reasons}",
                "Mend the participants and continue with --resume, or lower stages.quorum.",
            )

    # -- hello ----------------------------------------------------------------------------------------------------------

    def _greeted(self) -> Roster:
        """Greet everybody, once, when the first job is to be given out."""
        if self._roster is None:
            self._roster = self._greet()
        return self._roster

    def _greet(self) -> Roster:
        config = self.run.config
        assert isinstance(self.workforce, Workforce)
        expected = len(config.tasks.experts) + self.planner.needs_pooled_data
        answers = self.workforce.hello(expected, min(config.stages.deadline, 600.0))
        roster = Roster()
        for node, answer in answers.items():
            reason = self._refusal(answer)
            if reason:
                name = answer.node if isinstance(answer, Hello) else str(node)
                self.run.ledger.quarantine(name, "hello", reason)
                self.observe.note(f"refused {name}: {reason}")
            else:
                assert isinstance(answer, Hello)
                self._enrol(roster, node, answer)
        here = [task for task in config.tasks.experts if task in roster.by_task]
        self._quorum("hello", len(here), len(config.tasks.experts))
        self.run.ledger.append(Entry(event="hello", name=", ".join(roster.names.values()), detail={"tasks": here}))
        if self.planner.needs_pooled_data and roster.pooled is None:
            raise EnvironmentFailure(
                "no participant holds the data of all tasks, which 'joint', 'molora' and public samples need",
                "Leave them out of combine.candidates, or simulate.",
            )
        return roster

    def _enrol(self, roster: Roster, node: int, hello: Hello) -> None:
        roster.names[node] = hello.node
        if hello.pooled:
            roster.pooled = node
            return
        for task in hello.tasks:
            if task in self.run.config.tasks.experts:
                roster.by_task.setdefault(task, node)

    def _let_in(self, hello: Hello) -> str:
        """Why a participant that comes is refused; empty where it is let in."""
        reason = self._refusal(hello)
        if reason:
            self.run.ledger.quarantine(hello.node, "hello", reason)
        else:
            self.run.ledger.append(Entry(event="hello", name=hello.node, detail={"tasks": list(hello.tasks)}))
        return reason

    def _refusal(self, answer: Hello | Failure) -> str:
        from importlib.metadata import version

        if isinstance(answer, Failure):
            return answer.reason
        if answer.version != version("seedbed"):
            return f"it runs seedbed {answer.version}, the coordinator {version('seedbed')}"
        if answer.base.digest != self.base.digest:
            return (
                f"its base model {answer.base.name} has hash {answer.base.digest[:12]}…, "
                f"expected {self.base.name} with {self.base.digest[:12]}…"
            )
        return ""


def _stage_key(name: str, jobs: Sequence[Job]) -> str:
    return recipe_hash({"stage": name, "jobs": [job.recipe for job in jobs]})
