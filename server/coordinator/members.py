"""Keeps the nodes that the SuperLink lets in equal to the keys directory: participants may come, revoked ones may not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from seedbed.common.errors import ConfigError, EnvironmentFailure, SeedbedError
from seedbed.server.coordinator.control import SuperLinkControl

_GONE = "unregistered"
_RENAMING_SECONDS = 0.2


class Members:
    """Registered nodes by their public keys.

    Args:
        node_keys: reads the keys directory: the file of the public key of every participant that is in.
        say: is told of every change, and of what is wrong.
    """

    def __init__(
        self, control: SuperLinkControl, node_keys: Callable[[], dict[str, Path]], say: Callable[[str], None]
    ) -> None:
        self.control = control
        self._node_keys, self._say = node_keys, say
        self._known: dict[str, bytes] | None = None
        self._complaint = ""

    def synchronize(self) -> None:
        """Register and unregister what has changed in the directory. Trouble is said once, and tried again."""
        try:
            wanted = self._wanted()
            if self._known and self._known.keys() - wanted.keys():  # or its folder is being replaced just now
                time.sleep(_RENAMING_SECONDS)
                wanted = self._wanted()
            if wanted != self._known:
                self._apply(wanted)
                self._known = wanted
            self._complaint = ""
        except (SeedbedError, OSError) as error:
            told = error.message if isinstance(error, SeedbedError) else str(error)
            if told != self._complaint:
                self._say(f"the keys directory cannot be followed: {told}")
            self._complaint = told

    def _wanted(self) -> dict[str, bytes]:
        return {name: pem(path) for name, path in self._node_keys().items()}

    def _apply(self, wanted: dict[str, bytes]) -> None:
        inside = {node.public_key: node.node_id for node in self.control.nodes() if node.status != _GONE}
        for name, key in wanted.items():
            if key not in inside:
                let_in = self.control.register(key, name)
                self._say(f"{name} may join" if let_in else f"{name} was shut out for good: it needs new keys")
        for key, node in inside.items():
            if key not in wanted.values():
                try:
                    self.control.unregister(node)
                except EnvironmentFailure as error:
                    self._say(error.message)
                    continue
                name = next((name for name, old in (self._known or {}).items() if old == key), str(node))
                self._say(f"{name} is shut out")


def pem(path: Path) -> bytes:
    """A public key in OpenSSH format as the SuperLink wants it.

    Raises:
        ConfigError: if it is none.
        OSError: if the file cannot be read.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    try:
        key = load_ssh_public_key(path.read_bytes())
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} is no public key", "Make the participant's keys again.") from None
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
