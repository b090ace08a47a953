"""What participants can do through the gateway, and what they cannot, with a real SuperLink behind it."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from doorway import BIN, House, gateway, running
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest  # type: ignore[import-untyped]
from flwr.supercore.control import ControlHttpClient  # type: ignore[import-untyped]
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE  # type: ignore[import-untyped]

from seedbed.common.config_file import dump_config, load_config
from seedbed.common.processes import free_port
from seedbed.server.gateway.relay import ACTIVE, NOT_HERE, SELF_REGISTERING
from seedbed.server.keys import Authority, node_keys

FORGED = StartRunRequest(federation="default").SerializeToString()
CONTROL = [
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/control/list-nodes",
    "/v1/runtime/pull-task-input",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
]
DISGUISED = [
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/%63ontrol/start-run",
    "/v1%2Fcontrol%2Fstart-run",
    "//v1/control/start-run",
    "/v1//control/start-run",
    "/v1/./control/start-run",
    "/V1/CONTROL/START-RUN",
    "/v1/control/start-run/",
    "/v1/control/start-run?x=/v1/fleet/pull-messages",
    "/v1/control/start-run;/v1/fleet/pull-messages",
    "/v1/control/start-run#/v1/fleet/pull-messages",
    "/v1/fleet\\..\\control\\start-run",
    "/v1/fleet/%252e%252e/control/start-run",
    "/v1/fleet/",
    "/v1/fleet/pull-messages?x=1",
    "/docs",
    "/openapi.json",
    "*",
]


@contextmanager
def control(house: House) -> Iterator[ControlHttpClient]:
    """The SuperLink's control routes as the coordinator reaches them: on its own port."""
    ca = str(house.keys / "ca.crt")
    client = ControlHttpClient.from_server_address(f"127.0.0.1:{house.superlink}", False, ca, [])
    try:
        yield client
    finally:
        client.close()


def state(house: House, node_id: int) -> str:
    with control(house) as client:
        nodes = {node.node_id: node.status for node in client.ListNodes(ListNodesRequest()).nodes_info}
    return str(nodes[node_id])


def public_pem(path: Path) -> bytes:
    key = serialization.load_ssh_public_key(path.read_bytes())
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def supernode(house: House, name: str) -> list[str]:
    folder = house.keys / "participants" / name
    return [
        *(str(BIN / "flower-supernode"), "--superlink", f"127.0.0.1:{house.gateway}", "--port", str(free_port())),
        *("--root-certificates", str(folder / "ca.crt"), "--auth-supernode-private-key", str(folder / "node.key")),
    ]


def post(house: House, port: int, target: str, *headers: str, method: str = "POST") -> bytes:
    lines = [
        f"{method} {target} HTTP/1.1",
        "host: localhost",
        f"content-type: {PROTOBUF_MEDIA_TYPE}",
        f"accept: {PROTOBUF_MEDIA_TYPE}",
    ]
    lines += [f"content-length: {len(FORGED)}", "connection: close", *headers]
    return house.say(port, "\r\n".join([*lines, "", ""]).encode() + FORGED)


def is_refused(answer: bytes) -> bool:
    return answer.split(b"\r\n")[0].endswith(b" 404 Not Found") and answer.endswith(NOT_HERE.encode())


def test_a_node_with_a_registered_key_comes_online_through_the_gateway(house: House) -> None:
    name = f"alice-{uuid.uuid4().hex[:6]}"  # a key is registered once, and a test may be tried again
    Authority.load(house.keys).participant(name)
    with control(house) as client:
        request = RegisterNodeRequest(public_key=public_pem(node_keys(house.keys)[name]), name=name)
        expected = client.RegisterNode(request).node_id
    assert state(house, expected) == "registered"
    with running(supernode(house, name)) as node:
        line = house.superlink_says.until(lambda text: "Activated node_id" in text)
        assert line.endswith(f"node_id={expected}")
        assert state(house, expected) == "online"
        assert node.popen.poll() is None
    end = time.monotonic() + 90
    while state(house, expected) != "offline" and time.monotonic() < end:  # its farewell, or a minute of silence
        time.sleep(0.5)
    assert state(house, expected) == "offline"


def test_a_node_whose_key_is_not_registered_is_turned_away(house: House) -> None:
    before = house.superlink_says.text.count("Activated node_id")
    with running(supernode(house, "mallory")) as node:
        assert node.popen.wait(120) != 0
    assert house.superlink_says.text.count("Activated node_id") == before


def test_a_node_without_a_key_cannot_register_itself(house: House) -> None:
    command = supernode(house, "mallory")[:-2]
    with running(command) as node:
        assert node.popen.wait(120) != 0


@pytest.mark.parametrize("target", CONTROL + DISGUISED)
def test_control_and_runtime_routes_do_not_exist_at_the_gateway(house: House, target: str) -> None:
    assert is_refused(post(house, house.gateway, target))


@pytest.mark.parametrize("port", ["gateway", "superlink"])
def test_the_absolute_form_leads_nowhere_else(house: House, port: str) -> None:
    target = f"https://127.0.0.1:{getattr(house, port)}/v1/control/start-run"
    assert is_refused(post(house, house.gateway, target))


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD", "OPTIONS", "PATCH", "DELETE", "post", "TRACE", "CONNECT"])
def test_no_other_method_reaches_the_superlink(house: House, method: str) -> None:
    for target in ("/v1/control/start-run", "/v1/fleet/pull-messages"):
        answer = post(house, house.gateway, target, method=method)
        assert answer.split(b" ")[1] in (b"404", b"400"), answer


@pytest.mark.parametrize(
    "header",
    [
        "x-original-url: /v1/control/start-run",
        "x-rewrite-url: /v1/control/start-run",
        "x-forwarded-prefix: /v1/control",
        "x-http-method-override: POST",
    ],
)
def test_headers_do_not_choose_the_route(house: House, header: str) -> None:
    answer = post(house, house.gateway, "/v1/fleet/pull-messages", header)
    assert b" 401 " in answer.split(b"\r\n")[0]  # passed on as what it is, and not signed by a node


def test_a_second_call_cannot_be_smuggled_into_the_first(house: House) -> None:
    inner = f"POST /v1/control/start-run HTTP/1.1\r\nhost: x\r\ncontent-length: {len(FORGED)}\r\n\r\n".encode() + FORGED
    both = (
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    before = house.superlink_says.text.count("/v1/control/start-run")
    house.say(house.gateway, both + b"0\r\n\r\n" + inner.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))
    assert house.superlink_says.text.count("/v1/control/start-run") == before


def test_the_same_requests_do_reach_the_superlink_on_its_own_port(house: House) -> None:
    for target in ("/v1/control/start-run", "/v1/control/register-node", "/v1/control/list-nodes"):
        answer = post(house, house.superlink, target)
        assert not is_refused(answer)
        assert b'{"detail":"Not Found"}' not in answer  # a route that is there, whatever it thinks of the request
    house.superlink_says.until(lambda text: "/v1/control/start-run" in text)


def test_every_route_that_a_supernode_needs_is_passed_on(house: House) -> None:
    for name in ACTIVE:
        answer = post(house, house.gateway, f"/v1/fleet/{name}")
        assert not is_refused(answer), name
        assert answer.split(b" ")[1] in (b"400", b"401"), answer  # the SuperLink's own answer to an unsigned call


def test_the_routes_are_those_of_flowers_own_client() -> None:
    source = Path(sys.modules["flwr"].__path__[0], "supernode/fleet_http_client.py").read_text()
    asked = {line.split('"')[1] for line in source.splitlines() if 'path="/v1/' in line}
    assert asked == {f"/v1/fleet/{name}" for name in ACTIVE + SELF_REGISTERING}


def test_a_body_that_is_too_long_is_not_taken(house: House) -> None:
    head = "POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\n"
    declared = house.say(house.gateway, f"{head}content-length: 999999999999\r\n\r\n".encode())
    assert b" 413 " in declared.split(b"\r\n")[0]
    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    try:
        endless = house.say(house.gateway, f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunk * 17)
    except OSError:  # the connection is cut while we still send
        return
    assert b" 413 " in endless.split(b"\r\n")[0]


def test_health_tells_what_can_be_reached(house: House) -> None:
    answer = house.get("/health")
    assert answer.status_code == 503  # no registry runs here
    assert answer.json() == {"gateway": True, "superlink": True, "registry": False}


def test_answers_carry_headers_that_keep_browsers_from_harm(house: House) -> None:
    for path in ("/", "/health", "/nowhere"):
        headers = house.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "server" not in headers


def test_plaintext_is_not_spoken_where_there_are_keys(house: House) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{house.gateway}/health", trust_env=False)


def test_old_tls_is_refused(house: House) -> None:
    context = house.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"https://127.0.0.1:{house.gateway}/health", verify=context, trust_env=False)


def test_a_federation_is_told_of_once_it_is_set_up(tmp_path: Path) -> None:
    with gateway(tmp_path, f"http://127.0.0.1:{free_port()}") as (port, process):
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/seedbed.json", trust_env=False).status_code == 503
        (tmp_path / "config.yaml").write_text(dump_config(load_config("embedded")))
        (tmp_path / "ledger.jsonl").write_text('{"event":"start"}\n')
        info = httpx.get(f"{url}/seedbed.json", trust_env=False, timeout=60).json()
        assert (info["state"], info["secure"], info["base"]["model"]) == ("waiting", False, "embedded")
        assert httpx.get(f"{url}/status.json", trust_env=False).status_code == 200
        assert "text/plain" in httpx.get(f"{url}/metrics", trust_env=False).headers["content-type"]
        page = httpx.get(url, trust_env=False)
        assert page.text.startswith("<!DOCTYPE html>")
        assert "script-src 'sha256-" in page.headers["content-security-policy"]
        # Nobody listens upstream: SuperNodes are told to come again, and find their way to register without keys.
        for name in ("pull-messages", "register-node"):
            assert httpx.post(f"{url}/v1/fleet/{name}", trust_env=False).status_code == 503
        assert httpx.get(f"{url}/health", trust_env=False).json()["superlink"] is False
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(120) == 0


def test_a_rotated_certificate_is_taken_up_without_a_restart(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "keys")
    with gateway(tmp_path, f"http://127.0.0.1:{free_port()}", "--keys", str(tmp_path / "keys")) as (port, _):
        before = ssl.get_server_certificate(("127.0.0.1", port))
        authority.rotate("server")
        end = time.monotonic() + 60
        while ssl.get_server_certificate(("127.0.0.1", port)) == before:
            assert time.monotonic() < end
            time.sleep(0.5)
        assert ssl.get_server_certificate(("127.0.0.1", port)).strip() == (
            (tmp_path / "keys/server/server.crt").read_text().strip()
        )


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--listen", "0.0.0.0:0", "--upstream", "http://127.0.0.1:1"], 3, "would listen at 0.0.0.0 without TLS"),
        (["--listen", "127.0.0.1:0", "--upstream", "http://192.0.2.1:1"], 3, "192.0.2.1 would be called without TLS"),
        (["--listen", "127.0.0.1:0", "--upstream", "127.0.0.1:1"], 3, "is no address of a SuperLink"),
        (["--listen", "127.0.0.1:0", "--upstream", "http://127.0.0.1:1", "--keys", "/nowhere"], 3, "cannot be used"),
        (
            ["--listen", "192.0.2.1:1", "--upstream", "http://127.0.0.1:1", "--insecure"],
            11,
            "cannot listen at 192.0.2.1",
        ),
    ],
)
def test_what_would_not_be_safe_or_cannot_be_is_refused(
    tmp_path: Path, options: list[str], code: int, sentence: str
) -> None:
    command = [sys.executable, "-m", "seedbed.server.gateway", "--run", str(tmp_path), "--registry-port", "1", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == code
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("damage", [None, b"no certificate"])
def test_keys_without_an_authority_are_refused(tmp_path: Path, damage: bytes | None) -> None:
    Authority.create(tmp_path / "keys")
    (tmp_path / "keys/ca.crt").unlink()
    if damage is not None:
        (tmp_path / "keys/ca.crt").write_bytes(damage)
    command = [sys.executable, "-m", "seedbed.server.gateway", "--run", str(tmp_path), "--registry-port", "1"]
    command += ["--listen", "127.0.0.1:0", "--upstream", "http://127.0.0.1:1", "--keys", str(tmp_path / "keys")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, "ca.crt cannot be used" in ended.stderr) == (3, True), ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("service", ["gateway", "registry"])
@pytest.mark.parametrize("listen", ["nowhere", "localhost:", "localhost:x", "localhost:65536", ":-1", ""])
def test_an_address_to_listen_at_that_is_none_is_a_usage_error(tmp_path: Path, service: str, listen: str) -> None:
    command = [sys.executable, "-m", f"seedbed.server.{service}", "--run", str(tmp_path), f"--listen={listen}"]
    command += ["--upstream", "http://127.0.0.1:1", "--registry-port", "1"] if service == "gateway" else []
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert f"expected HOST:PORT, got '{listen}'" in ended.stderr


def test_the_listening_line_is_json(house: House) -> None:
    found = json.loads(next(line for line in house.gateway_says.lines if line.startswith("{")))
    assert found == {"event": "listening", "port": house.gateway}
