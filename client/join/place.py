"""Where a participant lives on its machine, and what is kept there from one start to the next.

DIR/join.lock     held while it is joined, so that two do not share one place
DIR/join.json     what the coordinator said when it was last reached
DIR/node.yaml     the node file, which the ClientApp reads anew for every job
DIR/store/        adapters that were fetched or trained
DIR/work/         jobs that run, with their logs and checkpoints
DIR/flower/       Flower's own files
DIR/logs/         what the SuperNode prints
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from seedbed.client.join.keys import Keys
from seedbed.common.errors import ConfigError
from seedbed.common.files import atomic_write, storing
from seedbed.common.jobs import Node
from seedbed.common.manifest import Record
from seedbed.common.registry import FederationInfo

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Memory(Record):
    """What the coordinator said when it was last reached."""

    address: str
    info: FederationInfo


def own_name(wanted: str | None, keys: Keys | None) -> str:
    """What a participant is called: as it wants, else as its certificate says, else as its machine is called."""
    return wanted or (keys.name if keys is not None else socket.gethostname())


@dataclass(frozen=True, slots=True)
class Place:
    """A participant's directory."""

    root: Path

    @classmethod
    def of(cls, name: str, root: Path | None = None) -> Place:
        """The directory named, else ``$XDG_DATA_HOME/seedbed/NAME``, else ``~/.local/share/seedbed/NAME``.

        Raises:
            ConfigError: if the name cannot be a participant's.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"'{name}' cannot be a participant's name", "Use letters, digits, dots, - and _.")
        home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share").expanduser()
        place = cls((root or home / "seedbed" / name).expanduser().absolute())
        if any(sign in str(place.root) for sign in "\"'\\\n"):
            raise ConfigError(f"the directory {place.root!r} has quotes or backslashes in its name", "Use another one.")
        return place

    @property
    def node_file(self) -> Path:
        return self.root / "node.yaml"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def log(self) -> Path:
        return self.root / "logs/supernode.log"

    def make(self) -> None:
        """Make the directory, for nobody else to read.

        Raises:
            StorageError: if the file system refuses.
        """
        with storing("write", self.root):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def write_node(self, node: Node) -> None:
        """Replace the node file, all or nothing."""
        data = yaml.safe_dump(node.model_dump(mode="json"), sort_keys=False).encode()
        atomic_write(self.node_file, data, private=True)

    def remember(self, memory: Memory) -> None:
        """Keep what the coordinator said, for a start at which it is away."""
        data = (memory.model_dump_json(indent=2) + "\n").encode()
        atomic_write(self.root / "join.json", data, private=True)

    def remembered(self, address: str) -> FederationInfo | None:
        """What the coordinator at that address said last, if it ever did."""
        try:
            memory = Memory.model_validate_json((self.root / "join.json").read_bytes())
        except (OSError, ValidationError):
            return None
        return memory.info if memory.address == address else None
