"""Verbs of a federation across machines: coordinator, join, preflight, status, watch, fetch, contribute, withdraw."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from seedbed.common.errors import ConfigError
from seedbed.server.cli.console import command_line, observer
from seedbed.server.cli.options import (
    HOST,
    Base,
    Folder,
    General,
    Gpus,
    Host,
    Insecure,
    Linger,
    Name,
    Out,
    Pause,
    Quiet,
    Resume,
    Set,
    Tasks,
    Wait,
    Work,
    overrides,
)

if TYPE_CHECKING:
    from seedbed.server.monitor.state import Status

Where = Annotated[str | None, typer.Argument(metavar="[RUN_DIR|HOST[:PORT]]", show_default=False)]


def coordinator(
    source: Annotated[str, typer.Argument(metavar="PRESET|CONFIG.yaml")],
    out: Out = None,
    data: Annotated[
        Path | None, typer.Option(help="Directory with NAME.test.jsonl, for the evaluation.", show_default=False)
    ] = None,
    set_: Set = None,
    resume: Resume = False,
    listen: Annotated[str, typer.Option(metavar="ADDRESS", help="Beyond this machine only with --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="What participants know; 0 takes a free one.")] = 7400,
    registry_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the adapter registry; 0 takes a free one.")
    ] = 7401,
    advertise: Annotated[str, typer.Option(metavar="NAME", help="Name of this machine in the join line.")] = "",
    advertise_registry: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the registry for participants, behind a proxy; 0: its own.")
    ] = 0,
    keys: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Made by seedbed keys init.", show_default=False)
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without keys.")] = False,
    max_upload: Annotated[int, typer.Option(min=0, metavar="MB", help="Largest adapter; 0: 8.6 GB.")] = 0,
    quota: Annotated[int, typer.Option(min=0, metavar="MB", help="Of all uploads of a participant; 0: 69 GB.")] = 0,
    linger: Linger = 10.0,
    quiet: Quiet = False,
) -> None:
    """Launch a federation: wait for participants, lead them through it, evaluate, report. Continue it with --resume."""
    from seedbed.server.coordinator.request import CoordinatorRequest
    from seedbed.server.coordinator.verb import Interrupted, run_coordinator
    from seedbed.server.evaluation.report import summary_table

    request = CoordinatorRequest(
        source=source,
        overrides=tuple(overrides(set_, data)),
        out=out,
        resume=resume,
        host=listen,
        advertise=advertise,
        port=port,
        registry_port=registry_port,
        advertise_registry=advertise_registry,
        max_upload=max_upload,
        quota=quota,
        keys=keys,
        insecure=insecure,
        linger=math.inf if linger < 0 else linger,
        command=command_line(),
    )
    try:
        with observer(quiet) as observe:
            results = run_coordinator(request, Console(), observe)
    except Interrupted as end:
        sys.exit(end.exit_code)
    Console().print(summary_table(results))
    Console().print(results.answer, highlight=False)


def join(
    host: Annotated[str, typer.Argument(metavar="HOST[:PORT]")],
    task: Tasks = None,
    keys: Folder = None,
    name: Name = None,
    work: Work = None,
    general: General = None,
    base: Base = None,
    gpus: Gpus = "auto",
    insecure: Insecure = False,
    once: Annotated[bool, typer.Option("--once", help="Leave when the federation has ended.")] = False,
    wait: Wait = 0.0,
    clip: Annotated[
        float | None, typer.Option(help="Differential privacy: norm to clip updates to.", show_default=False)
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Differential privacy: noise, in units of --clip.", show_default=False)
    ] = None,
    delta: Annotated[float, typer.Option(help="Differential privacy: where epsilon is stated.")] = 1e-5,
    checkpoint_seconds: Pause = 300.0,
    quiet: Quiet = False,
) -> None:
    """Take part with GPUs (or a CPU): trains when it is asked, reconnects for ever, and goes on where it was."""
    from seedbed.client.join.verb import JoinRequest
    from seedbed.client.join.verb import join as run_join

    request = JoinRequest(
        host=host,
        tasks=tuple(task or ()),
        keys=keys,
        name=name,
        work=work,
        general=general,
        base=base,
        gpus=gpus,
        insecure=insecure,
        once=once,
        wait=wait,
        clip=clip,
        noise_multiplier=noise_multiplier,
        delta=delta,
        checkpoint_seconds=checkpoint_seconds,
    )
    run_join(request, Console(quiet=quiet))


def preflight(
    host: Annotated[str | None, typer.Argument(metavar="[HOST[:PORT]]", show_default=False)] = None,
    task: Tasks = None,
    keys: Folder = None,
    name: Name = None,
    work: Work = None,
    general: General = None,
    base: Base = None,
    gpus: Gpus = "auto",
    insecure: Insecure = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Find out whether this machine is ready to join: versions, TLS, clock, GPUs, memory, model, data, disk, ports."""
    from seedbed.client.preflight.verb import PreflightRequest, run_preflight

    request = PreflightRequest(
        host=host,
        tasks=tuple(task or ()),
        keys=keys,
        name=name,
        work=work,
        general=general,
        base=base,
        gpus=gpus,
        insecure=insecure,
    )
    report = run_preflight(request, Console(), as_json=json_)
    if report.state == "fail":
        sys.exit(11)


def status(
    where: Where = None,
    keys: Folder = None,
    insecure: Insecure = False,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show a federation once: who takes part, who does what, what is done."""
    from seedbed.server.monitor.table import show_status

    show_status(_look(where, keys, insecure), Console(), as_json=json_)


def watch(
    where: Where = None,
    keys: Folder = None,
    insecure: Insecure = False,
) -> None:
    """Watch a federation live: participants, jobs, loss curves, bytes, arrivals, time left. Ctrl-C leaves."""
    from seedbed.server.monitor.live import watch as run_watch

    run_watch(_look(where, keys, insecure), Console())


def fetch(
    what: Annotated[str, typer.Argument(metavar="DIGEST|seed|best")],
    host: Host = HOST,
    keys: Folder = None,
    out: Annotated[Path | None, typer.Option(help="Directory to make; must not exist.", show_default=False)] = None,
    insecure: Insecure = False,
    quiet: Quiet = False,
) -> None:
    """Bring an adapter of a federation here as a PEFT directory, to train from it or to use it."""
    from seedbed.client.exchange import fetch as run_fetch

    progress = Console(stderr=True, quiet=quiet)
    run_fetch(what, host, keys, out, Console(), insecure=insecure, progress=progress)


def contribute(
    directory: Annotated[Path, typer.Argument(metavar="ADAPTER_DIR")],
    task: Annotated[str, typer.Option(help="What it was trained on.")],
    host: Host = HOST,
    keys: Folder = None,
    name: Annotated[str, typer.Option(help="What tables call it; made up unless given.")] = "",
    from_seed: Annotated[bool, typer.Option("--from-seed", help="It was trained from the federation's seed.")] = False,
    insecure: Insecure = False,
    quiet: Quiet = False,
) -> None:
    """Hand in an expert that any PEFT trainer made; it joins the next combination."""
    from seedbed.client.exchange import contribute as run_contribute

    progress = Console(stderr=True, quiet=quiet)
    run_contribute(
        directory, task, host, keys, name, Console(), from_seed=from_seed, insecure=insecure, progress=progress
    )


def withdraw(
    digest: Annotated[str, typer.Argument(metavar="DIGEST")],
    host: Host = HOST,
    keys: Folder = None,
    insecure: Insecure = False,
) -> None:
    """Take a contribution of yours back; the next combination is made without it."""
    from seedbed.client.exchange import withdraw as run_withdraw

    run_withdraw(digest, host, keys, Console(), insecure=insecure)


def _look(where: str | None, keys: Path | None, insecure: bool) -> Callable[[], Status]:
    """What `status` and `watch` look at: a run directory of this machine, or a coordinator."""
    if where is not None and Path(where).exists():
        from seedbed.server.monitor.reader import RunReader

        if not (Path(where) / "config.yaml").is_file():
            raise ConfigError(
                f"{where} is no run directory: it has no config.yaml",
                "Name a run directory, or a coordinator's HOST:PORT.",
            )
        return RunReader(Path(where)).look
    from seedbed.client.connect import gateway
    from seedbed.server.monitor.remote import remote

    return remote(gateway(where or HOST, keys, insecure=insecure))
