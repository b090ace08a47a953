"""The verbs of `seedbed keys`: init, add, list, rotate, revoke. They say where files are, never what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from seedbed.server.keys.authority import SERVER, Authority
from seedbed.server.keys.certificates import LEAF_DAYS, hosts_of
from seedbed.server.keys.directory import expiry_warnings, in_use, read_certificate

_COLOURS = {"valid": "green", "expiring": "yellow", "expired": "red", "revoked": "red"}


def keys_init(directory: Path, hosts: Sequence[str], days: int, console: Console) -> None:
    """``seedbed keys init DIR [--host H ...] [--days]``.

    Raises:
        ConfigError, StorageError: as `Authority.create`.
    """
    Authority.create(directory, hosts, days=days)
    names = ", ".join(hosts_of(read_certificate(directory / SERVER / "server.crt")))
    _say(console, f"{directory}: an authority, and a server certificate for {names}.")
    if not hosts:
        _say(console, "Other machines need a name to reach this one by: seedbed keys rotate DIR server --host NAME.")
    _say(console, f"Keep {directory / 'ca.key'} to yourself. Next: seedbed keys add {directory} NAME.")


def keys_add(directory: Path, name: str, days: int, console: Console) -> None:
    """``seedbed keys add DIR NAME [--days]``.

    Raises:
        ConfigError, StorageError: as `Authority.participant`.
    """
    participant = Authority.load(directory).participant(name, days=days)
    _say(console, f"{participant.folder}: hand this folder to {name}, over a channel that nobody else reads.")
    _say(console, f"They join with: seedbed join HOST --keys {name}")


def keys_list(directory: Path, console: Console, now: datetime | None = None) -> None:
    """``seedbed keys list DIR``: name, kind, expiry, serial's first digits and state of every certificate in use.

    Raises:
        ConfigError, StorageError: if it is not a keys directory, or damaged.
    """
    table = Table("name", "kind", "expires", "serial", "state", title=str(directory))
    for issued, state in in_use(directory, now):
        shown = f"[{_COLOURS[state]}]{state}[/]"
        table.add_row(issued.name, issued.kind, f"{issued.expires:%Y-%m-%d}", issued.serial[:12], shown)
    console.print(table)
    for sentence in expiry_warnings(directory, now):
        _say(console, f"warning: {sentence}; renew it: seedbed keys rotate {directory} NAME|server.")


def keys_rotate(
    directory: Path,
    name: str,
    console: Console,
    *,
    days: int = LEAF_DAYS,
    hosts: Sequence[str] = (),
    new_node_key: bool = False,
) -> None:
    """``seedbed keys rotate DIR NAME|server [--days] [--host H ...] [--new-node-key]``.

    Raises:
        ConfigError, StorageError: as `Authority.rotate`.
    """
    folder = Authority.load(directory).rotate(name, days=days, hosts=hosts, new_node_key=new_node_key)
    if name == SERVER:
        _say(
            console,
            f"{folder}: a new certificate. Gateway and registry take it up by themselves, the SuperLink when it is restarted.",
        )
        return
    _say(console, f"{folder}: a new certificate, the old one is revoked. Hand the folder to {name} again.")
    if new_node_key:
        _say(console, "Its node key is new too: a coordinator that runs registers it within seconds.")


def keys_revoke(directory: Path, name: str, console: Console) -> None:
    """``seedbed keys revoke DIR NAME``.

    Raises:
        ConfigError, StorageError: as `Authority.revoke`.
    """
    Authority.load(directory).revoke(name)
    _say(console, f"{name} is revoked: the registry refuses it from now on.")
    _say(console, "A coordinator that runs shuts its node out within seconds.")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
