"""Parts of a coordinator without its processes: what it refuses, what it leaves out, how it starts again what ends."""

from __future__ import annotations

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from village import config

from seedbed.common.errors import ConfigError, EnvironmentFailure, QuorumError, ResumeError
from seedbed.common.processes import RotatingLog
from seedbed.server.coordinator import supervision
from seedbed.server.coordinator.control import RegisteredNode, SuperLinkControl
from seedbed.server.coordinator.members import Members
from seedbed.server.coordinator.request import CoordinatorRequest
from seedbed.server.coordinator.services import Layout, Service
from seedbed.server.coordinator.supervision import Outcome
from seedbed.server.coordinator.verb import deployable, outcome_error


def test_beyond_this_machine_needs_keys_or_a_word() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        CoordinatorRequest("embedded", host=host).require_safe()
    for host in ("0.0.0.0", "192.0.2.7", "example.org"):
        with pytest.raises(ConfigError, match="nothing listens beyond this machine"):
            CoordinatorRequest("embedded", host=host).require_safe()
        CoordinatorRequest("embedded", host=host, insecure=True).require_safe()


def test_a_superlink_that_fails_is_told_in_one_sentence() -> None:
    class Failing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(500)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(EnvironmentFailure, match=r"refused ListNodes: .*500") as told:
            SuperLinkControl(f"127.0.0.1:{server.server_port}").nodes()
        server.shutdown()
    assert "For more information" not in told.value.message


def test_a_directory_without_an_authority_is_no_keys_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no ca\.crt"):
        CoordinatorRequest("embedded", keys=tmp_path).require_safe()


def test_controls_that_need_all_data_in_one_place_are_left_out_with_a_word() -> None:
    said: list[str] = []
    settings = config(
        combine={"candidates": ["base", "average", "joint", "molora", {"name": "late", "router": "molora"}]}
    )
    assert deployable(settings, said.append).combine.names == ("base", "average")
    assert [text.split("'")[1] for text in said] == ["joint", "late", "molora"]
    with pytest.raises(ConfigError, match="which only a simulation has"):
        deployable(config(combine={"candidates": ["joint"]}), said.append)


def test_a_public_sample_that_nobody_holds_is_refused_before_anything_starts(tmp_path: Path) -> None:
    sample = tmp_path / "sample.jsonl"
    sample.write_text('{"text": "anything"}\n')
    settings = config(seed={"mode": "public", "data": str(sample)}, combine={"candidates": ["average"]})
    with pytest.raises(ConfigError, match=r"seed\.mode is 'public'"):
        deployable(settings, lambda _: None)


def test_the_superlink_is_on_loopback_only_and_with_keys_it_knows_its_nodes(tmp_path: Path) -> None:
    plain = Layout(tmp_path, "0.0.0.0", 9000, None, True)
    command = plain.superlink_command(9000)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "--insecure" in command
    assert "--disable-runtime-dependency-installation" in command
    keyed = Layout(tmp_path, "0.0.0.0", 9000, tmp_path / "keys", False)
    command = keyed.superlink_command(9000)
    assert "--enable-supernode-auth" in command
    assert "--insecure" not in command
    gateway = keyed.gateway_command(7400, 7401)
    assert gateway[gateway.index("--upstream") + 1] == "https://127.0.0.1:9000"
    assert gateway[gateway.index("--listen") + 1] == "0.0.0.0:7400"


def test_a_run_that_failed_ends_the_coordinator_with_the_same_kind_of_error() -> None:
    error = outcome_error(Outcome(finished=False, reason="too few", hint="wait", exit_code=9))
    assert isinstance(error, QuorumError)
    assert (error.message, error.hint) == ("too few", "wait")
    assert isinstance(outcome_error(Outcome(False, "", "", 10)), ResumeError)


def service(tmp_path: Path, code: str, port: int = 0) -> Service:
    log = RotatingLog(tmp_path / "log")
    return Service("tester", lambda number: [sys.executable, "-c", code, str(number)], port, log, {})


LISTENS = """
import json, sys, time
port = int(sys.argv[1]) or 4711
print(json.dumps({"event": "listening", "port": port}), flush=True)
time.sleep(300)
"""


def test_a_service_that_is_killed_comes_back_on_the_port_that_it_had(tmp_path: Path) -> None:
    one = service(tmp_path, LISTENS)
    try:
        _tick(one, lambda: one.ready)
        assert (one.port, one.starts) == (4711, 1)
        assert one.child is not None
        for process in one.child.descendants():
            process.kill()
        _tick(one, lambda: one.starts == 2 and one.ready)
        assert one.port == 4711
        assert one.child is not None
        assert "4711" in " ".join(one.child.descendants()[0].cmdline())
    finally:
        one.stop(1)


def test_a_service_that_never_comes_up_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    one = service(tmp_path, "import sys; print('error: port 7400 is in use'); sys.exit(11)")
    with pytest.raises(EnvironmentFailure, match="the tester cannot be started: error: port 7400 is in use"):
        _tick(one, lambda: False)
    assert one.starts > 1


def _tick(one: Service, until: object) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        one.tick()
        if until():  # type: ignore[operator]
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


class Register:
    """The SuperLink's list of nodes."""

    def __init__(self) -> None:
        self.known: dict[bytes, RegisteredNode] = {}

    def nodes(self) -> list[RegisteredNode]:
        return list(self.known.values())

    def register(self, public_key: bytes, name: str) -> bool:
        if public_key in self.known:
            return False
        self.known[public_key] = RegisteredNode(len(self.known), public_key, "registered")
        return True

    def unregister(self, node_id: int) -> None:
        for key, node in self.known.items():
            if node.node_id == node_id:
                self.known[key] = RegisteredNode(node_id, key, "unregistered")

    @property
    def inside(self) -> int:
        return sum(node.status != "unregistered" for node in self.known.values())


def test_nodes_follow_the_keys_directory(tmp_path: Path) -> None:
    for name in ("alice", "bob"):
        _public_key(tmp_path / name)
    wanted = {"alice": tmp_path / "alice"}
    register, said = Register(), list[str]()
    members = Members(register, lambda: dict(wanted), said.append)  # type: ignore[arg-type]
    members.synchronize()
    members.synchronize()
    assert said == ["alice may join"]
    wanted["bob"] = tmp_path / "bob"
    members.synchronize()
    assert register.inside == 2
    del wanted["alice"]
    members.synchronize()
    assert said == ["alice may join", "bob may join", "alice is shut out"]
    assert register.inside == 1
    wanted["alice"] = tmp_path / "alice"
    members.synchronize()
    assert said[-1] == "alice was shut out for good: it needs new keys"


def test_who_is_missing_only_while_its_folder_is_replaced_stays_inside(tmp_path: Path) -> None:
    _public_key(tmp_path / "alice")
    looks = iter([True, False, True])  # the second falls between the two renames of a rotation
    register, said = Register(), list[str]()
    members = Members(register, lambda: {"alice": tmp_path / "alice"} if next(looks) else {}, said.append)  # type: ignore[arg-type]
    members.synchronize()
    members.synchronize()
    assert said == ["alice may join"]
    assert register.inside == 1


def test_a_keys_directory_that_cannot_be_read_is_said_once_and_looked_at_again(tmp_path: Path) -> None:
    (tmp_path / "alice").write_text("no key")
    register, said = Register(), list[str]()
    members = Members(register, lambda: {"alice": tmp_path / "alice"}, said.append)  # type: ignore[arg-type]
    members.synchronize()
    members.synchronize()
    assert len(said) == 1
    _public_key(tmp_path / "alice")
    members.synchronize()
    assert said[-1] == "alice may join"


def _public_key(path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    path.write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


class Refusing:
    """A SuperLink that ends every run before its ServerApp has come."""

    def __init__(self) -> None:
        self.started = 0

    def start(self, app: Path, settings: object) -> int:
        self.started += 1
        return self.started

    def stop(self, run: int) -> None: ...

    def status(self, run: int) -> tuple[str, str]:
        return "finished", "failed: no such app"


def test_a_run_that_is_lost_again_and_again_ends_the_coordinator_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "_STATUS_SECONDS", 0.0)
    control, log = Refusing(), RotatingLog(tmp_path / "log")
    run = supervision.Submission(tmp_path, control, service(tmp_path, ""), tmp_path, {}, log)  # type: ignore[arg-type]
    run._backoff.first = 0.01
    with pytest.raises(EnvironmentFailure, match=r"lost 5 times in a row: Flower ended the run: failed: no such app"):
        _look_after(run)
    assert control.started == 5


def _look_after(run: supervision.Submission) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        run.tick()
        time.sleep(0.01)


def test_a_submission_that_the_superlink_does_not_answer_is_made_again_and_not_for_ever(tmp_path: Path) -> None:
    class Deaf(Refusing):
        def start(self, app: Path, settings: object) -> int:
            if super().start(app, settings) <= 2:
                raise EnvironmentFailure("the SuperLink does not answer")
            return self.started

        def status(self, run: int) -> tuple[str, str]:
            return "running", ""

    control, log = Deaf(), RotatingLog(tmp_path / "log")
    run = supervision.Submission(tmp_path, control, service(tmp_path, ""), tmp_path, {}, log)  # type: ignore[arg-type]
    run._backoff.first = 0.01
    while run._run is None:
        run.tick()
        time.sleep(0.01)
    assert control.started == run.number == 3
    control.started = -100
    run.again()
    with pytest.raises(EnvironmentFailure, match="could not be submitted: the SuperLink does not answer"):
        _look_after(run)
