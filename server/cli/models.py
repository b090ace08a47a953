"""Verbs on base models: model fetch."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from seedbed.common.errors import ConfigError
from seedbed.server.cli.options import Quiet


def fetch(
    name: Annotated[str, typer.Argument(help="smollm2")],
    quiet: Quiet = False,
) -> None:
    """Obtain a base model once, verified, into the cache."""
    from seedbed.common.errors import nearest
    from seedbed.common.smollm2 import fetch as fetch_smollm2

    if name != "smollm2":
        raise ConfigError(f"there is no model '{name}' to fetch", nearest(name, ["smollm2"]))
    console = Console(stderr=True, quiet=quiet)
    directory = fetch_smollm2(lambda text: console.print(text, highlight=False))
    Console().print(str(directory), highlight=False, soft_wrap=True)
