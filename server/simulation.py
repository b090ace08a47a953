"""A whole federation on one machine: Flower's simulation engine as transport, a directory as adapter store.

The ServerApp and the ClientApp are those of a real federation. What is particular to a simulation is prepared here: where
the data lies, one node file for each participant, and Ray with as many workers as the machine can feed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import yaml
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from seedbed.common.config import FederationConfig
from seedbed.common.errors import EnvironmentFailure
from seedbed.common.jobs import GENERAL, NODES_VARIABLE, DataSource, Node
from seedbed.common.storage import atomic_write
from seedbed.server.engine import ENGINE_HINT, Engine
from seedbed.server.inputs import Inputs
from seedbed.server.messenger import GridWorkforce
from seedbed.server.rundir import RunDirectory
from seedbed.server.workforce import Workforce


def write_nodes(run: RunDirectory, inputs: Inputs, *, pooled: bool, general: bool, threads: int) -> int:
    """One file for each simulated participant, named by its partition; returns how many there are.

    Args:
        pooled: whether one of them holds the data of all tasks.
        general: whether they need general-purpose text.
        threads: CPU threads of a training process.
    """
    tasks = run.config.tasks
    sources = {name: DataSource(task=name, location=location) for name, location in inputs.train.items()}
    texts: tuple[DataSource, ...] = ()
    if general and inputs.general is not None:
        texts = (DataSource(task=GENERAL, location=inputs.general.location, limit=inputs.general.train),)
    nodes: list[tuple[str, tuple[DataSource, ...], bool]] = [
        (name, (sources[name], *texts), False) for name in tasks.experts
    ]
    if pooled:  # first, since it has the longest job
        nodes.insert(0, ("all-data", tuple(sources.values()), True))
    directory = run.root / "nodes"
    directory.mkdir(exist_ok=True)
    for partition, (name, data, holds_all) in enumerate(nodes):
        node = Node(
            name=name,
            base=run.config.base,
            store=run.root / "store",
            work=run.root / "work" / name,
            data=data,
            pooled=holds_all,
            threads=threads,
        )
        text = yaml.safe_dump(node.model_dump(mode="json"), sort_keys=False)
        atomic_write(directory / f"{partition}.yaml", text.encode())
    return len(nodes)


def worker_count(config: FederationConfig, jobs: int) -> int:
    """Participants that work at the same time: one for each GPU, or each core, unless the configuration says."""
    if config.run.workers != "auto":
        return config.run.workers
    return max(1, min(_gpus() or len(os.sched_getaffinity(0)), jobs))


def staff(run: RunDirectory, inputs: Inputs, *, pooled: bool, general: bool) -> tuple[int, int]:
    """Write the files of all participants, see `write_nodes`, and share the machine among those that work at a time.

    Returns:
        the number of participants, and how many of them work at a time.
    """
    workers = worker_count(run.config, len(run.config.tasks.experts) + pooled)
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    return write_nodes(run, inputs, pooled=pooled, general=general, threads=threads), workers


def simulate(
    run: RunDirectory, client_app: ClientApp, nodes: int, workers: int, work: Callable[[Workforce], None]
) -> None:
    """Run `work`, the coordinator's side, against simulated participants; nothing is left running.

    Args:
        run: the run directory, whose `nodes/` has been written.
        client_app: what each participant runs.
        nodes: number of participants.
        workers: how many of them work at a time.
        work: called once, in the ServerApp, with the participants.

    Raises:
        EnvironmentFailure: if Flower or Ray fails.
        SeedbedError: whatever `work` raises.
    """
    cancelled = threading.Event()
    raised: list[BaseException] = []
    server_app = ServerApp()

    os.environ[NODES_VARIABLE] = str(run.root / "nodes")
    gpus = _gpus()
    with _quiet_dependencies(), contextlib.closing(Engine(workers, gpus)) as engine, _hard_interrupt(engine):

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            try:
                work(GridWorkforce(grid, cancelled))
            except BaseException as error:  # brought to the caller as it is: Flower would only log it
                raised.append(error)
            engine.end_stragglers()

        backend = _backend(engine.start(), gpus / workers)
        try:
            _flower(server_app, client_app, nodes, backend)
        except Exception as error:
            cancelled.set()
            if not raised:
                cause = error.__cause__ or error
                raise EnvironmentFailure(
                    f"the simulation engine failed: {type(cause).__name__}: {_first_line(cause)}",
                    ENGINE_HINT,
                ) from error
    if raised:
        raise raised[0]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _flower(server_app: ServerApp, client_app: ClientApp, nodes: int, backend: dict[str, Any]) -> None:
    from flwr.simulation import run_simulation

    run_simulation(server_app, client_app, nodes, backend_config=backend)


def _backend(address: str, gpus: float) -> dict[str, Any]:
    """Flower's settings of an engine that runs already, with a core and `gpus` for each participant at work."""
    return {
        "init_args": {"address": address, "log_to_driver": False, "logging_level": logging.ERROR},
        "client_resources": {"num_cpus": 1, "num_gpus": gpus},
    }


@contextlib.contextmanager
def _quiet_dependencies() -> Iterator[None]:
    """Keep Flower's and Ray's own words off a person's screen; their failures come back as exceptions."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    flower = logging.getLogger("flwr")
    level = flower.level
    flower.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            flower.setLevel(level)


@contextlib.contextmanager
def _hard_interrupt(engine: Engine) -> Iterator[None]:
    """End at once on Ctrl-C or SIGTERM.

    Flower's engine would wait for every running job first. A hard end is safe: the ledger is synced, files are renamed
    into place, and training processes end when their participant does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        print("\nInterrupted. Nothing accepted is lost: continue with --resume.", file=sys.stderr, flush=True)
        engine.close()
        os._exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
