"""Train what all cells need at once, so that many workers stay busy; an optimization only.

Wave after wave, the union of the trainings that some cell lacks and that have everything they start from is given out. What
fails here is left to the cell's own run, which reports it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

from seedbed.common.errors import SeedbedError
from seedbed.common.jobs import Hello, Job, JobKind, JobResult
from seedbed.server.ablation.artifacts import Graph, is_planned, walk
from seedbed.server.candidates import Candidate
from seedbed.server.federation import Federation
from seedbed.server.observer import Observer
from seedbed.server.workforce import Failure, Workforce

_WEIGHT: Mapping[JobKind, float] = {"molora": 4.0, "router": 2.0}
"""A step of these takes longer than a step of one adapter."""
OnAnswer = Callable[[int, Job, JobResult | Failure], None]


class Gathered:
    """A workforce that greets everybody once, and does not ask again for what has failed before.

    Args:
        workforce: whom to ask.
        expected: how many participants there are.
    """

    def __init__(self, workforce: Workforce, expected: int) -> None:
        self.workforce = workforce
        self.expected = expected
        self._hellos: Mapping[int, Hello | Failure] | None = None
        self._failed: dict[str, str] = {}

    def hello(self, expected: int, deadline: float) -> Mapping[int, Hello | Failure]:
        if self._hellos is None:
            self._hellos = self.workforce.hello(self.expected, deadline)
        return self._hellos

    def perform(self, jobs: Sequence[tuple[int, Job]], deadline: float, on_answer: OnAnswer) -> None:
        def keep(node: int, job: Job, answer: JobResult | Failure) -> None:
            reason = answer.reason if isinstance(answer, Failure) else answer.error
            if reason:
                self._failed[job.recipe] = reason
            on_answer(node, job, answer)

        for node, job in jobs:
            if job.recipe in self._failed:
                on_answer(node, job, Failure(node, self._failed[job.recipe]))
        left = [pair for pair in jobs if pair[1].recipe not in self._failed]
        if left:
            self.workforce.perform(left, deadline, keep)

    def forget_failures(self) -> None:
        self._failed.clear()


class _Live(Graph):
    """Artifacts of one run directory; a merge that trainings start from is made as soon as it can be."""

    def __init__(self, federation: Federation, trained: Mapping[str, str]) -> None:
        super().__init__(trained)
        self.federation = federation

    def given_seed(self) -> str:
        return self.federation.seed() or super().given_seed()

    def merge_seed(self, parents: Sequence[str], round_index: int) -> str:
        if any(map(is_planned, parents)):
            return super().merge_seed(parents, round_index)
        return self.federation.combiner.seed(parents, round_index)

    def mean_router(self, candidate: Candidate, index: int, experts: Mapping[str, str], done: Sequence[str]) -> str:
        if any(map(is_planned, (*experts.values(), *done))):
            return super().mean_router(candidate, index, experts, done)
        return self.federation.combiner.mixer.mean(candidate, index, experts, done)


Wave = dict[str, tuple[Federation, Job]]
"""By recipe: a training, and a federation that needs it."""


def missing(federations: Sequence[Federation]) -> Wave:
    """Trainings that can be done now. A federation that cannot even be planned is left to report that itself."""
    found: Wave = {}
    for federation in federations:
        trained = {entry.key: entry.digest for entry in federation.run.ledger.of("accepted")}
        graph = _Live(federation, trained)
        try:
            walk(federation.run.config, federation.base, graph)
        except SeedbedError:
            continue
        for job in graph.ready:
            found.setdefault(job.recipe, (federation, job))
    return found


def prefetch(federations: Sequence[Federation], workforce: Workforce, observe: Observer) -> None:
    """Have everything trained that can be.

    Args:
        federations: one for each configuration and random seed, all over views of one run directory.
    """
    failed: set[str] = set()
    number = 0
    while wave := {recipe: pair for recipe, pair in missing(federations).items() if recipe not in failed}:
        number += 1
        observe.stage(f"training, wave {number}", len(wave))
        done = _give_out(wave, workforce, observe)
        failed |= wave.keys() - done
    if failed:
        observe.note(f"{len(failed)} trainings failed and are tried once more by the cells that need them")


def _give_out(wave: Wave, workforce: Workforce, observe: Observer) -> set[str]:
    """Recipes that were trained."""
    done: set[str] = set()
    assignments = []
    for federation, job in sorted(wave.values(), key=lambda pair: -_length(pair[1])):
        with contextlib.suppress(SeedbedError):  # somebody is missing, as the cell will say
            node = federation.node_for(job)
            if node is not None:
                assignments.append((node, job))

    def on_answer(node: int, job: Job, answer: JobResult | Failure) -> None:
        federation, _ = wave[job.recipe]
        try:
            if isinstance(answer, Failure):
                raise SeedbedError(answer.reason)
            federation.take(job, answer)
            done.add(job.recipe)
        except SeedbedError as error:
            observe.note(f"{job.name} failed: {error.message}")
        observe.advance(job.name)

    # As long as the stages that are in this wave would have had, one after the other.
    sharing = {id(federation) for federation, _ in wave.values()}
    deadline = max(federation.run.config.stages.deadline for federation, _ in wave.values()) * len(sharing)
    if assignments:
        workforce.perform(assignments, deadline, on_answer)
    return done


def _length(job: Job) -> float:
    tuned = 2.0 if job.tuning is not None else 1.0
    return job.training.steps * _WEIGHT.get(job.kind, 1.0) * tuned
