"""The hosts of the deployment test are hosts: they have addresses, can be cut off and killed, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from netns import Host, Network, reason_not_to

pytestmark = pytest.mark.skipif(bool(reason_not_to()), reason=reason_not_to() or "possible")

SERVER = """
import socket
with socket.create_server(("0.0.0.0", 7400)) as server:
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(connection.getpeername()[0].encode())
"""
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], 7400), timeout=5) as connection:
    print(connection.recv(100).decode(), end="")
"""


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


def serve(host: Host) -> subprocess.Popen[str]:
    server: subprocess.Popen[str] = host.popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    return server


def ask(host: Host, server: Host) -> subprocess.CompletedProcess[str]:
    return host.run([sys.executable, "-c", CLIENT, server.address])


def test_hosts_see_each_other_at_their_own_addresses_and_the_machine_has_none_of_them(network: Network) -> None:
    server, one, other = network.host(), network.host(), network.host()
    process = serve(server)
    assert ask(one, server).stdout == one.address
    assert ask(other, server).stdout == other.address
    assert one.address != other.address
    # Asked of the machine's own tables: a packet sent there from outside would leave the machine.
    own = subprocess.run(["ip", "address"], capture_output=True, text=True).stdout
    assert server.address.rpartition(".")[0] not in own
    assert process.pid in server.processes()


def test_a_host_that_is_cut_off_hears_nothing_until_it_is_plugged_in_again(network: Network) -> None:
    server, one, other = network.host(), network.host(), network.host()
    serve(server)
    one.cut_off()
    assert ask(one, server).returncode != 0
    assert ask(other, server).stdout == other.address
    one.plug_in()
    assert ask(one, server).stdout == one.address


def test_nothing_is_left_behind_even_of_a_test_that_fails() -> None:
    network = Network()
    processes = []

    def fail_in_the_middle() -> None:
        with network:
            processes.append(serve(network.host()))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_in_the_middle()
    (process,) = processes
    assert process.wait(60) == -9
    assert process.stdout is not None
    process.stdout.close()
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(host.namespace in left for host in network.hosts)
