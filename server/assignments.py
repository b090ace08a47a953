"""Who gets which job next, where participants come late, vanish and come back: pure bookkeeping, told what happens and when.

A participant has one job at a time. Of several that bring the same task one is asked; another is its spare. What is told:

    vanished     the job is open again, and it was nobody's fault
    failed       an attempt of that participant; after `attempts` of them it does not get this job again
    silent       nothing was heard of the job for `silence` seconds: the same participant is asked again (a job that is
                 asked twice trains once), each time after twice the seconds, and after `patience` seconds a spare,
                 too, where there is one

The first good answer counts; whatever comes after it is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from seedbed.common.jobs import Job


@dataclass
class _Member:
    """A participant that is there."""

    name: str
    tasks: frozenset[str]
    arrived: int
    given: int = 0
    """Jobs that it has been given."""


@dataclass
class _Place:
    """One job and its fate."""

    job: Job
    asked: dict[int, float] = field(default_factory=dict)
    """Participants that have it now, and when it was last heard of from them."""
    since: float | None = None
    """When the first of those was asked."""
    repeats: int = 0
    """How often it was asked again. A sign of life does not take that back: where such signs are rarer than `silence`
    seconds, the wait so becomes longer than they are apart, and nobody is asked again and again in vain."""
    failures: dict[int, int] = field(default_factory=dict)
    """Failed attempts by participant, also of those that are gone."""
    reason: str = ""
    blamed: int | None = None
    settled: bool = False
    given_up: bool = False

    @property
    def open(self) -> bool:
        return not self.settled and not self.given_up


@dataclass(frozen=True, slots=True)
class Assignment:
    """A job for a participant, to be asked now."""

    node: int
    job: Job
    attempt: int
    """1 for the first time."""
    repeated: bool = False
    """It has been asked for this job before, and nothing has been heard."""


class Assignments:
    """The jobs of one stage.

    Args:
        jobs: of different names.
        attempts: how often a participant may fail one job.
        silence: seconds after which a silent participant is asked again; doubled each time.
        patience: seconds after which a spare is asked beside a silent participant.
    """

    def __init__(self, jobs: Sequence[Job], *, attempts: int, silence: float, patience: float) -> None:
        self._places = {job.name: _Place(job) for job in jobs}
        self._members: dict[int, _Member] = {}
        self._gone: dict[int, _Member] = {}
        self._attempts, self._silence, self._patience = attempts, silence, patience
        self._arrivals = 0

    @property
    def over(self) -> bool:
        """Whether nothing is to be waited for any more."""
        return not any(place.open for place in self._places.values())

    def welcome(self, node: int, name: str, tasks: Iterable[str]) -> None:
        """A participant is there and brings these tasks."""
        self._arrivals += 1
        self._gone.pop(node, None)
        self._members[node] = _Member(name, frozenset(tasks), self._arrivals)

    def depart(self, node: int) -> list[Job]:
        """A participant has vanished; returns what it had."""
        if node in self._members:
            self._gone[node] = self._members.pop(node)
        left = [place for place in self._places.values() if place.asked.pop(node, None) is not None]
        for place in left:
            self._review(place)
        return [place.job for place in left]

    def due(self, now: float) -> list[Assignment]:
        """What is to be asked now; it counts as asked."""
        found = []
        for place in self._places.values():
            if not place.open:
                continue
            if not place.asked:
                node = self._choose(place)
                if node is not None:
                    place.since, place.repeats = now, 0
                    found.append(self._give(place, node, now))
                continue
            found += self._repeat(place, now)
            if place.since is not None and now - place.since >= self._patience and len(place.asked) == 1:
                spare = self._choose(place)
                if spare is not None:
                    found.append(self._give(place, spare, now))
        return found

    def heard(self, name: str, now: float) -> None:
        """A job shows signs of life."""
        place = self._places.get(name)
        if place is not None:
            place.asked = dict.fromkeys(place.asked, now)

    def wants(self, name: str) -> bool:
        """Whether a job is still to be answered."""
        return name in self._places and self._places[name].open

    def settle(self, name: str) -> None:
        """A job has its result, from wherever."""
        place = self._places[name]
        place.settled, place.asked = True, {}

    def failed(self, node: int, name: str, reason: str) -> bool:
        """A participant has failed a job; returns whether the job is given up with that."""
        place = self._places[name]
        if not place.open:
            return False
        place.asked.pop(node, None)
        place.failures[node] = place.failures.get(node, 0) + 1
        place.reason, place.blamed = reason, node
        self._review(place)
        return place.given_up

    def vanished(self, node: int, name: str) -> None:
        """What a participant had of a job is lost with it: the job is open again."""
        place = self._places[name]
        place.asked.pop(node, None)
        self._review(place)

    def missing(self) -> list[str]:
        """Tasks of open jobs that nobody here brings."""
        return [
            place.job.tasks[0]
            for place in self._places.values()
            if place.open and not any(place.job.tasks[0] in member.tasks for member in self._members.values())
        ]

    def remaining(self) -> list[tuple[Job, int | None, str]]:
        """Open jobs at the end of the stage: whom to blame, and what for."""
        found: list[tuple[Job, int | None, str]] = []
        for place in self._places.values():
            if not place.open:
                continue
            if place.asked:
                found.append((place.job, next(iter(place.asked)), "did not answer"))
            elif place.reason:
                found.append((place.job, place.blamed, place.reason))
            elif place.since is not None:
                found.append((place.job, None, "the participant that had it vanished and did not come back"))
            else:
                found.append((place.job, None, "no participant brings this task"))
        return found

    def _choose(self, place: _Place) -> int | None:
        """The idle participant that has failed this job least, then has had fewest jobs, then came first."""
        task = place.job.tasks[0]
        able = [
            (place.failures.get(node, 0), member.given, member.arrived, node)
            for node, member in self._members.items()
            if task in member.tasks and node not in place.asked and not self._busy(node)
        ]
        fit = [entry for entry in able if entry[0] < self._attempts]
        return min(fit)[-1] if fit else None

    def _busy(self, node: int) -> bool:
        return any(node in place.asked for place in self._places.values() if place.open)

    def _give(self, place: _Place, node: int, now: float) -> Assignment:
        place.asked[node] = now
        self._members[node].given += 1
        return Assignment(node, place.job, sum(place.failures.values()) + 1)

    def _repeat(self, place: _Place, now: float) -> list[Assignment]:
        wait = self._silence * 2**place.repeats
        silent = [node for node, last in place.asked.items() if now - last >= wait]
        if silent:
            place.repeats += 1
        for node in silent:
            place.asked[node] = now
        return [Assignment(node, place.job, sum(place.failures.values()) + 1, repeated=True) for node in silent]

    def _review(self, place: _Place) -> None:
        """Give a job up when it has failed and nobody who is or was here may try it again."""
        task = place.job.tasks[0]
        fit = any(
            task in member.tasks and place.failures.get(node, 0) < self._attempts
            for node, member in {**self._gone, **self._members}.items()
        )
        exhausted = any(count >= self._attempts for count in place.failures.values())
        if exhausted and not place.asked and not fit:
            place.given_up = True
