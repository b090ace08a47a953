"""`seedbed coordinator`, in order: check, start everything, hand out the join line, follow the run, sum up, end everything."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console

from seedbed.common import errors
from seedbed.common.config import FederationConfig
from seedbed.common.config_file import load_config
from seedbed.common.errors import ConfigError, ResumeError, SeedbedError
from seedbed.common.events import EventLog
from seedbed.common.exclusive import take_lock
from seedbed.common.flower import without_proxy
from seedbed.common.hosts import GATEWAY_PORT, host_port, is_loopback
from seedbed.common.manifest import BaseIdentity
from seedbed.common.processes import RotatingLog, free_ports
from seedbed.server.candidates import resolve
from seedbed.server.conductor import open_setting
from seedbed.server.contributions import state_of
from seedbed.server.coordinator.bundle import write_bundle
from seedbed.server.coordinator.control import SuperLinkControl
from seedbed.server.coordinator.members import Members
from seedbed.server.coordinator.pulse import gateway_lives, registry_lives
from seedbed.server.coordinator.request import CoordinatorRequest
from seedbed.server.coordinator.services import Layout, Service
from seedbed.server.coordinator.supervision import Outcome, Submission, Supervisor
from seedbed.server.evaluation import results as records
from seedbed.server.evaluation.results import Results
from seedbed.server.ledger import Ledger
from seedbed.server.observer import Observer, Silent, replay
from seedbed.server.plan import Planner


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def run_coordinator(request: CoordinatorRequest, console: Console, observe: Observer | None = None) -> Results:
    """Serve one federation until it has ended; everything that was started has ended then, too.

    Args:
        console: for the join line and other words to the user; progress goes to `observe`.

    Raises:
        SeedbedError: whatever stops the run, as it was raised in the ServerApp.
        EnvironmentFailure: if one of the processes cannot be kept running.
        Interrupted: by Ctrl-C or SIGTERM.
    """
    request.require_safe()
    observe = observe or Silent()
    config = deployable(load_config(request.source, request.overrides), observe.note)
    root = (request.out or Path("runs") / config.name).resolve()
    os.environ.update(without_proxy())  # what it starts is asked over loopback
    with _alone(root), _signals(_interrupt):
        _prepare(request, config, root)
        supervisor = _supervisor(request, root, console, observe)
        try:
            supervisor.start(request.patience)
            _hand_out(request, supervisor, console)
            outcome = supervisor.run()
            _sum_up(outcome)
            _linger(supervisor, root, request.linger, console)
        except Interrupted:
            console.print("\nInterrupted. Nothing accepted is lost: continue with --resume.", highlight=False)
            raise
        finally:
            # Ending takes a few seconds; a second Ctrl-C must not leave something running.
            with _signals(signal.SIG_IGN):
                supervisor.stop()
    return records.load(root)


def deployable(config: FederationConfig, say: Callable[[str], None]) -> FederationConfig:
    """The federation without the controls that need the data of all tasks in one place, which only a simulation has.

    Args:
        say: is told what is left out.

    Raises:
        ConfigError: if nothing is left, or the seed or a router is to be trained by somebody who holds a public sample.
    """
    pooled = {
        candidate.name
        for candidate in resolve(config)
        if candidate.role == "joint" or (candidate.routing is not None and candidate.routing.kind == "molora")
    }
    for name in sorted(pooled):
        say(f"candidate '{name}' is left out: it needs the data of all tasks in one place")
    kept = [
        entry for entry, name in zip(config.combine.candidates, config.combine.names, strict=True) if name not in pooled
    ]
    if not kept:
        raise ConfigError(
            f"candidate '{min(pooled)}' needs the data of all tasks in one place, which only a simulation has",
            "Name others in combine.candidates, such as average.",
        )
    combine = config.combine.model_copy(update={"candidates": tuple(kept)})
    found = config.model_copy(update={"combine": combine})
    if Planner(found, BaseIdentity(name="")).needs_pooled_data:
        setting = "seed.mode" if config.seed.mode == "public" else "combine.routing.mode"
        raise ConfigError(
            f"{setting} is 'public': nobody among the participants holds the public sample",
            f"Set {setting} to federated"
            + (", or simulate the seed and give it with seed.mode given." if setting == "seed.mode" else "."),
        )
    return found


def _prepare(request: CoordinatorRequest, config: FederationConfig, root: Path) -> None:
    """Every check that a run makes, and its directory; the ServerApp opens it again."""
    setting = open_setting(config, root, Silent(), resume=request.resume, command=request.command, training=False)
    setting.run.close()


def _supervisor(request: CoordinatorRequest, root: Path, console: Console, observe: Observer) -> Supervisor:
    keys = request.keys.resolve() if request.keys is not None else None
    limits = (("--max-upload", request.max_upload), ("--quota-participant", request.quota))
    superlink_port, health_port, registry_port = free_ports(3)
    layout = Layout(
        root,
        request.host,
        superlink_port,
        keys,
        request.insecure,
        tuple(word for option, size in limits if size for word in (option, str(size * 1_000_000))),
        request.advertise_registry,
        health_port=health_port,
    )
    layout.directory.mkdir(exist_ok=True)
    log = RotatingLog(root / "logs" / "coordinator.log")
    environment = layout.environment()
    control = SuperLinkControl(layout.superlink, layout.ca)
    superlink = Service(
        "superlink",
        layout.superlink_command,
        layout.superlink_port,
        log,
        environment,
        ready=control.ready,
        alive=control.ready,
    )
    registry = Service(
        "registry",
        layout.registry_command,
        request.registry_port or registry_port,
        log,
        environment,
        alive=lambda: registry_lives(layout.health_port),
    )
    gateway = Service(
        "gateway",
        lambda port: layout.gateway_command(port, registry.port),
        request.port,
        log,
        environment,
        alive=lambda: gateway_lives(layout.host, gateway.port, secure=keys is not None),
    )
    events = EventLog(root / "events.jsonl")
    offset = events.path.stat().st_size if events.path.exists() else 0
    settings = {"seedbed-run": str(root), "seedbed-command": request.command}
    submission = Submission(root, control, superlink, write_bundle(layout.directory), settings, log)

    def say(text: str) -> None:
        log.write("coordinator", text)
        observe.note(text)

    members = _members(control, keys, say)
    return Supervisor(
        [superlink, registry, gateway], submission, events, offset, lambda event: replay(event, observe), members
    )


def _members(control: SuperLinkControl, keys: Path | None, say: Callable[[str], None]) -> Callable[[], None]:
    """Follows the keys directory, where there is one."""
    if keys is None:
        return lambda: None
    from seedbed.server.keys import node_keys

    return Members(control, lambda: node_keys(keys), say).synchronize


def _hand_out(request: CoordinatorRequest, supervisor: Supervisor, console: Console) -> None:
    """The line that participants run."""
    gateway = supervisor.services[-1]
    port = gateway.port
    host = request.advertise or _own_name(request)
    where = host if port == GATEWAY_PORT else host_port(host, port)
    line = f"seedbed join {where} --task FILE" + (" --keys FOLDER" if request.keys is not None else "")
    console.print(f"Participants join with:  {line}", markup=False, highlight=False, soft_wrap=True)
    if request.keys is not None:
        console.print(
            f"Hand each one its FOLDER, {request.keys}/participants/NAME.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _own_name(request: CoordinatorRequest) -> str:
    """Under which others reach this machine: the address that it listens on, or a name that its certificate is for."""
    if request.host not in ("", "0.0.0.0", "::"):
        return request.host
    if request.keys is None:
        return socket.gethostname()
    from seedbed.server.keys.certificates import hosts_of
    from seedbed.server.keys.directory import read_certificate

    names = hosts_of(read_certificate(request.keys / "server" / "server.crt"))
    return next((name for name in names if not is_loopback(name)), "127.0.0.1")


def _sum_up(outcome: Outcome) -> None:
    """A run that failed ends the coordinator with the same error."""
    if not outcome.finished:
        raise outcome_error(outcome)


def outcome_error(outcome: Outcome) -> SeedbedError:
    """The error of the ServerApp, as far as its exit code tells which it was."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SeedbedError)]
    kind = next((kind for kind in kinds if kind.exit_code == outcome.exit_code), SeedbedError)
    return kind(outcome.reason, outcome.hint)


def _linger(supervisor: Supervisor, root: Path, seconds: float, console: Console) -> None:
    """Go on serving, so that collaborators can fetch the result, until the time is over or the user has enough.

    What they contribute or withdraw meanwhile is combined, evaluated and reported.
    """
    if seconds <= 0:
        return
    until, known = time.monotonic() + seconds, Ledger(root / "ledger.jsonl").contributed
    console.print("The federation has ended; its registry goes on serving. Ctrl-C ends it.", highlight=False)
    try:
        while time.monotonic() < until:
            supervisor.tick()
            if (now := state_of(root)) != known:
                known = now
                outcome = supervisor.again()
                if not outcome.finished:  # the others are still served
                    text = f"Not combined again: {outcome.reason}"
                    console.print(text, markup=False, highlight=False, soft_wrap=True)
            time.sleep(0.5)
    except Interrupted:
        return


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One coordinator for a run directory. (The ServerApp holds the run's own lock while it works.)

    Raises:
        ResumeError: if another one is at work there.
    """
    lock = take_lock(root.parent / f".{root.name}.coordinator.lock")
    if lock is None:
        raise ResumeError(f"another coordinator is at work in {root}", "Wait until it ends, or end it.")
    try:
        yield
    finally:
        os.close(lock)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


@contextlib.contextmanager
def _signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM handled so while the body runs, in the main thread, which alone may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
