"""What is said to participants and what they answer, over Flower's `Grid`: the one file of the stages that speaks Flower.

`Messenger` is for nodes that come and go; nothing in it waits or decides. `GridWorkforce` waits for nodes that are all there.
Flower's own strategies wait for ever when a client vanishes, so waiting is ours: a poll, a deadline, and a count.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from seedbed.common.errors import EnvironmentFailure, SeedbedError
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.common.manifest import Record
from seedbed.common.wire import RECORD, pack, unpack
from seedbed.server.workforce import Failure

Value = TypeVar("Value", bound=Record)
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0
"""How often it is looked who is online."""
_VANISHED = frozenset({ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE})
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node has answered, to a greeting (no job) or to a job."""

    node: int
    job: Job | None
    value: Hello | JobResult | Failure


class Messenger(Protocol):
    """Nodes, addressed by numbers, that come and go."""

    def now(self) -> float:
        """Seconds on a clock that never goes back."""
        ...

    def present(self) -> frozenset[int]:
        """Who is online."""
        ...

    def greet(self, node: int, seconds: float) -> None:
        """Ask a node who it is; what it answers within `seconds` is collected."""
        ...

    def ask(self, node: int, job: Job, seconds: float) -> None:
        """Give a node a job; what it answers within `seconds` is collected."""
        ...

    def collect(self) -> Sequence[Answer]:
        """Answers that have come since the last time, each once."""
        ...

    def pause(self) -> None:
        """Let a little time pass."""
        ...


class GridMessenger:
    """A `Messenger` over Flower's `Grid`: to real SuperNodes or simulated ones.

    Args:
        grid: Flower's transport.
        cancelled: set from another thread to stop waiting at once.
    """

    def __init__(self, grid: Grid, cancelled: threading.Event | None = None) -> None:
        self.grid = grid
        self.cancelled = cancelled or threading.Event()
        self._open: dict[str, tuple[int, Job | None, float]] = {}
        self._unsent: list[Answer] = []
        self._present: frozenset[int] = frozenset()
        self._looked = float("-inf")

    def now(self) -> float:
        return time.monotonic()

    def present(self) -> frozenset[int]:
        if self.now() - self._looked >= _LOOK_SECONDS:
            self._looked, self._present = self.now(), frozenset(self.grid.get_node_ids())
        return self._present

    def greet(self, node: int, seconds: float) -> None:
        self._send(node, None, "query.hello", RecordDict(), seconds)

    def ask(self, node: int, job: Job, seconds: float) -> None:
        self._send(node, job, f"train.{job.kind}", RecordDict({RECORD: ConfigRecord(pack(job))}), seconds)

    def collect(self) -> Sequence[Answer]:
        found, self._unsent = self._unsent, []
        self._forget_old()
        for reply in self.grid.pull_messages(list(self._open)) if self._open else ():
            asked = self._open.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None:  # else answered twice, or never asked
                node, job, _ = asked
                value = read_reply(node, reply, Hello) if job is None else read_reply(node, reply, JobResult)
                found.append(Answer(node, job, value))
        return found

    def pause(self) -> None:
        if self.cancelled.wait(_POLL_SECONDS):
            raise EnvironmentFailure(
                "the run was cancelled while it waited for participants", "Continue with --resume."
            )

    def _send(self, node: int, job: Job | None, kind: str, content: RecordDict, seconds: float) -> None:
        # Longer than anybody waits here: whoever is late is told so by us, not by a message that has expired.
        message = Message(content, node, kind, ttl=seconds + 60)
        sent = list(self.grid.push_messages([message]))
        if sent:
            self._open[sent[0]] = (node, job, self.now() + seconds)
        else:
            self._unsent.append(Answer(node, job, Failure(node, "could not be reached", vanished=True)))

    def _forget_old(self) -> None:
        now = self.now()
        self._open = {key: asked for key, asked in self._open.items() if asked[2] > now}


class GridWorkforce:
    """A `Workforce` behind a Flower `Grid`; see `GridMessenger`."""

    def __init__(self, grid: Grid, cancelled: threading.Event | None = None) -> None:
        self._messenger = GridMessenger(grid, cancelled)

    def hello(self, expected: int, deadline: float) -> Mapping[int, Hello | Failure]:
        messenger, end = self._messenger, self._messenger.now() + deadline
        while len(messenger.present()) < expected and messenger.now() < end:
            messenger.pause()
        answers: dict[int, Hello | Failure] = {}

        def keep(node: int, job: Job | None, value: Hello | JobResult | Failure) -> None:
            assert not isinstance(value, JobResult)  # nobody was asked for one
            answers[node] = value

        self._ask([(node, None) for node in sorted(messenger.present())], max(1.0, end - messenger.now()), keep)
        return answers

    def perform(
        self,
        jobs: Sequence[tuple[int, Job]],
        deadline: float,
        on_answer: Callable[[int, Job, JobResult | Failure], None],
    ) -> None:
        def keep(node: int, job: Job | None, value: Hello | JobResult | Failure) -> None:
            assert job is not None
            assert not isinstance(value, Hello)
            on_answer(node, job, value)

        self._ask(jobs, deadline, keep)

    def _ask(
        self,
        questions: Sequence[tuple[int, Job | None]],
        deadline: float,
        keep: Callable[[int, Job | None, Hello | JobResult | Failure], None],
    ) -> None:
        """Greet nodes or give them jobs; `keep` is called once for each question, at the deadline at the latest."""
        messenger, end = self._messenger, self._messenger.now() + deadline
        waiting = {_key(node, job): job for node, job in questions}
        for node, job in questions:
            if job is None:
                messenger.greet(node, deadline)
            else:
                messenger.ask(node, job, deadline)
        while waiting and messenger.now() < end:
            for answer in messenger.collect():
                key = _key(answer.node, answer.job)
                if key in waiting:  # else too late an answer to an earlier question
                    keep(answer.node, waiting.pop(key), answer.value)
            if waiting:
                messenger.pause()
        for (node, *_), job in waiting.items():
            keep(node, job, Failure(node, f"did not answer within {deadline:.0f} s"))


def _key(node: int, job: Job | None) -> tuple[int, str, str]:
    """What tells questions apart: jobs of two names may have one recipe, and of two federations one name."""
    return (node, job.name, job.recipe) if job is not None else (node, "", "")


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
