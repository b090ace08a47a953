"""Stages with participants that are all there from the start, as in a simulation: greeted once, and each job given out once.

For those that come and go see `server.gathering`, which has the same `work`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from seedbed.common.errors import EnvironmentFailure, SeedbedError
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.server.gathering import Stage
from seedbed.server.ledger import Entry, Ledger
from seedbed.server.observer import Observer
from seedbed.server.plan import PUBLIC, PUBLIC_ROUTER
from seedbed.server.workforce import Failure, Workforce

_HELLO_SECONDS = 600.0
"""For so long the answers to a greeting are waited for, or for a stage's deadline where that is less."""


@dataclass
class _Present:
    """Who takes part: nodes by the task that they bring, and the node (of a simulation) that holds all data."""

    by_task: dict[str, int] = field(default_factory=dict)
    pooled: int | None = None
    names: dict[int, str] = field(default_factory=dict)


@dataclass
class Roster:
    """Everybody who takes part in a run; they are greeted when the first job is to be given out.

    Args:
        workforce: the participants.
        tasks: one expert each.
        pooled: whether somebody must hold the data of all tasks.
        deadline: of a stage, in seconds.
        refusal: why a participant is not let in; empty where it is.
        quorum: raises QuorumError where fewer than needed are there: of what, how many, of how many.
    """

    workforce: Workforce
    tasks: tuple[str, ...]
    pooled: bool
    deadline: float
    refusal: Callable[[Hello], str]
    quorum: Callable[[str, int, int], None]
    ledger: Ledger
    observe: Observer
    _present: _Present | None = None

    def work(self, stage: Stage) -> None:
        """Have the jobs of a stage done; returns when all have ended in one way or the other.

        Raises:
            QuorumError: if too few participants are there.
            EnvironmentFailure: if a job needs somebody with the data of all tasks, and nobody has them.
        """
        nodes = {job.name: self.node_for(job) for job in stage.jobs}
        for job in stage.jobs:
            if nodes[job.name] is None:
                stage.give_up("nobody", job, "no participant brings this task", True)

        def on_answer(node: int, job: Job, answer: JobResult | Failure) -> None:
            try:
                if isinstance(answer, Failure):
                    raise SeedbedError(answer.reason)
                stage.take(job, answer)
            except SeedbedError as error:
                stage.give_up(self._greeted().names.get(node, str(node)), job, error.message, True)

        given = [(node, job) for job in stage.jobs if (node := nodes[job.name]) is not None]
        self.workforce.perform(given, stage.deadline, on_answer)

    def node_for(self, job: Job) -> int | None:
        """Who can do a job; none where nobody brings its data."""
        present = self._greeted()
        if job.kind in ("joint", "molora") or job.tasks[0] in (PUBLIC, PUBLIC_ROUTER):
            return present.pooled
        return present.by_task.get(job.tasks[0])

    def _greeted(self) -> _Present:
        if self._present is None:
            self._present = self._greet()
        return self._present

    def _greet(self) -> _Present:
        answers = self.workforce.hello(len(self.tasks) + self.pooled, min(self.deadline, _HELLO_SECONDS))
        present = _Present()
        for node, answer in answers.items():
            reason = answer.reason if isinstance(answer, Failure) else self.refusal(answer)
            if isinstance(answer, Failure) or reason:
                name = answer.node if isinstance(answer, Hello) else str(node)
                self.ledger.quarantine(name, "hello", reason)
                self.observe.note(f"refused {name}: {reason}")
            else:
                self._enrol(present, node, answer)
        here = [task for task in self.tasks if task in present.by_task]
        self.quorum("hello", len(here), len(self.tasks))
        self.ledger.append(Entry(event="hello", name=", ".join(present.names.values()), detail={"tasks": here}))
        if self.pooled and present.pooled is None:
            raise EnvironmentFailure(
                "no participant holds the data of all tasks, which 'joint', 'molora' and public samples need",
                "Leave them out of combine.candidates, or simulate.",
            )
        return present

    def _enrol(self, present: _Present, node: int, hello: Hello) -> None:
        present.names[node] = hello.node
        if hello.pooled:
            present.pooled = node
            return
        for task in hello.tasks:
            if task in self.tasks:
                present.by_task.setdefault(task, node)
