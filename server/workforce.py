"""Who does the jobs, seen from the stages: participants that are asked and answer, until a deadline.

The stages in `server.federation` know only `Workforce`; `GridWorkforce` is the one that speaks Flower. Flower's own
strategies wait for ever when a client vanishes, so waiting is ours: a poll, a deadline, and a count.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from seedbed.common.errors import EnvironmentFailure, SeedbedError
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.common.manifest import Record
from seedbed.common.wire import RECORD, pack, unpack

Value = TypeVar("Value", bound=Record)
POLL_SECONDS = 0.2
_VANISHED = frozenset({ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE})
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")


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


class GridWorkforce:
    """Participants behind a Flower `Grid`: real SuperNodes or simulated ones.

    Args:
        grid: Flower's transport.
        cancelled: set from another thread to stop waiting at once.
    """

    def __init__(self, grid: Grid, cancelled: threading.Event | None = None) -> None:
        self.grid = grid
        self.cancelled = cancelled or threading.Event()

    def hello(self, expected: int, deadline: float) -> Mapping[int, Hello | Failure]:
        started = time.monotonic()
        nodes = self._nodes(expected, deadline)
        answers: dict[int, Hello | Failure] = {}

        def keep(index: int, value: Hello | Failure) -> None:
            answers[nodes[index]] = value

        left = max(1.0, deadline - (time.monotonic() - started))
        self._ask([(node, "query.hello", RecordDict()) for node in nodes], Hello, left, keep)
        return answers

    def perform(
        self,
        jobs: Sequence[tuple[int, Job]],
        deadline: float,
        on_answer: Callable[[int, Job, JobResult | Failure], None],
    ) -> None:
        def match(index: int, value: JobResult | Failure) -> None:
            node, job = jobs[index]
            if isinstance(value, JobResult) and value.recipe != job.recipe:
                value = Failure(node, f"answered a job it was not given: {value.name}")
            on_answer(node, job, value)

        messages = [(node, f"train.{job.kind}", RecordDict({RECORD: ConfigRecord(pack(job))})) for node, job in jobs]
        self._ask(messages, JobResult, deadline, match)

    def _nodes(self, expected: int, deadline: float) -> list[int]:
        """Wait until `expected` nodes are connected; go on with fewer at the deadline."""
        end = time.monotonic() + deadline
        while True:
            nodes = sorted(self.grid.get_node_ids())
            if len(nodes) >= expected or time.monotonic() > end:
                return nodes
            self._pause()

    def _ask(
        self,
        contents: Sequence[tuple[int, str, RecordDict]],
        kind: type[Value],
        deadline: float,
        on_answer: Callable[[int, Value | Failure], None],
    ) -> None:
        """Send one message for each of `contents`; `on_answer` gets the index of the message that is answered."""
        end = time.monotonic() + deadline
        open_messages: dict[str, int] = {}
        for index, (node, message_type, content) in enumerate(contents):
            message = Message(content, node, message_type, ttl=deadline + 60)
            sent = list(self.grid.push_messages([message]))
            if sent:
                open_messages[sent[0]] = index
            else:
                on_answer(index, Failure(node, "could not be reached"))
        while open_messages and time.monotonic() < end:
            for reply in self.grid.pull_messages(list(open_messages)):
                asked = open_messages.pop(reply.metadata.reply_to_message_id, None)
                if asked is not None:
                    on_answer(asked, read_reply(contents[asked][0], reply, kind))
            if open_messages:
                self._pause()
        for index in open_messages.values():
            on_answer(index, Failure(contents[index][0], f"did not answer within {deadline:.0f} s"))

    def _pause(self) -> None:
        if self.cancelled.wait(POLL_SECONDS):
            raise EnvironmentFailure(
                "the run was cancelled while it waited for participants", "Continue with --resume."
            )


def read_reply(node: int, reply: Message, kind: type[Value]) -> Value | Failure:
    """What a node has answered, or why that is no answer."""
    if reply.has_error():
        vanished = reply.error.code in _VANISHED
        return Failure(
            node, f"{'is gone' if vanished else 'raised an error'}: {_essence(reply.error.reason)}", vanished
        )
    try:
        return unpack(kind, reply.content.config_records.get(RECORD))
    except SeedbedError as error:
        return Failure(node, error.message)


def _essence(text: str | None) -> str:
    """What went wrong, from a reason that may hold a whole traceback: the last line that names an error, else the first."""
    lines = [line.strip(" '>") for line in _COLOURS.sub("", text or "").splitlines() if line.strip(" '>")]
    if not lines:
        return "no reason given"
    named = [line for line in lines if _ERROR.match(line)]
    return (named[-1] if named else lines[0])[:500]
