"""Verbs of `seedbed keys`: a federation's own certificate authority, certificates and node keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Directory = Annotated[Path, typer.Argument(metavar="DIR")]
Participant = Annotated[str, typer.Argument(metavar="NAME")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", metavar="NAME|ADDRESS", help="How others reach the coordinator; repeatable."),
]
Days = Annotated[int, typer.Option(min=1, help="How long a certificate is valid.")]
_DAYS = 365


def init(directory: Directory, host: Hosts = None, days: Days = _DAYS) -> None:
    """Make a keys directory: an authority and the coordinator's certificate."""
    from seedbed.server.keys.verbs import keys_init

    keys_init(directory, host or [], days, Console())


def add(directory: Directory, name: Participant, days: Days = _DAYS) -> None:
    """Make the folder that one participant is handed: certificate, key, node key."""
    from seedbed.server.keys.verbs import keys_add

    keys_add(directory, name, days, Console())


def list_(directory: Directory) -> None:
    """Show all certificates: whose, until when, whether revoked."""
    from seedbed.server.keys.verbs import keys_list

    keys_list(directory, Console())


def rotate(
    directory: Directory,
    name: Annotated[str, typer.Argument(metavar="NAME|server")],
    host: Hosts = None,
    days: Days = _DAYS,
    new_node_key: Annotated[bool, typer.Option("--new-node-key", help="Replace the node key, too.")] = False,
) -> None:
    """Replace a certificate and revoke the old one."""
    from seedbed.server.keys.verbs import keys_rotate

    keys_rotate(directory, name, Console(), days=days, hosts=host or [], new_node_key=new_node_key)


def revoke(directory: Directory, name: Participant) -> None:
    """Refuse a participant from now on."""
    from seedbed.server.keys.verbs import keys_revoke

    keys_revoke(directory, name, Console())
