"""Private keys stay in their files: not in what verbs print, not in logs, not in argv, not in a traceback."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from doorway import gateway
from rich.console import Console

from seedbed.common.errors import ConfigError, SeedbedError
from seedbed.common.processes import free_port
from seedbed.server.keys import Authority
from seedbed.server.keys.certificates import make_authority, make_node_key
from seedbed.server.keys.verbs import keys_add, keys_init, keys_list, keys_revoke, keys_rotate


def secrets_of(keys: Path) -> list[str]:
    """Every line of every private key below a directory, and what marks one."""
    texts = [path.read_text() for path in keys.rglob("*.key")]
    lines = {line for text in texts for line in text.splitlines() if len(line) > 20 and "-----" not in line}
    assert len(lines) >= 4
    # The first lines of an OpenSSH or PKCS#8 key say only which kind it is, and are the same for everybody.
    return ["PRIVATE KEY", *sorted(lines)]


def assert_silent(text: str, keys: Path) -> None:
    for secret in secrets_of(keys):
        assert secret not in text


@pytest.fixture
def said() -> Console:
    return Console(file=io.StringIO(), width=200, record=True)


def test_the_verbs_tell_what_they_did_and_no_secret(tmp_path: Path, said: Console) -> None:
    keys = tmp_path / "keys"
    keys_init(keys, ["gpu.example.org"], 365, said)
    keys_add(keys, "alice", 365, said)
    keys_add(keys, "bob", 10, said)
    old = secrets_of(keys)
    keys_rotate(keys, "alice", said, new_node_key=True)
    keys_rotate(keys, "server", said, hosts=["other.example.org"])
    keys_revoke(keys, "bob", said)
    keys_list(keys, said)
    text = said.export_text()
    assert_silent(text, keys)
    assert not any(secret in text for secret in old)
    assert "gpu.example.org" in text
    assert "seedbed join HOST --keys alice" in text
    row = next(line for line in text.splitlines() if re.search(r"│ *bob *│", line))
    assert "participant" in row
    assert "revoked" in row


def test_a_list_warns_of_what_ends_soon(tmp_path: Path, said: Console) -> None:
    keys_init(tmp_path / "keys", [], 365, said)
    keys_add(tmp_path / "keys", "alice", 7, said)
    keys_list(tmp_path / "keys", said)
    text = said.export_text()
    assert "expiring" in text
    assert "warning: the certificate of the participant 'alice' expires on" in text


def test_a_key_in_a_message_or_a_traceback_shows_nothing() -> None:
    pair, node_key = make_authority("x"), make_node_key()
    for value in (pair, node_key, [pair], {"key": node_key}):
        assert "PRIVATE" not in repr(value)
        assert "b'" not in repr(value)


def test_the_gateway_shows_no_key_in_its_output_or_its_arguments(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    Authority.create(keys).participant("alice")
    with gateway(tmp_path / "run", f"http://127.0.0.1:{free_port()}", "--keys", str(keys)) as (port, process):
        url = f"https://127.0.0.1:{port}"
        import ssl

        context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
        pages = [
            httpx.get(f"{url}{path}", verify=context, trust_env=False).text
            for path in ("/", "/health", "/seedbed.json", "/keys/ca.key", "/../keys/ca.key")
        ]
        running = psutil.Process(process.popen.pid)
        arguments = " ".join(running.cmdline())
        environment = " ".join(running.environ().values())
        Authority.load(keys).rotate("server")
        time.sleep(6)  # it takes up the new certificate
        (keys / "server/server.key").write_text("-----BEGIN PRIVATE KEY-----\nbroken\n-----END PRIVATE KEY-----\n")
        (keys / "server/server.crt").touch()
        time.sleep(6)
        assert process.popen.poll() is None
        (keys / "server/server.key").unlink()
        assert_silent("\n".join([process.text, arguments, environment, *pages]), keys)


def test_damaged_keys_are_refused_without_showing_them(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    Authority.create(keys)
    secret = (keys / "ca.key").read_text()
    damaged = secret.replace("-----END", "-----DNE")
    (keys / "ca.key").write_text(damaged)
    with pytest.raises(ConfigError) as refused:
        Authority.load(keys)
    assert secret.splitlines()[1] not in f"{refused.value} {refused.value.hint}"
    (keys / "server/server.key").write_text(damaged)
    command = [sys.executable, "-m", "seedbed.server.gateway", "--run", str(tmp_path), "--listen", "127.0.0.1:0"]
    command += ["--upstream", "http://127.0.0.1:1", "--registry-port", "1", "--keys", str(keys)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == ConfigError.exit_code
    assert secret.splitlines()[1] not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_refusals_are_sentences_with_a_next_step(tmp_path: Path, said: Console) -> None:
    for act in (
        lambda: keys_add(tmp_path, "alice", 1, said),
        lambda: keys_list(tmp_path, said),
        lambda: keys_init(tmp_path / "k", [], 0, said),
        lambda: keys_init(tmp_path, [], 1, said),
    ):
        with pytest.raises(SeedbedError) as refused:
            act()
        assert refused.value.message
        assert refused.value.hint
