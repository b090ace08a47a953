"""A coordinator on another machine, seen through its gateway's `status.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from seedbed.server.monitor.document import from_json
from seedbed.server.monitor.state import Status

STATUS_PATH = "/status.json"


def remote(get: Callable[[str], Any]) -> Callable[[], Status]:
    """A look at a coordinator elsewhere.

    Args:
        get: asks a gateway for the JSON value at a path, as what `seedbed.client.connect.gateway` returns does.

    Returns:
        what `show_status` and `watch` take; it raises EnvironmentFailure where nobody answers.
    """

    def look() -> Status:
        return from_json(get(STATUS_PATH))

    return look
