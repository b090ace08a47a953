"""How one stage comes to its results: what the ledger holds is not done again, the rest is asked for, and enough must come.

A stage that is closed stays so after a crash: what was made of its results is not made again with one more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from seedbed.common.errors import QuorumError
from seedbed.common.events import Event
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.common.manifest import BaseIdentity, recipe_hash
from seedbed.server.admission import Admission, why_not_let_in
from seedbed.server.contributions import Contributions, state_of
from seedbed.server.gathering import Gathering, Pulse, Stage
from seedbed.server.ledger import Entry
from seedbed.server.messenger import Messenger
from seedbed.server.observer import Observer
from seedbed.server.roster import Roster
from seedbed.server.rundir import RunDirectory
from seedbed.server.workforce import Workforce


class Stages:
    """Has jobs done by participants, one stage after the other.

    Args:
        run: the open run directory.
        workforce: the participants, who are greeted only when some job is missing; behind a `Messenger` they come and go.
        base: the base model that everybody must have.
        pooled: whether some job needs somebody who holds the data of all tasks.
        admission: the refusals of results.
        observe: who is told of progress.
    """

    def __init__(
        self,
        run: RunDirectory,
        workforce: Workforce | Messenger,
        base: BaseIdentity,
        admission: Admission,
        observe: Observer,
        *,
        pooled: bool,
    ) -> None:
        self.run, self.base, self.admission, self.observe = run, base, admission, observe
        self.tasks = list(run.config.tasks.experts)
        """Expert tasks whose participants are still in."""
        self.contributions = Contributions(
            run.root, admission, run.ledger, observe, run.config.tasks.experts, self.shut_out
        )
        self.deployed = not isinstance(workforce, Workforce)
        """Participants are on machines of their own, and may come late, vanish and come back."""
        self._crew: Roster | Gathering
        if isinstance(workforce, Workforce):
            config = run.config
            deadline, experts = config.stages.deadline, config.tasks.experts
            self._crew = Roster(
                workforce, experts, pooled, deadline, self._refusal, self.require_quorum, run.ledger, observe
            )
        else:
            self._crew = Gathering(workforce, self._let_in, observe)
        self.again = self.deployed and run.ledger.contributed is not None
        """The run had finished before: it is only combined again, and nobody is waited for."""
        self._pulse = Pulse(run.root)
        self.counted: list[str] = []
        """The state of the contributions (`state_of`) that the experts were chosen from, or an older one."""

    def have(
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

        Raises:
            QuorumError: if there are too few results.
        """
        ledger = self.run.ledger
        done = {job.name: entry.digest for job in jobs if (entry := ledger.accepted(job.recipe))}
        places = self._counted_places(jobs, done) if contributed else {}
        missing = [job for job in jobs if job.name not in done and job.name not in places]
        key = recipe_hash({"stage": name, "jobs": [job.recipe for job in jobs]})
        closed = next((entry for entry in ledger.of("closed") if entry.key == key), None)
        self.observe.stage(name, 0 if closed or self.again else len(missing))
        absent = set(closed.detail.get("absent", [])) if closed else set()
        if missing and not closed and not self.again:
            absent = self._ask(missing, done, contributed)
            places = self._counted_places(jobs, done) if contributed else {}
        for job in jobs:
            if job.name not in done and shrink and not (late and job.name in absent):
                self.tasks = [task for task in self.tasks if task not in job.tasks]
        found = {**places, **done}
        self.require_quorum(name, len(found), len(jobs), 1.0 if everybody else None)
        if self.deployed and not closed and not self.again:
            ledger.append(Entry(event="closed", name=name, key=key, detail={"absent": sorted(absent)}))
        return {job.name: found[job.name] for job in jobs if job.name in found}

    def take(self, job: Job, answer: JobResult) -> str:
        """Check a participant's answer, record it, and return its digest.

        Raises:
            SeedbedError: if it is not what was asked for.
        """
        manifest = self.admission.admit(job, answer)
        detail = {"steps": job.training.steps, **manifest.metrics}
        self.run.ledger.accept(answer, detail)
        told = {**detail, "digest": answer.digest, "seconds": answer.seconds}
        self.observe.tell(Event(kind="accepted", node=answer.node, name=job.name, detail=told))
        return answer.digest

    def node_for(self, job: Job) -> int | None:
        """Who can do a job; none where nobody brings its data. Greets everybody first; not of participants who come and go."""
        assert isinstance(self._crew, Roster)
        return self._crew.node_for(job)

    def shut_out(self, node: str, name: str, reason: str) -> None:
        """Say and record why a result is not used, or not there."""
        self.run.ledger.quarantine(node, name, reason)
        self.observe.note(f"quarantined {node}, {name}: {reason}")
        self.observe.tell(Event(kind="quarantined", node=node, name=name, detail={"reason": reason}))

    def require_quorum(self, stage: str, got: int, asked: int, share: float | None = None) -> None:
        """
        Args:
            share: of what was asked; `stages.quorum` unless given.

        Raises:
            QuorumError: if too little has come, with the reasons.
        """
        needed = math.ceil(asked * (share or self.run.config.stages.quorum) - 1e-9)
        if self.again and 0 < got < needed and share is None:
            # Nobody can be asked any more, and who withdraws an expert has a right to a result without it.
            self.observe.note(f"stage '{stage}' is combined again from {got} of {asked} results")
        elif got < needed:
            reasons = "; ".join(
                f"{entry.node} ({entry.name}): {entry.reason}"
                for entry in list(self.run.ledger.of("quarantined"))[-(asked - got) :]
            )
            raise QuorumError(
                f"stage '{stage}' has {got} of {asked} results and needs {needed}: {reasons or 'the others were withdrawn'}",
                "Mend the participants and continue with --resume, or lower stages.quorum.",
            )

    def _counted_places(self, jobs: Sequence[Job], done: Mapping[str, str]) -> dict[str, str]:
        """`_places`, and a note of the state before: what comes or goes meanwhile is combined another time."""
        self.counted = state_of(self.run.root)
        return self._places(jobs, done)

    def _places(self, jobs: Sequence[Job], done: Mapping[str, str]) -> dict[str, str]:
        """Contributed experts for jobs without a result, by job name."""
        places = self.contributions.places()
        return {job.name: places[job.tasks[0]] for job in jobs if job.name not in done and job.tasks[0] in places}

    def _ask(self, jobs: Sequence[Job], done: dict[str, str], contributed: bool) -> set[str]:
        """Give jobs out; results are added to `done`. Returns the names of those that nobody was there for."""
        settings = self.run.config.stages
        absent: set[str] = set()

        def take(job: Job, answer: JobResult) -> None:
            done[job.name] = self.take(job, answer)
            self.observe.advance(job.name)

        def give_up(node: str, job: Job, reason: str, failed: bool) -> None:
            self.shut_out(node, job.name, reason)
            self.observe.advance(job.name)
            if not failed:
                absent.add(job.name)

        self._crew.work(
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

    def _refusal(self, hello: Hello) -> str:
        return why_not_let_in(hello, self.base)

    def _let_in(self, hello: Hello) -> str:
        """Why a participant that comes is refused; empty where it is let in."""
        reason = self._refusal(hello)
        if reason:
            self.run.ledger.quarantine(hello.node, "hello", reason)
        else:
            self.run.ledger.append(Entry(event="hello", name=hello.node, detail={"tasks": list(hello.tasks)}))
        return reason
