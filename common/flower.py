"""What every process of Flower's that we start is told, whichever side starts it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_LOCAL = ("127.0.0.1", "localhost", "::1")


def flower_environment(home: Path, *direct: str) -> dict[str, str]:
    """Variables on top of this process's: programs of this interpreter first, no proxy, no words to the outside.

    Args:
        home: where Flower keeps what it has.
        direct: hosts beyond this machine that are reached without a proxy, too.
    """
    return {
        "PATH": scripts_first(os.environ.get("PATH", os.defpath)),
        **without_proxy(*direct),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def without_proxy(*direct: str) -> dict[str, str]:
    """Variables under which programs reach this machine, and hosts, without a proxy; what is spared already stays so."""
    # Programs read either spelling of the one variable, and some that in small letters first.
    spared = [host for name in ("NO_PROXY", "no_proxy") for host in os.environ.get(name, "").split(",") if host]
    hosts = ",".join(dict.fromkeys((*_LOCAL, *direct, *spared)))
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def scripts_first(path: str) -> str:
    """A PATH on which Flower's own programs of this interpreter's environment are found before any others."""
    here = str(Path(sys.executable).parent)
    return os.pathsep.join([here, *(part for part in path.split(os.pathsep) if part and part != here)])
