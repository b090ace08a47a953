"""Ray for one simulation, in a process of its own: whatever ends the simulation, nothing that Ray has started is left.

Ray starts its services below whoever initializes it, and leaves their end to their own sight of things: after kill -9 of
a simulation its agents and actors went on for up to a minute, and with them the trainings that an actor had started. Here a
host process initializes Ray below a `keeper`, which ends all of it at once, and the simulation connects to it.

    simulation (Engine)  --- keeper --->  host: ``python -m seedbed.server.engine SETTINGS``  --->  Ray's services and actors
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from seedbed.common.errors import EnvironmentFailure
from seedbed.common.processes import Child

ENGINE_HINT = "See whether Ray can start on this machine (memory, ports, /tmp), then continue with --resume."
_START_SECONDS = 120.0
_STRAGGLER_SECONDS = 10.0
_READY = "engine at "
_ACTOR = "ray::ClientAppActor"
"""How Ray calls the process of a Flower participant, while it works (with a suffix) and while it does not."""


class Engine:
    """A Ray of this process's own.

    Args:
        cpus: actors that run at the same time.
        gpus: GPUs that they share.
    """

    def __init__(self, cpus: int, gpus: int) -> None:
        self._cpus, self._gpus = cpus, gpus
        self._host: Child | None = None
        self._over = threading.Event()

    def start(self) -> str:
        """Start Ray.

        Returns:
            the address to connect to.

        Raises:
            EnvironmentFailure: if it does not start.
        """
        # Short enough for Unix sockets, which Ray makes in it.
        directory = Path(tempfile.mkdtemp(prefix="sb-ray-", dir="/tmp" if Path("/tmp").is_dir() else None))
        settings = {
            "address": "local",  # not one that RAY_ADDRESS names
            "num_cpus": self._cpus,
            "num_gpus": self._gpus,
            "include_dashboard": False,
            "object_store_memory": 100_000_000,  # adapters travel through files: Ray only carries small messages
            "_temp_dir": str(directory),
        }
        said: queue.Queue[str] = queue.Queue()
        command = [sys.executable, "-m", "seedbed.server.engine", json.dumps(settings)]
        self._host = Child("engine", command, on_line=said.put, scratch=directory)
        until, last, ended = time.monotonic() + _START_SECONDS, "it did not answer", False
        while time.monotonic() < until:
            try:
                line = said.get(timeout=0.2)
            except queue.Empty:
                if ended:
                    break
                ended = self._host.poll() is not None  # its last words may still be on their way
                continue
            if line.startswith(_READY):
                return line.removeprefix(_READY)
            last = line.strip() or last
        raise EnvironmentFailure(f"the simulation engine did not start: {last[:300]}", ENGINE_HINT)

    def end_stragglers(self) -> None:
        """Called when the coordinator is done: Flower would wait even for a participant that hangs."""
        threading.Thread(target=self._kill_actors, daemon=True).start()

    def close(self) -> None:
        """End Ray and all that its actors have started; called again, it does nothing."""
        self._over.set()
        host, self._host = self._host, None
        if host is not None:
            host.kill()

    def _kill_actors(self) -> None:
        host = self._host
        if host is None or self._over.wait(_STRAGGLER_SECONDS):
            return
        for process in host.descendants():  # actors alone: without its agents, Ray's node goes down
            with contextlib.suppress(psutil.Error):
                if any(word.startswith(_ACTOR) for word in process.cmdline()[:1]):
                    process.kill()


def main(settings: dict[str, Any]) -> None:
    """The host: initialize Ray, say where it is, and wait to be ended."""
    import ray

    ray.init(log_to_driver=False, **settings)
    print(_READY + ray.get_runtime_context().gcs_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
