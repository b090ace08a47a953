"""What the SuperLink is asked over its control route, which nobody but this machine reaches.

Flower's command line does the same, at three seconds of imports a call; a federation of a hundred nodes registers a hundred
keys. The modules behind it are not part of Flower's public interface: this file alone knows them.
"""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from ssl import SSLContext, create_default_context
from typing import Any

from seedbed.common.errors import EnvironmentFailure

ENDED = "finished"


@dataclass(frozen=True, slots=True)
class RegisteredNode:
    """A node that the SuperLink knows."""

    node_id: int
    public_key: bytes
    status: str
    """``registered``, ``online``, ``offline`` or ``unregistered``."""


class SuperLinkControl:
    """The control route of one SuperLink.

    Args:
        address: ``host:port``.
        ca: certificate of the authority that signed its own; none is plain HTTP.
    """

    def __init__(self, address: str, ca: Path | None = None) -> None:
        self.address = address
        self.ca = ca

    @property
    def url(self) -> str:
        return f"{'http' if self.ca is None else 'https'}://{self.address}"

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            with self._opener().open(f"{self.url}/health", timeout=2.0) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError, ValueError):
            return False

    def start(self, app: Path, settings: Mapping[str, Any]) -> int:
        """Submit a run of a bundle; returns its number.

        Raises:
            EnvironmentFailure: if the SuperLink refuses it, or is gone.
        """
        from flwr.cli.build import build_fab_from_disk
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        content = build_fab_from_disk(app)
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
            override_config=user_config_to_proto(dict(settings)),
        )
        answer = self._call("StartRun", request)
        if not answer.HasField("run_id"):
            raise EnvironmentFailure("the SuperLink did not start the run", "See the coordinator's log.")
        return int(answer.run_id)

    def stop(self, run: int) -> None:
        """End a run; one that has ended is left as it is."""
        from flwr.proto.control_pb2 import StopRunRequest

        try:
            self._call("StopRun", StopRunRequest(run_id=run))
        except EnvironmentFailure:
            return

    def status(self, run: int) -> tuple[str, str]:
        """Of a run: ``pending``, ``starting``, ``running`` or ``finished``, and what more is said of it."""
        from flwr.proto.control_pb2 import ListRunsRequest

        found = self._call("ListRuns", ListRunsRequest(run_id=run)).run_dict
        if run not in found:
            return ENDED, "unknown"
        status = found[run].status
        return str(status.status), " ".join(filter(None, (status.sub_status, status.details)))

    def nodes(self) -> list[RegisteredNode]:
        """All nodes that are or were registered."""
        from flwr.proto.control_pb2 import ListNodesRequest

        return [
            RegisteredNode(int(node.node_id), bytes(node.public_key), str(node.status))
            for node in self._call("ListNodes", ListNodesRequest()).nodes_info
        ]

    def register(self, public_key: bytes, name: str) -> bool:
        """Let a node in; False where its key is in use, or was and has been unregistered.

        Args:
            public_key: in PEM.
        """
        from flwr.proto.control_pb2 import RegisterNodeRequest

        try:
            return bool(self._call("RegisterNode", RegisterNodeRequest(public_key=public_key, name=name)).node_id)
        except EnvironmentFailure as error:
            if "already in use" in error.message:
                return False
            raise

    def unregister(self, node_id: int) -> None:
        """Shut a node out."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._call("UnregisterNode", UnregisterNodeRequest(node_id=node_id))

    def _call(self, method: str, request: Any) -> Any:
        from flwr.supercore.control import ControlHttpClient

        client = ControlHttpClient.from_server_address(
            self.address, self.ca is None, str(self.ca) if self.ca is not None else None, interceptors=[]
        )
        try:
            return getattr(client, method)(request)
        except Exception as error:  # of several kinds, none of them documented
            said = " ".join(str(error).split()).partition(" For more information check:")[0]  # httpx on status codes
            reason = said[:300] or type(error).__name__
            raise EnvironmentFailure(
                f"the SuperLink refused {method}: {reason}", "See the coordinator's log."
            ) from None
        finally:
            client.close()

    def _opener(self) -> urllib.request.OpenerDirector:
        context: SSLContext | None = None if self.ca is None else create_default_context(cafile=str(self.ca))
        return urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
