"""A real SuperLink on loopback behind a real gateway with TLS."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from doorway import BIN, House, gateway, running

from seedbed.common.processes import free_port
from seedbed.server.keys import Authority


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    place = tmp_path_factory.mktemp("house")
    keys = place / "keys"
    authority = Authority.create(keys)
    for name in ("alice", "mallory"):
        authority.participant(name)
    port = free_port()
    command = [str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth"]
    command += ["--disable-runtime-dependency-installation", "--ssl-ca-certfile", str(keys / "ca.crt")]
    command += ["--ssl-certfile", str(keys / "server/server.crt"), "--ssl-keyfile", str(keys / "server/server.key")]
    with running(command, {"FLWR_HOME": str(place / "flower")}) as superlink:
        superlink.until(lambda line: "Uvicorn running" in line)
        with gateway(place / "run", f"https://127.0.0.1:{port}", "--keys", str(keys)) as (door, process):
            yield House(keys, port, door, superlink, process)
