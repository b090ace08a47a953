"""`seedbed join`: greet the coordinator, see that this machine is ready, and keep a SuperNode running until told to stop."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import FrameType

from rich.console import Console

from seedbed.client.join.address import parse_address
from seedbed.client.join.contact import Contact, UnreachableError
from seedbed.client.join.gpus import parse_gpus
from seedbed.client.join.keys import load_keys
from seedbed.client.join.place import Memory, Place, own_name
from seedbed.client.join.sight import Sight
from seedbed.client.join.supervise import Supervisor
from seedbed.client.join.tasks import parse_tasks
from seedbed.client.preflight.material import local_base, require_identity
from seedbed.client.preflight.verb import PreflightRequest, preflight
from seedbed.common.errors import ConfigError, EnvironmentFailure
from seedbed.common.exclusive import exclusive
from seedbed.common.flower import flower_environment
from seedbed.common.jobs import DataSource, Node
from seedbed.common.privacy import PrivacySettings
from seedbed.common.registry import FederationInfo

_TICK_SECONDS = 1.0
_GREET_SECONDS = 2.0
"""Between two looks at how the federation stands."""
_GREET_TIMEOUT = 3.0
_RETRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class JoinRequest(PreflightRequest):
    """What a participant says when it joins: where it has what (see there), and how it takes part. `host` must be given."""

    host: str = ""
    once: bool = False
    """Leave when the federation has ended."""
    wait: float = 0.0
    """Seconds to try a first contact for."""
    clip: float | None = None
    """With `noise_multiplier`: the norm that an update is clipped to before noise is added, see `common.privacy`."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise, in units of `clip`."""
    delta: float = 1e-5
    """The δ at which ε is stated."""
    checkpoint_seconds: float = 300.0
    """Seconds between two checkpoints of a training; 0 is one after every step."""

    @property
    def privacy(self) -> PrivacySettings | None:
        """How this participant protects its updates; none hands them in as they are.

        Raises:
            ConfigError: if the settings make no sense.
        """
        if self.clip is None and self.noise_multiplier is None:
            return None
        if self.clip is None or self.noise_multiplier is None:
            raise ConfigError("privacy needs both a clipping norm and noise", "Give --clip and --noise-multiplier.")
        if not (self.clip > 0 and self.noise_multiplier > 0 and 0 < self.delta < 1):
            raise ConfigError(
                f"clip {self.clip}, noise multiplier {self.noise_multiplier} and delta {self.delta} make no sense",
                "The first two are above 0, delta is between 0 and 1.",
            )
        return PrivacySettings(clip=self.clip, noise_multiplier=self.noise_multiplier, delta=self.delta)


def join(request: JoinRequest, console: Console) -> None:
    """Take part in a federation; returns when told to stop (SIGTERM), or with `once` when the federation has finished.

    Args:
        console: gets what happens; a quiet one shows nothing.

    Raises:
        ConfigError: if the request makes no sense, or the coordinator speaks another version.
        EnvironmentFailure: if the coordinator cannot be reached and never was, a check of the preflight failed, this place
            is already joined, or with `once` the federation has failed.
        ModelError: if the base model is not here or is another one.
        KeyboardInterrupt: on SIGINT, when nothing is left running.
    """
    address = parse_address(request.host)
    keys = load_keys(request.keys) if request.keys is not None else None
    name = own_name(request.name, keys)
    contact = Contact(address, keys, insecure=request.insecure)
    sources = parse_tasks(request.tasks, request.general)
    gpus = parse_gpus(request.gpus)
    privacy = request.privacy  # refused before anything is written
    place = Place.of(name, request.work)
    place.make()
    with exclusive(place.root / "join.lock", f"has joined as '{name}'", 0.0), _signals() as stopped:
        participant = Participant(request, contact, place, name, sources, gpus, privacy)
        info, away = _first_contact(contact, place, request.wait, console, stopped)
        if stopped.number is None:
            _look_ahead(request, console, away=away)
            participant.settle(info)
            participant.serve(console, stopped)
    if stopped.number == signal.SIGINT:
        raise KeyboardInterrupt


class Participant:
    """One participant of one federation, on its place."""

    def __init__(
        self,
        request: JoinRequest,
        contact: Contact,
        place: Place,
        name: str,
        sources: tuple[DataSource, ...],
        gpus: tuple[str, ...] | None,
        privacy: PrivacySettings | None,
    ) -> None:
        self._request, self._contact, self._place, self._name = request, contact, place, name
        self._sources, self._gpus, self._privacy = sources, gpus, privacy
        self._info: FederationInfo | None = None

    def settle(self, info: FederationInfo) -> None:
        """Write the node file for what the coordinator says now; nothing where it says what it said before.

        Raises:
            ModelError: if the base model is not here or is another one.
            StorageError: if the file system refuses.
        """
        before, self._info = self._info, info
        if before is not None and _essence(before) == _essence(info):
            return
        base = local_base(info.base, self._request.base)
        require_identity(base, info.identity)
        node = Node(
            name=self._name,
            base=base,
            store=self._place.root / "store",
            work=self._place.work,
            data=self._sources,
            registry=self._contact.registry(info, self._name),
            checkpoint_seconds=self._request.checkpoint_seconds,
            privacy=self._privacy,
        )
        self._place.write_node(node)
        self._place.remember(Memory(address=str(self._contact.address), info=info))

    def serve(self, console: Console, stopped: Stopped) -> None:
        """Keep a SuperNode running until told to stop or, if asked to leave then, the federation has ended."""
        sight = Sight(console, self._place.work, str(self._contact.address))
        supervisor = Supervisor(self._command, self._environment(), self._place.log, sight.on_line)
        greeted = 0.0
        try:
            while not stopped.event.is_set():
                if (code := supervisor.tick()) is not None:
                    sight.lost(code, supervisor.pause)
                sight.tick()
                if time.monotonic() - greeted > _GREET_SECONDS:
                    if self._ended(sight):
                        return
                    greeted = time.monotonic()
                stopped.event.wait(_TICK_SECONDS)
            sight.say("Leaving the federation; what has been trained is kept.")
        finally:
            supervisor.stop()
            sight.close()

    def _ended(self, sight: Sight) -> bool:
        """Ask how the federation stands, and whether that is the end of it for us."""
        try:
            info = self._contact.greet(_GREET_TIMEOUT).info
        except EnvironmentFailure:
            sight.asked(answered=False)
            return False
        sight.asked(answered=True)
        self.settle(info)
        if not self._request.once or info.state not in ("finished", "failed"):
            return False
        if info.state == "failed":
            raise EnvironmentFailure(
                f"federation '{info.name}' has failed", "See the coordinator; join again when it has been resumed."
            )
        sight.say(f"Federation '{info.name}' has finished.")
        return True

    def _command(self, port: int) -> list[str]:
        options = ["--superlink", str(self._contact.address), "--isolation", "subprocess", "--port", str(port)]
        keys = self._contact.keys
        if keys is None:
            options.append("--insecure")
        else:
            options += ["--root-certificates", str(keys.ca), "--auth-supernode-private-key", str(keys.node_key)]
        node = f'seedbed-node="{self._place.node_file}"'
        return [sys.executable, "-u", "-m", "seedbed.client.join.supernode", *options, "--node-config", node]

    def _environment(self) -> dict[str, str]:
        # As the first contact: straight to the coordinator, whatever proxy the environment names.
        environment = flower_environment(self._place.root / "flower", self._contact.address.host)
        if self._gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus)
        return environment


class Stopped:
    """Whether somebody wants us to stop, and by which signal."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        self.number = number
        self.event.set()


@contextlib.contextmanager
def _signals() -> Iterator[Stopped]:
    """SIGINT and SIGTERM are taken note of while the body runs, so that it can end in order."""
    stopped = Stopped()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.signal(number, stopped) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_contact(
    contact: Contact, place: Place, wait: float, console: Console, stopped: Stopped
) -> tuple[FederationInfo, bool]:
    """What the coordinator says, or what it said last where it is away now and was there before; and whether it is away."""
    end = time.monotonic() + wait
    while True:
        try:
            return contact.greet().info, False
        except UnreachableError as error:
            known = place.remembered(str(contact.address))
            if known is not None:
                console.print(f"{error.message}. It did before: joining as soon as it does again.", markup=False)
                return known, True
            if time.monotonic() > end or stopped.event.wait(_RETRY_SECONDS):
                raise


def _look_ahead(request: JoinRequest, console: Console, *, away: bool) -> None:
    """The preflight: what has failed stops us, what is worth a warning is shown.

    Args:
        away: the coordinator does not answer now, so that only this machine is looked at.
    """
    with console.status("looking whether this machine is ready"):
        known = {one.name: getattr(request, one.name) for one in fields(PreflightRequest)}
        report = preflight(PreflightRequest(**{**known, "host": None if away else request.host}))
    if report.failures:
        console.print(report.table())
    for check in report.warnings:
        console.print(f"{check.name}: {check.found}. {check.remedy}", markup=False, highlight=False, soft_wrap=True)
    report.require()


def _essence(info: FederationInfo) -> tuple[object, ...]:
    """What the node file depends on."""
    return info.base, info.identity, info.registry_port, info.name
