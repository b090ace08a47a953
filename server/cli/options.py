"""Options that several verbs have, and what follows from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number of seconds.")
    return value


Out = Annotated[Path | None, typer.Option(help="Run directory; runs/NAME unless given.", show_default=False)]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one setting; repeatable.")
]
Data = Annotated[
    Path | None, typer.Option(help="Directory with NAME.train.jsonl and NAME.test.jsonl.", show_default=False)
]
LmEval = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Write MODEL/results_DATE.json in lm-eval's own format.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run; nothing finished is done again.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only, no progress.")]
Host = Annotated[str, typer.Option(metavar="HOST[:PORT]", help="The coordinator.")]
HOST = "127.0.0.1:7400"
Folder = Annotated[
    Path | None, typer.Option("--keys", metavar="FOLDER", help="What the coordinator handed out.", show_default=False)
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Without TLS, also where it leaves this machine.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="FILE|NAME=FILE", help="Training data, or a YAML file that names it; repeatable."),
]
General = Annotated[
    Path | None,
    typer.Option("--general", metavar="FILE", help="General text, for routing tuning.", show_default=False),
]
Base = Annotated[
    Path | None,
    typer.Option("--base", metavar="DIR", help="The base model, if it is not in the cache.", show_default=False),
]
Name = Annotated[
    str | None, typer.Option("--name", help="The certificate's, or the host's, unless given.", show_default=False)
]
Work = Annotated[
    Path | None,
    typer.Option("--work", metavar="DIR", help="~/.local/share/seedbed/NAME unless given.", show_default=False),
]
Linger = Annotated[
    float,
    typer.Option(metavar="SECONDS", callback=_finite, help="Serve so long after the end; -1: until interrupted."),
]
Wait = Annotated[
    float, typer.Option(metavar="SECONDS", min=0, callback=_finite, help="Try a first contact for so long.")
]
Pause = Annotated[
    float, typer.Option(metavar="SECONDS", min=0, callback=_finite, help="Time between checkpoints of a training.")
]
Gpus = Annotated[str, typer.Option("--gpus", metavar="LIST", help="auto, none, or indices such as 0,1.")]


def overrides(set_: list[str] | None, data: Path | None) -> list[str]:
    """What ``--set`` and ``--data`` change of a configuration, the latter last."""
    return [*(set_ or []), *([f"tasks.data={data.resolve()}"] if data is not None else [])]
