"""Nodes that do what a test says, on a clock that moves only when somebody waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.server.messenger import Answer
from seedbed.server.workforce import Failure

Does = Callable[[Job, int], "JobResult | Failure | None"]
"""What a node answers to a job that it is asked for the n-th time (1, 2, …); None is silence."""


@dataclass
class Node:
    """One node: when it is there, who it says it is, and what it does."""

    hello: Hello | Failure
    does: Does
    there: Sequence[tuple[float, float]] = ((0, float("inf")),)
    takes: float = 1.0
    """Seconds until it answers."""
    greets: float = 0.0
    """Seconds until it says who it is."""
    asked: list[str] = field(default_factory=list)

    def is_there(self, now: float) -> bool:
        return any(start <= now < end for start, end in self.there)


class ScriptedMessenger:
    """An `Messenger` with nodes by number; `pause` lets one second pass."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.nodes = nodes
        self.clock = 0.0
        self.log: list[tuple[float, int, str]] = []
        self._coming: list[tuple[float, Answer]] = []

    def now(self) -> float:
        return self.clock

    def present(self) -> frozenset[int]:
        return frozenset(number for number, node in self.nodes.items() if node.is_there(self.clock))

    def greet(self, node: int, seconds: float) -> None:
        self.log.append((self.clock, node, "hello"))
        one = self.nodes[node]
        if one.greets <= seconds:
            self._coming.append((self.clock + one.greets, Answer(node, None, one.hello)))

    def ask(self, node: int, job: Job, seconds: float) -> None:
        self.log.append((self.clock, node, job.name))
        one = self.nodes[node]
        one.asked.append(job.name)
        value = one.does(job, one.asked.count(job.name))
        if value is not None:
            self._coming.append((self.clock + one.takes, Answer(node, job, value)))

    def collect(self) -> Sequence[Answer]:
        found = [answer for when, answer in self._coming if when <= self.clock and self._reaches(answer)]
        self._coming = [(when, answer) for when, answer in self._coming if when > self.clock]
        return found

    def pause(self) -> None:
        self.clock += 1

    def asked(self, name: str) -> list[tuple[float, int]]:
        """When, and who, was asked for a job."""
        return [(when, node) for when, node, what in self.log if what == name]

    def _reaches(self, answer: Answer) -> bool:
        return self.nodes[answer.node].is_there(self.clock)
