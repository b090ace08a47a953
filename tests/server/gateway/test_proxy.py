"""The proxy configurations for sites that put their own before the gateway."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from doorway import House, gateway, running

from seedbed.common.processes import free_port
from seedbed.server.gateway.relay import ACTIVE
from seedbed.server.keys import Authority

PROXY = Path(__file__).resolve().parents[3] / "deploy/proxy"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CADDY = shutil.which("caddy")
MODULES = Path("/etc/nginx/modules-enabled")


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_a_proxy_passes_on_what_the_gateway_does_and_no_more(name: str) -> None:
    lines = [line.split("#")[0] for line in (PROXY / name).read_text().splitlines()]
    assert set(re.findall(r"/v1/[a-z]+/[a-z-]+", "\n".join(lines))) == {f"/v1/fleet/{route}" for route in ACTIVE}


def adapted(place: Path, keys: Path, door: int, listen: int) -> Path:
    """nginx.conf as it is shipped, with this test's places and ports."""
    text = (PROXY / "nginx.conf").read_text()
    for old, new in (
        ("/etc/seedbed/keys", str(keys)),
        ("/run/seedbed-nginx.pid", str(place / "pid")),
        ("127.0.0.1:7400", f"127.0.0.1:{door}"),
        ("listen 443 ssl", f"listen 127.0.0.1:{listen} ssl"),
        ("listen 7401", f"listen 127.0.0.1:{free_port()}"),
    ):
        assert old in text
        text = text.replace(old, new)
    (place / "nginx.conf").write_text(text)
    return place / "nginx.conf"


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx_understands_its_configuration_and_keeps_to_it(tmp_path: Path) -> None:
    assert NGINX is not None
    keys, door, listen = tmp_path / "keys", free_port(), free_port()
    Authority.create(keys)
    tmp_path.chmod(0o755)
    conf = adapted(tmp_path, keys, door, listen)
    checked = subprocess.run([NGINX, "-t", "-c", str(conf)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    with gateway(tmp_path / "run", f"http://127.0.0.1:{free_port()}", "--keys", str(keys)) as (real, process):
        conf.write_text(conf.read_text().replace(f"127.0.0.1:{door}", f"127.0.0.1:{real}"))
        with running([NGINX, "-c", str(conf), "-g", "daemon off;"]) as proxy:
            house = House(keys, 0, listen, process, proxy)
            _wait_for(listen)
            for line, status in (
                ("POST /v1/fleet/pull-messages", 503),  # through to the gateway, whose SuperLink is away
                ("GET /health", 503),
                ("GET /seedbed.json", 503),
                ("POST /v1/control/start-run", 404),
                ("POST /v1/fleet/register-node", 404),
                ("POST /v1/fleet/../control/start-run", 404),
                ("POST /v1/fleet/%2e%2e/control/start-run", 404),
                ("POST //v1/control/start-run", 404),
                ("GET /v1/fleet/pull-messages", 404),
                ("GET /status.json", 404),
            ):
                request = f"{line} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                answer = house.say(listen, request.encode())
                assert answer.startswith(f"HTTP/1.1 {status} ".encode()), (line, answer[:200], proxy.text)


@pytest.mark.skipif(CADDY is None, reason="caddy is not installed")
def test_caddy_understands_its_configuration(tmp_path: Path) -> None:
    Authority.create(tmp_path / "keys")
    text = (PROXY / "Caddyfile").read_text().replace("/etc/seedbed/keys", str(tmp_path / "keys"))
    (tmp_path / "Caddyfile").write_text(text)
    command = [str(CADDY), "validate", "--adapter", "caddyfile", "--config", str(tmp_path / "Caddyfile")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr


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
