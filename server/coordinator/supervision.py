"""The loop of a coordinator: processes that ended are started again, the run is submitted until it has finished or failed."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import ValidationError

from seedbed.common.errors import EnvironmentFailure
from seedbed.common.events import Event, EventLog
from seedbed.common.files import atomic_write
from seedbed.common.processes import Backoff, RotatingLog
from seedbed.server.app import PRESENCE, WANTED, Presence
from seedbed.server.coordinator.control import ENDED, SuperLinkControl
from seedbed.server.coordinator.services import Service

_ATTEMPTS = 5
"""Submissions in a row that end without anything having been accepted."""
_STATUS_SECONDS = 2.0
_ASK_SECONDS = 20.0
"""How often the SuperLink is asked about a run whose ServerApp is there: it ends the run of one that hangs."""
_START_SECONDS = 300.0
"""How long a submitted run may take until the ServerApp is there."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: with its report, or with an error of ours."""

    finished: bool
    reason: str = ""
    hint: str = ""
    exit_code: int = 0


class Submission:
    """The run at the SuperLink: submitted, watched, and submitted again when the ServerApp is gone.

    Args:
        app: the bundle.
        settings: run configuration of Flower.
    """

    def __init__(
        self,
        root: Path,
        control: SuperLinkControl,
        superlink: Service,
        app: Path,
        settings: dict[str, str],
        log: RotatingLog,
    ) -> None:
        self.root, self.control, self.superlink = root, control, superlink
        self.number = 0
        """How often the run has been submitted."""
        self._app, self._settings, self._log = app, settings, log
        self._run: int | None = None
        self._name = ""
        """Of the last submission, unlike all others of the run."""
        self._generation = 0
        self._submitted = self._looked = self._asked = self._not_before = 0.0
        self._ended = False
        self._backoff = Backoff(first=1.0, longest=30.0, steady=120.0)

    def heard(self, event: Event) -> None:
        """Progress makes earlier failures forgotten."""
        if event.kind in ("accepted", "advance"):
            self._backoff.failures = 0

    def tick(self) -> None:
        """Look after the run; to be called while the SuperLink serves.

        Raises:
            EnvironmentFailure: if it cannot be kept running.
        """
        if self._run is not None and self._generation != self.superlink.starts:
            self._lost("the SuperLink was started again")
        if self._run is None:
            if time.monotonic() >= self._not_before:
                self._submit()
        elif time.monotonic() - self._looked > _STATUS_SECONDS:
            self._looked = time.monotonic()
            self._look(self._run)

    def _submit(self) -> None:
        self.number += 1
        here = self._last_presence()
        if here is not None:  # left by a SuperLink that was killed, it would be at work beside the new one
            _end_serverapp(here.pid)
        (self.root / PRESENCE).unlink(missing_ok=True)
        self._name = f"{self.number}-{uuid.uuid4().hex}"
        atomic_write(self.root / WANTED, self._name.encode())
        settings = {**self._settings, "seedbed-submission": self._name}
        self._generation = self.superlink.starts
        self._submitted = time.monotonic()
        try:
            self._run = self.control.start(self._app, settings)
        except EnvironmentFailure as error:
            # A run whose answer alone was lost is not wanted any more, and ends by itself.
            return self._lost(f"it could not be submitted: {error.message}")
        self._submitted = self._looked = self._asked = time.monotonic()
        self._ended = False
        self._log.write("coordinator", f"submitted the run ({self.number}) as Flower's run {self._run}")

    def _look(self, run: int) -> None:
        present = self._presence()
        if present is not None and not present:
            self._lost("the ServerApp has ended")
        elif present is None and time.monotonic() - self._submitted > _START_SECONDS:
            self._lost("the ServerApp does not start")
        elif present is None or time.monotonic() - self._asked > _ASK_SECONDS:
            self._asked = time.monotonic()
            state, more = "", ""
            with contextlib.suppress(EnvironmentFailure):  # the SuperLink is looked after elsewhere
                state, more = self.control.status(run)
            before, self._ended = self._ended, state == ENDED
            # A ServerApp that has done its work is there for a moment longer; one that hangs stays.
            if self._ended and (present is None or before):
                self._lost(f"Flower ended the run: {more}")

    def _presence(self) -> bool | None:
        """Whether the ServerApp of this submission runs; None where it has not come yet."""
        here = self._last_presence()
        return _runs(here.pid) if here is not None and here.submission == self._name else None

    def _last_presence(self) -> Presence | None:
        try:
            return Presence.model_validate_json((self.root / PRESENCE).read_bytes())
        except (OSError, ValidationError):
            return None

    def _lost(self, why: str) -> None:
        self._log.write("coordinator", f"the run is lost: {why}")
        self.forget()
        run, self._run = self._run, None
        if run is not None and self._generation == self.superlink.starts:
            self.control.stop(run)
            self._end_remains()
        pause = self._backoff.after(time.monotonic() - self._submitted)
        self._not_before = time.monotonic() + pause
        if self._backoff.failures >= _ATTEMPTS:
            raise EnvironmentFailure(
                f"the run was lost {self._backoff.failures} times in a row: {why}",
                f"See {self._log.path}, then continue with --resume.",
            )

    def forget(self) -> None:
        """Whatever was submitted before is not wanted any more, should it start after all."""
        (self.root / WANTED).unlink(missing_ok=True)

    def again(self) -> None:
        """Submit the run once more, though it has ended."""
        self._run, self._not_before = None, 0.0

    def _end_remains(self) -> None:
        """A ServerApp that starts after all would be at work in the run directory beside the next one."""
        for process in self.superlink.child.descendants() if self.superlink.child is not None else []:
            _end_serverapp(process.pid)


def _end_serverapp(pid: int) -> None:
    """Kill a process if it is a ServerApp, and wait until it is gone; its number may be another's by now."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if any("flwr-serverapp" in word for word in process.cmdline()[:2]):
            process.kill()
            process.wait(10)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


class Supervisor:
    """Everything that a coordinator keeps running.

    Args:
        services: in the order in which they are started; the SuperLink is the first.
        on_event: gets every event of the run.
        every: called about every two seconds while the SuperLink serves, and once before `start` returns.
    """

    def __init__(
        self,
        services: list[Service],
        submission: Submission,
        events: EventLog,
        offset: int,
        on_event: Callable[[Event], None],
        every: Callable[[], None],
    ) -> None:
        self.services = services
        self.submission = submission
        self._events, self._offset, self._on_event = events, offset, on_event
        self._every, self._called = every, 0.0
        self._outcome: Outcome | None = None

    def start(self, patience: float) -> None:
        """Start all services and wait until they serve.

        Raises:
            EnvironmentFailure: if one does not.
        """
        self.submission.forget()  # before the SuperLink starts what an earlier coordinator had given it
        end = time.monotonic() + patience
        while True:
            for service in self.services:
                service.tick()
            missing = [service.name for service in self.services if not service.ready]
            if not missing:
                return self._every()
            if time.monotonic() > end:
                raise EnvironmentFailure(
                    f"the {missing[0]} does not serve after {patience:.0f} s", "See the coordinator's log."
                )
            time.sleep(0.1)

    def run(self) -> Outcome:
        """Until the run has finished or failed."""
        while self._outcome is None:
            self.tick()
            if self._outcome is None:
                self.submission_tick()
            time.sleep(0.1)
        return self._outcome

    def again(self) -> Outcome:
        """Have a run that has finished looked at once more, until it has finished or failed again."""
        self._outcome = None
        self.submission.again()
        return self.run()

    def tick(self) -> None:
        """Services and events."""
        for service in self.services:
            service.tick()
        events, self._offset = self._events.read_some(self._offset)
        for event in events:
            self.submission.heard(event)
            self._on_event(event)
            if event.kind == "finished":
                self._outcome = Outcome(finished=True)
            elif event.kind == "failed":
                self._outcome = _failure(event)
        if self.services[0].ready and time.monotonic() - self._called > _STATUS_SECONDS:
            self._called = time.monotonic()
            self._every()

    def submission_tick(self) -> None:
        if not self.services[0].ready:
            return
        try:
            self.submission.tick()
        except EnvironmentFailure:
            if self.services[0].child is not None and self.services[0].child.poll() is None:
                raise
            # The SuperLink went away between two looks: it is started again, and the run with it.

    def stop(self, grace: float = 4.0) -> None:
        """End everything at the same time, gently, then hard."""
        for service in self.services:
            service.ask_to_end()
        end = time.monotonic() + grace
        for service in reversed(self.services):
            service.stop(max(0.0, end - time.monotonic()))


def _failure(event: Event) -> Outcome:
    detail = event.detail
    return Outcome(
        finished=False,
        reason=str(detail.get("reason", "")),
        hint=str(detail.get("hint", "")),
        exit_code=int(detail.get("exit_code", 1)),
    )
