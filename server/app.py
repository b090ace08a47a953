"""The Flower ServerApp of a deployed federation; a simulation builds its own around the same stages.

The run configuration of Flower names the run directory: `flwr run … --run-config 'seedbed-run="DIR"'`.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from seedbed.common.config_file import load_config
from seedbed.common.errors import ConfigError
from seedbed.server.conductor import conduct, open_setting
from seedbed.server.observer import Lines
from seedbed.server.workforce import GridWorkforce

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    directory = context.run_config.get("seedbed-run")
    if not isinstance(directory, str):
        raise ConfigError(
            "the run configuration names no run directory", "Pass --run-config 'seedbed-run=\"DIR\"' to flwr run."
        )
    root = Path(directory)
    config = load_config(str(root / "config.yaml"))
    setting = open_setting(config, root, Lines(Console(stderr=True)), resume=True)
    try:
        conduct(setting, GridWorkforce(grid))
    finally:
        setting.run.close()
