"""The Flower ServerApp of a deployed federation; a simulation builds its own around the same stages.

The run configuration of Flower names the run directory: `flwr run … --run-config 'seedbed-run="DIR"'`. What happens is
written to the run's ``events.jsonl``, since nobody sees this process: whoever started the run follows that file.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from seedbed.common.config_file import load_config
from seedbed.common.errors import ConfigError, SeedbedError
from seedbed.common.events import EventLog
from seedbed.common.files import atomic_write
from seedbed.common.manifest import Record
from seedbed.server.conductor import conduct, open_setting, settled
from seedbed.server.messenger import GridMessenger
from seedbed.server.observer import Lines, Recorder

app = ServerApp()

PRESENCE = Path("superlink") / "serverapp.json"
"""In the run directory: which process the ServerApp is."""
WANTED = Path("superlink") / "submission"
"""Likewise: which submission of the run is to be worked for. A SuperLink that is started again also starts what it had been
given before; such a ServerApp ends at once."""


class Presence(Record):
    """Who writes this is at work, or has been."""

    pid: int
    submission: str
    """Which submission of the run it works for, as whoever submitted it calls it."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    directory = context.run_config.get("seedbed-run")
    if not isinstance(directory, str) or not directory:
        raise ConfigError(
            "the run configuration names no run directory", "Pass --run-config 'seedbed-run=\"DIR\"' to flwr run."
        )
    root = Path(directory)
    submission = str(context.run_config.get("seedbed-submission", ""))
    if submission and submission != wanted(root):
        return
    here = Presence(pid=os.getpid(), submission=submission)
    atomic_write(root / PRESENCE, here.model_dump_json().encode())
    _serve(root, grid, str(context.run_config.get("seedbed-command", "")))


def wanted(root: Path) -> str:
    """The submission that a run directory's coordinator waits for; empty for none."""
    try:
        return (root / WANTED).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def _serve(root: Path, grid: Grid, command: str) -> None:
    recorder = Recorder(EventLog(root / "events.jsonl"), also=Lines(Console(stderr=True, width=200)))
    try:
        config = load_config(str(root / "config.yaml"))
        setting = open_setting(config, root, recorder, resume=True, command=command, training=False)
        try:
            if not settled(setting.run):
                conduct(setting, GridMessenger(grid))
        finally:
            setting.run.close()
    except SeedbedError as error:
        recorder.failed(error)
        raise
    recorder.finished()
