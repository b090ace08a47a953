"""Who does the jobs, seen from the stages: participants that are all there from the start, asked, and waited for.

Nothing here knows Flower; `server.messenger` does. Participants of a federation over a network come and go, which is another
matter: see `server.gathering`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from seedbed.common.errors import EnvironmentFailure
from seedbed.common.jobs import Hello, Job, JobResult


@dataclass(frozen=True, slots=True)
class Failure:
    """A participant that did not give what it was asked for, and why."""

    node: int
    reason: str
    vanished: bool = False
    """It is gone, or what it was asked is: nobody's fault, and worth asking again."""


@runtime_checkable
class Workforce(Protocol):
    """Participants, addressed by a number that lasts as long as the run."""

    def hello(self, expected: int, deadline: float) -> Mapping[int, Hello | Failure]:
        """Ask everybody who they are; returns when `expected` have answered or after `deadline` seconds."""
        ...

    def perform(
        self,
        jobs: Sequence[tuple[int, Job]],
        deadline: float,
        on_answer: Callable[[int, Job, JobResult | Failure], None],
    ) -> None:
        """Give out jobs, and call `on_answer` once for each: with its result, or with why there is none.

        Silence until `deadline` seconds is a failure like any other.
        """
        ...


class NoParticipantsError(EnvironmentFailure):
    """Somebody would have to be asked, and there is nobody."""


class Nobody:
    """A workforce for work that needs none, or to find out whether some is missing.

    Raises:
        NoParticipantsError: whatever it is asked.
    """

    def hello(self, expected: int, deadline: float) -> Mapping[int, Hello | Failure]:
        raise NoParticipantsError("there are no participants", "Continue with --resume.")

    def perform(
        self,
        jobs: Sequence[tuple[int, Job]],
        deadline: float,
        on_answer: Callable[[int, Job, JobResult | Failure], None],
    ) -> None:
        raise NoParticipantsError("there are no participants", "Continue with --resume.")
