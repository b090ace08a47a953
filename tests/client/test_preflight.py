"""A preflight tells what a machine lacks before a federation does, each with what to do about it."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from rich.console import Console

from seedbed.client.join.address import parse_address
from seedbed.client.join.contact import Contact, UnreachableError
from seedbed.client.join.gpus import parse_gpus
from seedbed.client.join.keys import load_keys
from seedbed.client.join.tasks import parse_tasks
from seedbed.client.preflight import connection, machine, material, software
from seedbed.client.preflight.estimate import ModelShape, estimate, model_shape
from seedbed.client.preflight.report import Check, Report
from seedbed.client.preflight.verb import PreflightRequest, preflight, run_preflight
from seedbed.common import basemodel
from seedbed.common.config import BaseModelConfig, DeepSpeedSettings, LoraSettings, TrainingSettings
from seedbed.common.errors import ConfigError, EnvironmentFailure
from seedbed.common.jobs import GENERAL
from seedbed.common.manifest import BaseIdentity
from seedbed.common.processes import free_port
from seedbed.common.registry import FederationInfo

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
EMBEDDED = basemodel.identify(basemodel.resolve(BaseModelConfig()), "embedded")


def info(**changes: object) -> FederationInfo:
    fields = {
        "name": "sums",
        "version": version("seedbed"),
        "state": "waiting",
        "base": BaseModelConfig(),
        "identity": EMBEDDED,
        "lora": LoraSettings(),
        "tasks": ("sums",),
    }
    return FederationInfo.model_validate({**fields, **changes})


def states(report: Report) -> dict[str, str]:
    return {check.name: check.state for check in report.checks}


class TestWithoutACoordinator:
    def test_this_machine_alone_is_looked_at(self, tmp_path: Path) -> None:
        (tmp_path / "sums.jsonl").write_text('{"text": "1 + 1 = 2"}\n')
        request = PreflightRequest(tasks=[str(tmp_path / "sums.jsonl")], work=tmp_path, name="ada", gpus="none")
        report = preflight(request)
        assert report.state == "ok"
        assert set(states(report)) == {"python", "seedbed", "packages", "devices", "deepspeed", "disk", "data: sums"}

    def test_a_faulty_line_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "sums.jsonl").write_text('{"text": "1 + 1 = 2"}\n{"prompt": "2 + 2"}\n')
        (check,) = material.data(parse_tasks([str(tmp_path / "sums.jsonl")]), None)
        assert check.state == "fail"
        assert "sums.jsonl, line 2" in check.found
        assert "prompt/completion" in check.remedy

    def test_the_report_is_a_table_or_json(self, tmp_path: Path) -> None:
        shown, printed = io.StringIO(), io.StringIO()
        request = PreflightRequest(work=tmp_path, name="ada", gpus="none")
        run_preflight(request, Console(file=shown, width=200))
        report = run_preflight(request, Console(file=printed), as_json=True)
        told = json.loads(printed.getvalue())
        assert told["state"] == report.state == "ok"
        assert [check["name"] for check in told["checks"]] == [check.name for check in report.checks]
        assert "devices" in shown.getvalue()

    def test_a_failure_stops_with_its_remedy(self) -> None:
        report = Report((Check("disk", "ok", "1 GB"), Check("clock", "fail", "9 s ahead", "Set the clock.")))
        with pytest.raises(EnvironmentFailure, match="clock: 9 s ahead") as raised:
            report.require()
        assert raised.value.hint == "Set the clock."


class TestAgainstTheFederation:
    def test_another_version_of_seedbed_fails_and_names_both(self) -> None:
        (check,) = [check for check in software.versions(info(version="0.0.9")) if check.name == "seedbed"]
        assert check.state == "fail"
        assert version("seedbed") in check.found
        assert "0.0.9" in check.found

    def test_another_base_model_fails_and_shows_both_hashes(self) -> None:
        other = BaseIdentity(name="embedded", digest="ab" * 32)
        _, check = material.base_model(BaseModelConfig(), info(identity=other))
        assert check.state == "fail"
        assert "ab" * 32 in check.found
        assert EMBEDDED.digest in check.found
        assert "--base" in check.remedy

    def test_a_copy_of_the_base_model_in_a_folder_of_ones_own_is_the_same_model(self, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in basemodel.resolve(BaseModelConfig()).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        directory, check = material.base_model(material.local_base(BaseModelConfig(), copy), info())
        assert (directory, check.state) == (copy, "ok")

    def test_a_task_that_nobody_asks_for_and_missing_general_text_are_warnings(self, tmp_path: Path) -> None:
        (tmp_path / "poems.jsonl").write_text('{"text": "o"}\n')
        found = list(material.data(parse_tasks([str(tmp_path / "poems.jsonl")]), info(needs_general_text=True)))
        assert [(check.name, check.state) for check in found] == [("data: poems", "warn"), ("data: general", "warn")]
        assert "sums" in found[0].remedy

    @pytest.mark.parametrize(
        ("offset", "state"), [(0, "ok"), (30, "ok"), (-4, "warn"), (100, "warn"), (-6, "fail"), (301, "fail")]
    )
    def test_a_clock_that_flower_would_not_bear_fails(self, offset: float, state: str) -> None:
        assert connection.clock(offset, signed=True).state == state

    def test_without_signatures_a_wrong_clock_is_only_worth_a_warning(self) -> None:
        assert connection.clock(-100, signed=False).state == "warn"


class TestMemory:
    SHAPE = ModelShape(parameters=1000, adapted=10, layers=2, width=4, mlp=16, vocabulary=50)

    def test_the_estimate_is_the_formula(self) -> None:
        training = TrainingSettings(batch_size=4, accumulation=2, max_tokens=3)
        found = estimate(self.SHAPE, training, bytes_each=4, ranks=1, gpu=False)
        # 2 examples of 3 tokens in a pass: 6 tokens, of 4 bytes, 9·4 + 4·16 = 100 numbers, 2 layers
        assert found.activations == 6 * 4 * 100 * 2
        assert found.logits == 6 * 50 * (4 + 8)
        assert (found.base, found.adapter, found.gradients, found.optimizer) == (4000, 40, 40, 80)

    @pytest.mark.parametrize(
        ("stage", "states"),
        [
            (0, (2000, 40, 40, 80)),
            (1, (2000, 40, 40, 40)),
            (2, (2000, 40, 20, 40)),
            (3, (1000, 20, 20, 40)),
        ],
    )
    def test_zero_cuts_what_its_stage_says_among_two_ranks(self, stage: int, states: tuple[int, ...]) -> None:
        training = TrainingSettings.model_validate({"deepspeed": {"zero_stage": stage}})
        found = estimate(self.SHAPE, training, bytes_each=2, ranks=2, gpu=True)
        assert (found.base, found.adapter, found.gradients, found.optimizer) == states

    def test_offload_moves_bytes_to_the_host(self) -> None:
        settings = DeepSpeedSettings(zero_stage=3, offload_optimizer=True, offload_parameters=True)
        found = estimate(self.SHAPE, TrainingSettings(deepspeed=settings), bytes_each=2, ranks=1, gpu=True)
        assert (found.base, found.optimizer, found.host) == (0, 0, 2080)

    def test_the_shape_of_a_model_is_read_from_its_files(self) -> None:
        directory = basemodel.resolve(BaseModelConfig())
        model, _ = basemodel.load(BaseModelConfig(), "cpu")
        shape = model_shape(directory, LoraSettings(rank=1, targets=("q_proj",)))
        stored = sum(parameter.numel() for parameter in model.parameters())
        assert shape.parameters == stored
        hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
        assert shape.adapted == layers * 2 * hidden, "rank 1 on a square projection of each layer"

    def test_what_does_not_fit_fails_and_what_is_tight_warns(self) -> None:
        def check(free: int) -> str:
            devices = machine.Devices(("cpu",), (free,), gpu=False)
            return machine.memory(self.SHAPE, TrainingSettings(), BaseModelConfig(), devices, known=True).state

        assert [check(10**9), check(420 * 10**6), check(10**8)] == ["ok", "warn", "fail"]

    def test_a_full_disk_fails(self, tmp_path: Path) -> None:
        huge = ModelShape(parameters=1, adapted=10**15, layers=1, width=1, mlp=1, vocabulary=1)
        assert machine.disk(tmp_path / "not/there/yet", None).state == "ok"
        assert machine.disk(tmp_path, huge).state == "fail"

    def test_a_gpu_that_is_not_there_fails(self) -> None:
        assert machine.devices(("99",))[1].state == "fail"


def certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[str, ec.EllipticCurvePrivateKey],
    days: tuple[float, float],
) -> bytes:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    authority = issuer[0] == name
    made = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer[0]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + days[0] * DAY)
        .not_valid_after(NOW + days[1] * DAY)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer[1].public_key()), critical=False)
    )
    if authority:
        usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
        usage |= dict.fromkeys(("digital_signature", "encipher_only", "decipher_only"), False)
        made = made.add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True)
    else:
        made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    return made.sign(issuer[1], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def private(
    key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8
) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


class Hand:
    """An authority, and what it hands out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.ca = certificate("test ca", self.key, ("test ca", self.key), (-1, 1000))

    def participant(self, name: str, days: tuple[float, float] = (-1, 100)) -> Path:
        folder, key = self.root / name, ec.generate_private_key(ec.SECP256R1())
        folder.mkdir(parents=True)
        node = private(ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.OpenSSH)
        files = {"ca.crt": self.ca, "client.crt": certificate(name, key, ("test ca", self.key), days)}
        for file, content in {**files, "client.key": private(key), "node.key": node}.items():
            (folder / file).write_bytes(content)
            (folder / file).chmod(0o600)
        return folder


@pytest.fixture
def hand(tmp_path: Path) -> Hand:
    return Hand(tmp_path / "keys")


class TestKeys:
    def test_the_participant_is_named_by_its_certificate(self, hand: Hand) -> None:
        keys = load_keys(hand.participant("ada"))
        assert keys.name == "ada"
        assert [check.state for check in connection.keys(keys)] == ["ok"]

    @pytest.mark.parametrize(("days", "state"), [((-9, -1), "fail"), ((1, 9), "fail"), ((-9, 9), "warn")])
    def test_certificates_out_of_their_time_are_found_and_soon_to_be_ones_told(
        self, hand: Hand, days: tuple[float, float], state: str
    ) -> None:
        assert [check.state for check in connection.keys(load_keys(hand.participant("ada", days)))] == [state]

    def test_private_keys_that_others_can_read_are_told(self, hand: Hand) -> None:
        folder = hand.participant("ada")
        (folder / "node.key").chmod(0o644)
        check = list(connection.keys(load_keys(folder)))[-1]
        assert check.state == "warn"
        assert check.remedy == f"chmod 600 {folder / 'node.key'}"

    @pytest.mark.parametrize("file", ["client.key", "node.key"])
    def test_a_private_key_that_is_none_fails(self, hand: Hand, file: str) -> None:
        folder = hand.participant("ada")
        (folder / file).write_text("not a key")
        assert [check.state for check in connection.keys(load_keys(folder))] == ["ok", "fail"]

    def test_the_key_of_another_certificate_fails(self, hand: Hand) -> None:
        folder, other = hand.participant("ada"), hand.participant("bob")
        (folder / "client.key").write_bytes((other / "client.key").read_bytes())
        check = list(connection.keys(load_keys(folder)))[-1]
        assert (check.state, "is not the key of" in check.found) == ("fail", True)

    def test_a_missing_file_and_a_strange_authority_are_refused(self, hand: Hand, tmp_path: Path) -> None:
        folder = hand.participant("ada")
        (folder / "ca.crt").write_bytes(Hand(tmp_path / "others").ca)
        with pytest.raises(ConfigError, match="was not made by the authority"):
            load_keys(folder)
        (folder / "client.key").unlink()
        with pytest.raises(ConfigError, match=r"has no client\.key"):
            load_keys(folder)

    def test_nothing_is_sent_to_another_machine_without_keys(self) -> None:
        with pytest.raises(ConfigError, match="without keys"):
            Contact(parse_address("192.0.2.1"), None)
        assert Contact(parse_address("192.0.2.1"), None, insecure=True).url == "http://192.0.2.1:7400/seedbed.json"
        assert Contact(parse_address("localhost:9"), None).url == "http://localhost:9/seedbed.json"


class Answer(BaseHTTPRequestHandler):
    body = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def tls_gateway(hand: Hand) -> Iterator[int]:
    """An HTTPS server of this authority on `localhost`, which asks for a client certificate."""
    own = hand.participant("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own / "client.crt", own / "client.key")
    context.load_verify_locations(own / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    answer = type("Told", (Answer,), {"body": info().model_dump_json().encode()})
    server = HTTPServer(("127.0.0.1", 0), answer)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


class TestGateway:
    def test_with_its_keys_a_participant_is_greeted(self, hand: Hand, tls_gateway: int) -> None:
        contact = Contact(parse_address(f"localhost:{tls_gateway}"), load_keys(hand.participant("ada")))
        greeting, check = connection.gateway(contact)
        assert check.state == "ok"
        assert greeting is not None
        assert greeting.info.name == "sums"
        assert greeting.clock is not None
        assert abs(greeting.clock) < 5

    def test_a_gateway_of_another_authority_is_refused(self, tls_gateway: int, tmp_path: Path) -> None:
        strange = load_keys(Hand(tmp_path / "others").participant("ada"))
        _, check = connection.gateway(Contact(parse_address(f"localhost:{tls_gateway}"), strange))
        assert check.state == "fail"
        assert "certificate verify failed" in check.found

    def test_a_relay_that_hangs_up_since_its_coordinator_is_away_is_worth_another_try(self, hand: Hand) -> None:
        with socket.create_server(("127.0.0.1", 0)) as relay:

            def hang_up() -> None:
                peer, _ = relay.accept()
                peer.recv(1 << 16)
                peer.close()

            threading.Thread(target=hang_up, daemon=True).start()
            contact = Contact(parse_address(f"localhost:{relay.getsockname()[1]}"), load_keys(hand.participant("ada")))
            with pytest.raises(UnreachableError, match="broke off"):
                contact.greet(10.0)

    def test_a_host_name_that_the_certificate_does_not_name_is_refused(self, hand: Hand, tls_gateway: int) -> None:
        contact = Contact(parse_address(f"127.0.0.1:{tls_gateway}"), load_keys(hand.participant("ada")))
        _, check = connection.gateway(contact)
        assert check.state == "fail"
        assert "127.0.0.1" in check.found

    def test_an_answer_without_end_is_no_federation(self) -> None:
        class Endless(Answer):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):  # until whoever asked has hung up
                    while True:
                        self.wfile.write(bytes(1 << 16))

        with HTTPServer(("127.0.0.1", 0), Endless) as server:
            threading.Thread(target=server.handle_request, daemon=True).start()
            with pytest.raises(EnvironmentFailure, match="no federation is there"):
                Contact(parse_address(f"127.0.0.1:{server.server_port}"), None).greet()

    def test_nobody_there_is_told_apart_from_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnreachableError, match="nobody answers"):
            Contact(parse_address(f"127.0.0.1:{free_port()}"), None).greet(2.0)

    def test_a_preflight_goes_on_with_the_rest_when_nobody_answers(self, tmp_path: Path) -> None:
        request = PreflightRequest(host=f"127.0.0.1:{free_port()}", work=tmp_path, name="ada", gpus="none")
        found = states(preflight(request))
        assert found["gateway"] == "fail"
        assert found["disk"] == "ok"


class TestWhatAUserTypes:
    @pytest.mark.parametrize(
        ("text", "host", "port"),
        [
            ("seed.example", "seed.example", 7400),
            ("seed.example:99", "seed.example", 99),
            ("https://seed.example/", "seed.example", 7400),
            ("::1", "::1", 7400),
            ("[::1]:99", "::1", 99),
        ],
    )
    def test_addresses(self, text: str, host: str, port: int) -> None:
        address = parse_address(text)
        assert (address.host, address.port) == (host, port)

    @pytest.mark.parametrize("text", ["", "a b", "host:port", "host:99999", "host/path", ":7400"])
    def test_what_is_no_address_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError):
            parse_address(text)

    def test_tasks_are_files_named_files_or_yaml(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "more").mkdir()
        (tmp_path / "more/tasks.yaml").write_text(
            "- {task: a, location: a.csv, limit: 3}\n- {task: b, location: o/b}\n"
        )
        found = parse_tasks(["sums.train.jsonl", "poems=p.parquet", "more/tasks.yaml"], Path("general.jsonl"))
        assert [(source.task, source.location) for source in found] == [
            ("sums", str(tmp_path / "sums.train.jsonl")),
            ("poems", str(tmp_path / "p.parquet")),
            ("a", str(tmp_path / "more/a.csv")),
            ("b", "o/b"),
            (GENERAL, str(tmp_path / "general.jsonl")),
        ]
        assert found[2].limit == 3

    @pytest.mark.parametrize("specs", [["a.jsonl", "a=b.csv"], ["a.txt"], ["a="], ["missing.yaml"]])
    def test_tasks_that_make_no_sense_are_refused(self, specs: list[str]) -> None:
        with pytest.raises(ConfigError):
            parse_tasks(specs)

    def test_gpus(self) -> None:
        assert parse_gpus("auto") is None
        assert parse_gpus("none") == ()
        assert parse_gpus("0, 2") == ("0", "2")
        for wrong in ("0,0", "first", "-1"):
            with pytest.raises(ConfigError):
                parse_gpus(wrong)
