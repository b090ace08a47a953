"""Messages to nodes that come and go, and what they answer, over Flower's `Grid`; nothing here waits or decides."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from seedbed.common.errors import EnvironmentFailure
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.common.wire import RECORD, pack
from seedbed.server.workforce import POLL_SECONDS, Failure, read_reply

_LOOK_SECONDS = 1.0
"""How often it is looked who is online."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node has answered, to a greeting (no job) or to a job."""

    node: int
    job: Job | None
    value: Hello | JobResult | Failure


class Exchange(Protocol):
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


class GridExchange:
    """An `Exchange` over Flower's `Grid`.

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
        if not self._open:
            return found
        for reply in self.grid.pull_messages(list(self._open)):
            asked = self._open.pop(reply.metadata.reply_to_message_id, None)
            if asked is None:  # answered twice, or never asked
                continue
            node, job, _ = asked
            found.append(Answer(node, job, _matching(node, job, reply)))
        return found

    def pause(self) -> None:
        if self.cancelled.wait(POLL_SECONDS):
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


def _matching(node: int, job: Job | None, reply: Message) -> Hello | JobResult | Failure:
    if job is None:
        return read_reply(node, reply, Hello)
    value = read_reply(node, reply, JobResult)
    if isinstance(value, JobResult) and value.recipe != job.recipe and not value.error:
        return Failure(node, f"answered a job it was not given: {value.name}")
    return value
