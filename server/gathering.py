"""Stages with participants that come late, vanish and come back: greeted when they come, given jobs while a stage is open.

`Assignments` decides who gets what; `Messenger` carries it; here the two meet, until all jobs are done or the deadline is
there. `server.roster` is for participants that are all there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from seedbed.common.errors import SeedbedError
from seedbed.common.events import Event, EventLog
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.server.assignments import Assignment, Assignments
from seedbed.server.messenger import Answer, Messenger
from seedbed.server.observer import Observer
from seedbed.server.plan import PUBLIC, PUBLIC_ROUTER
from seedbed.server.workforce import Failure

_GREETING_SECONDS = 30.0
"""How long a greeting may stay unanswered before it is sent again; twice as long after each further one."""
_GREETING_LASTS = 600.0
"""For so long an answer to it counts: on a busy machine the process that answers takes minutes to start."""
_MISSING_SECONDS = 60.0
"""How often it is said again whom the stage waits for."""


@dataclass
class Stage:
    """What one stage has to do, and how long it may take.

    Args:
        jobs: of different names.
        deadline: seconds.
        take: checks an answer and records it; raises SeedbedError where it is refused.
        give_up: is told, once for each job that ends without a result: whose fault (a name), and why, and whether it failed
            (else nobody was there to do it, who may come yet).
        elsewhere: results that came on other ways, by job name; asked again and again.
        alive: names of jobs that have shown signs of life since the last call.
    """

    jobs: Sequence[Job]
    deadline: float
    attempts: int
    silence: float
    patience: float
    take: Callable[[Job, JobResult], None]
    give_up: Callable[[str, Job, str, bool], None]
    elsewhere: Callable[[], Sequence[str]] = tuple
    alive: Callable[[], Sequence[str]] = tuple


@dataclass
class Gathering:
    """Everybody who is or was here, over all stages of a run.

    Args:
        messenger: carries messages.
        refusal: why a participant is not let in; empty where it is.
        observe: is told who comes and goes.
    """

    messenger: Messenger
    refusal: Callable[[Hello], str]
    observe: Observer
    members: dict[int, Hello] = field(default_factory=dict)
    """Who is here and was let in."""
    names: dict[int, str] = field(default_factory=dict)
    """Also of those who are gone."""
    _greeted: dict[int, tuple[float, float]] = field(default_factory=dict)
    """When a node was greeted last, and how long that may stay unanswered."""
    _refused: set[int] = field(default_factory=set)

    def work(self, stage: Stage) -> None:
        """Have the jobs of a stage done; returns when all have ended in one way or the other."""
        desk = Assignments(stage.jobs, attempts=stage.attempts, silence=stage.silence, patience=stage.patience)
        for node, hello in self.members.items():
            desk.welcome(node, hello.node, tasks_of(hello))
        end = self.messenger.now() + stage.deadline
        told: tuple[float, list[str]] = (float("-inf"), [])
        while not desk.over and self.messenger.now() < end:
            self._attend(desk)
            for answer in self.messenger.collect():
                self._hear(answer, desk, stage)
            self._elsewhere(desk, stage)
            for due in desk.due(self.messenger.now()):
                self._give(due, max(1.0, end - self.messenger.now()))
            told = self._say_missing(desk, told)
            if not desk.over:
                self.messenger.pause()
        for job, blamed, reason in desk.remaining():
            if reason == "did not answer":
                reason = f"did not answer within {stage.deadline:.0f} s"
            stage.give_up("nobody" if blamed is None else self._name(blamed), job, reason, False)

    def _attend(self, desk: Assignments) -> None:
        """Greet who is new, and part from who is gone."""
        present, now = self.messenger.present(), self.messenger.now()
        for node in [node for node in (*self.members, *self._refused) if node not in present]:
            self._part(node, desk)
        for node in sorted(present - self.members.keys() - self._refused):
            last, wait = self._greeted.get(node, (float("-inf"), 0.0))
            if now - last >= wait:
                self._greeted[node] = now, 2 * wait or _GREETING_SECONDS
                self.messenger.greet(node, _GREETING_LASTS)

    def _part(self, node: int, desk: Assignments) -> None:
        self._greeted.pop(node, None)
        self._refused.discard(node)
        if self.members.pop(node, None) is None:
            return
        left = desk.depart(node)
        more = f"; {left[0].name} is open again" if left else ""
        self.observe.note(f"{self._name(node)} is gone{more}")
        self.observe.tell(Event(kind="node", node=self._name(node), detail={"state": "gone"}))

    def _hear(self, answer: Answer, desk: Assignments, stage: Stage) -> None:
        if answer.job is None:
            self._meet(answer.node, answer.value, desk)
        elif desk.wants(answer.job.name):
            self._judge(answer.node, answer.job, answer.value, desk, stage)

    def _meet(self, node: int, value: Hello | JobResult | Failure, desk: Assignments) -> None:
        if not self._is_new(node):  # it was greeted twice, and answers twice
            return
        if not isinstance(value, Hello):
            if isinstance(value, Failure) and not value.vanished:
                self._refuse(node, str(node), value.reason)
            return
        self.names[node] = value.node
        reason = self.refusal(value)
        if reason:
            return self._refuse(node, value.node, reason)
        self.members[node] = value
        desk.welcome(node, value.node, tasks_of(value))
        detail = {"state": "joined", "tasks": list(value.tasks), "devices": list(value.devices)}
        self.observe.note(f"{value.node} joined with {', '.join(value.tasks) or 'no task'}")
        return self.observe.tell(Event(kind="node", node=value.node, detail=detail))

    def _refuse(self, node: int, name: str, reason: str) -> None:
        self._refused.add(node)
        self.observe.note(f"refused {name}: {reason}")
        self.observe.tell(Event(kind="node", node=name, detail={"state": "refused", "reason": reason}))

    def _judge(self, node: int, job: Job, value: Hello | JobResult | Failure, desk: Assignments, stage: Stage) -> None:
        if isinstance(value, Failure) and value.vanished:
            desk.vanished(node, job.name)
            self._tell(node, job, "failed", value.reason)
            return
        try:
            if not isinstance(value, JobResult):
                raise SeedbedError(value.reason if isinstance(value, Failure) else "the answer is no result")
            stage.take(job, value)
        except SeedbedError as error:
            self._tell(node, job, "failed", error.message)
            if desk.failed(node, job.name, error.message):
                stage.give_up(self._name(node), job, error.message, True)
            else:
                self.observe.note(f"{self._name(node)} failed {job.name}, which is asked again: {error.message}")
            return
        desk.settle(job.name)

    def _elsewhere(self, desk: Assignments, stage: Stage) -> None:
        for name in stage.elsewhere():
            if desk.wants(name):
                desk.settle(name)
        now = self.messenger.now()
        for name in stage.alive():
            desk.heard(name, now)

    def _give(self, due: Assignment, seconds: float) -> None:
        self.messenger.ask(due.node, due.job, seconds)
        if not due.repeated:
            steps = {"steps": due.job.training.steps, "attempt": due.attempt}
            self._tell(due.node, due.job, "running", "", **steps)

    def _tell(self, node: int, job: Job, state: str, reason: str, **more: int) -> None:
        detail = {"state": state, **({"reason": reason} if reason else {}), **more}
        self.observe.tell(Event(kind="job", node=self._name(node), name=job.name, detail=detail))

    def _say_missing(self, desk: Assignments, told: tuple[float, list[str]]) -> tuple[float, list[str]]:
        """Whom the stage waits for: said when that changes, and now and then."""
        missing, now = desk.missing(), self.messenger.now()
        before, last = told
        new = [when for node, (when, _) in self._greeted.items() if self._is_new(node)]
        greeting = any(now - when < _GREETING_SECONDS for when in new)
        if greeting or (missing == last and (not missing or now - before < _MISSING_SECONDS)):
            return told
        if missing:
            self.observe.note(f"waiting for participants that bring: {', '.join(dict.fromkeys(missing))}")
        return now, missing

    def _is_new(self, node: int) -> bool:
        return node not in self.members and node not in self._refused

    def _name(self, node: int) -> str:
        return self.names.get(node, str(node))


def tasks_of(hello: Hello) -> tuple[str, ...]:
    """Tasks whose jobs a participant can do."""
    return (*hello.tasks, PUBLIC, PUBLIC_ROUTER) if hello.pooled else hello.tasks


class Pulse:
    """Signs of life of jobs: steps of trainings, as participants report them to the registry of a run.

    Args:
        run: its directory.
    """

    def __init__(self, run: Path) -> None:
        self._log = EventLog(run / "events.jsonl")
        self._offset = self._log.path.stat().st_size if self._log.path.exists() else 0

    def alive(self) -> Sequence[str]:
        """Names of the jobs that have made steps since the last call."""
        events, self._offset = self._log.read_some(self._offset)
        return tuple({event.name for event in events if event.kind == "step"})
