"""The Kubernetes manifests: every name that one object uses is another object's, and every pod is locked down."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from shipped import DEPLOY, documents, manifests, pod

MANIFESTS = manifests()
WORKLOADS = [(where, one) for where, one in MANIFESTS if pod(one) is not None]
FOLDERS = [DEPLOY / "kubernetes", DEPLOY / "kubernetes/client"]
VERSIONS = {
    "Namespace": "v1",
    "Service": "v1",
    "PersistentVolumeClaim": "v1",
    "StatefulSet": "apps/v1",
    "Deployment": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
}


def named(kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for _, one in MANIFESTS if one["kind"] == kind}


def containers(one: dict[str, Any]) -> list[dict[str, Any]]:
    spec = pod(one)
    assert spec is not None
    return [*spec.get("initContainers", []), *spec["containers"]]


def test_objects_are_of_known_kinds_and_nothing_holds_a_secret() -> None:
    for where, one in MANIFESTS:
        assert one["apiVersion"] == VERSIONS[one["kind"]], where
        assert one["metadata"]["name"], where
        assert "PRIVATE KEY" not in yaml.safe_dump(one), where


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_kustomization_names_every_file_of_its_folder(folder: Path) -> None:
    (whole,) = documents(folder / "kustomization.yaml")
    generated = {name for entry in whole.get("configMapGenerator", []) for name in entry["files"]}
    assert {path.name for path in folder.glob("*.yaml")} == {"kustomization.yaml", *whole["resources"], *generated}
    (namespace,) = documents(folder / "namespace.yaml")
    assert namespace["metadata"]["name"] == whole["namespace"]


def test_selectors_find_their_pods_and_services_their_ports() -> None:
    labels = [one["spec"]["template"]["metadata"]["labels"] for _, one in WORKLOADS]
    for where, one in MANIFESTS:
        spec = one.get("spec", {})
        for key in ("selector", "podSelector"):
            if spec.get(key):
                wanted = spec[key].get("matchLabels", spec[key])
                assert any(wanted.items() <= have.items() for have in labels), where
    ports = {port["name"] for _, one in WORKLOADS for part in containers(one) for port in part.get("ports", [])}
    for name, service in named("Service").items():
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports, name
    for name, one in named("StatefulSet").items():
        assert one["spec"]["serviceName"] in named("Service"), name


@pytest.mark.parametrize(("where", "one"), WORKLOADS, ids=[where for where, _ in WORKLOADS])
def test_a_pod_is_locked_down_limited_and_probed(where: str, one: dict[str, Any]) -> None:
    spec = pod(one)
    assert spec is not None
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert spec["automountServiceAccountToken"] is False
    for container in containers(one):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
        assert ":" in container["image"]
        assert not container["image"].endswith(":latest")
    for container in spec["containers"]:
        assert {"startupProbe", "livenessProbe"} <= container.keys()


@pytest.mark.parametrize(("where", "one"), WORKLOADS, ids=[where for where, _ in WORKLOADS])
def test_what_a_pod_mounts_is_there(where: str, one: dict[str, Any]) -> None:
    spec = pod(one)
    assert spec is not None
    claimed = {template["metadata"]["name"] for template in one["spec"].get("volumeClaimTemplates", [])}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for container in containers(one):
        for mount in container["volumeMounts"]:
            assert mount["name"] in volumes or mount["name"] in claimed, mount
    script = (DEPLOY / "kubernetes/secrets.sh").read_text(encoding="utf-8")
    maps = {entry["name"] for entry in documents(DEPLOY / "kubernetes/kustomization.yaml")[0]["configMapGenerator"]}
    for volume in volumes.values():
        if "secret" in volume:
            assert volume["secret"]["secretName"] in script, "the script makes it"
        if "configMap" in volume:
            assert volume["configMap"]["name"] in maps
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in named("PersistentVolumeClaim")


def test_probes_ask_what_the_gateway_serves() -> None:
    gateway = "".join(path.read_text(encoding="utf-8") for path in (DEPLOY.parent / "server/gateway").glob("*.py"))
    for _, one in WORKLOADS:
        for container in containers(one):
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = container.get(probe, {}).get("httpGet")
                if asked:
                    assert f'"{asked["path"]}"' in gateway
                    assert asked["scheme"] == "HTTPS"
                    assert asked["port"] in {port["name"] for port in container["ports"]}


def test_only_the_two_ports_come_in_and_nothing_comes_into_a_client() -> None:
    policies = named("NetworkPolicy")
    rules = policies["seedbed-coordinator"]["spec"]["ingress"]
    assert {port["port"] for rule in rules for port in rule["ports"]} == {7400, 7401}
    assert all("ports" in rule for rule in rules)
    assert "Ingress" in policies["seedbed-client"]["spec"]["policyTypes"]
    assert "ingress" not in policies["seedbed-client"]["spec"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_kustomize_builds_what_the_schemas_take(folder: Path, tmp_path: Path) -> None:
    built = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    whole = [one for one in yaml.safe_load_all(built.stdout) if one]
    assert len(whole) >= len(documents(folder / "kustomization.yaml")[0]["resources"])
    if find_spec("kubernetes_validate") is None:
        pytest.skip("built, but kubernetes-validate is not installed")
    file = tmp_path / "built.yaml"
    file.write_text(built.stdout, encoding="utf-8")
    tool = str(Path(sys.executable).with_name("kubernetes-validate"))
    said = subprocess.run([tool, "--strict", str(file)], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stdout + said.stderr


def test_the_coordinators_keys_unpack_without_touching_the_volume_itself(tmp_path: Path) -> None:
    """The volume belongs to root: an entry `./` in the archive would have its mode changed, which its user may not."""
    keys, taken = tmp_path / "keys", tmp_path / "taken.tar"
    (keys / "server").mkdir(parents=True)
    for name in ("ca.crt", "ca.key", "server/server.crt", "server/server.key"):
        (keys / name).write_text(name)
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/usr/bin/env bash\nfor word; do [[ $word != --from-file=* ]] || cp "${{word#*=}}" {taken}; done\n'
    )
    kubectl.chmod(0o755)
    script = DEPLOY / "kubernetes/secrets.sh"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(script), "coordinator", str(keys)], env=environment, check=True, timeout=60)
    with tarfile.open(taken) as archive:
        assert sorted(archive.getnames()) == ["ca.crt", "server", "server/server.crt", "server/server.key"]
