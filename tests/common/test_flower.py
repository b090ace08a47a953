"""What Flower's processes are told, and what hosts are called."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from seedbed.common.flower import flower_environment
from seedbed.common.hosts import host_port, is_loopback


def test_nothing_of_this_machine_goes_through_a_proxy_however_the_variable_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "intern.example")
    monkeypatch.setenv("no_proxy", "small.example,localhost")
    told = flower_environment(tmp_path, "192.0.2.7")
    assert told["no_proxy"] == told["NO_PROXY"] == "127.0.0.1,localhost,::1,192.0.2.7,intern.example,small.example"


def test_programs_of_this_interpreter_come_first_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join(["/usr/bin", here, "/bin"]))
    assert flower_environment(tmp_path)["PATH"].split(os.pathsep) == [here, "/usr/bin", "/bin"]


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.7", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_which_addresses_reach_no_further_than_this_machine(host: str, alone: bool) -> None:
    assert is_loopback(host) == alone


def test_an_ipv6_address_with_a_port_is_in_brackets_once() -> None:
    assert (host_port("::1", 1), host_port("[::1]", 1), host_port("a.org", 1)) == ("[::1]:1", "[::1]:1", "a.org:1")
