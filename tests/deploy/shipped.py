"""What deploy/ holds, as values: documents, scripts, and every `seedbed …` command line in them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = sorted([*DEPLOY.rglob("*.sh"), *DEPLOY.rglob("*.sbatch")])
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile.*"))
COMPOSE = sorted(path for path in (DEPLOY / "compose").glob("*.yaml") if "federation" not in path.name)


@dataclass(frozen=True)
class Command:
    """One command line, the word `seedbed` left out."""

    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: seedbed {' '.join(self.words)}"


def tool(name: str) -> str | None:
    """Where a program is: one that this environment's packages brought, or the machine's own."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def manifests() -> list[tuple[str, dict[str, Any]]]:
    """Every Kubernetes object with its file's name."""
    return [
        (str(path.relative_to(DEPLOY)), one)
        for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
        if path.name not in ("kustomization.yaml", "federation.yaml")
        for one in documents(path)
    ]


def pod(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The pod's spec of a workload."""
    spec: dict[str, Any] | None = manifest.get("spec", {}).get("template", {}).get("spec")
    return spec


def commands() -> Iterator[Command]:
    """Every command line of deploy/."""
    for path in [*SCRIPTS, *sorted(DEPLOY.rglob("*.md"))]:
        yield from _in_text(path)
    for path in UNITS:
        for line in re.findall(r"^ExecStart=\S*seedbed (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            yield Command(path.name, tuple(shlex.split(line)))
    for path in COMPOSE:
        for name, service in documents(path)[0]["services"].items():
            if "entrypoint" in service:
                for line in re.findall(r"\bseedbed ([^\n]*)", service["command"][0]):
                    yield Command(f"{path.name}:{name}", tuple(shlex.split(line)))
            else:
                yield Command(f"{path.name}:{name}", tuple(service["command"]))
    for where, manifest in manifests():
        for container in (pod(manifest) or {}).get("containers", []):
            yield Command(where, tuple(container["args"]))


def _in_text(path: Path) -> Iterator[Command]:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    if path.suffix == ".md":  # prose may say `seedbed`, too
        text = "\n".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    for line in text.splitlines():
        # Where a shell would look for a program's name.
        found = re.search(r"(?:^|[|&;])\s*seedbed ([a-z][^#;&|`]*)", line)
        if found:
            yield Command(path.name, tuple(shlex.split(found[1])))
