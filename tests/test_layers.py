"""The import rules of the house: cli -> {server, client} -> {common, proto}."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "common": {"common"},
    "client": {"client", "common", "proto"},
    "server": {"server", "common", "proto"},
    "server/merging": {"server.merging", "common"},
    "server/adapters": {"server.adapters", "server.merging", "server.observer", "common"},
}
PURE = ("common/adapter.py", "common/algebra.py", "common/gram.py", "common/lowrank.py", "common/partial_svd.py")
"""Values and maths: torch only, no input or output."""


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_room_imports_only_what_the_plan_allows(folder: str) -> None:
    for path in files(folder):
        for name in imports_of(path):
            if not name.startswith("seedbed."):
                continue
            inside = name.removeprefix("seedbed.")
            verb = path.parent == ROOT / "server/cli" and inside.startswith("client")
            assert verb or any(inside == room or inside.startswith(f"{room}.") for room in ALLOWED[folder]), (
                f"{path.relative_to(ROOT)} must not import {name}"
            )


def test_the_command_line_imports_the_client_only_inside_a_verb() -> None:
    for path in files("server/cli"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("seedbed.client"), path


@pytest.mark.parametrize("name", PURE)
def test_maths_is_torch_only(name: str) -> None:
    standard = {"__future__", "collections", "contextlib", "dataclasses", "itertools", "math", "types", "typing"}
    for imported in imports_of(ROOT / name):
        top = imported.partition(".")[0]
        assert top in {"torch", "jaxtyping"} | standard or imported.startswith("seedbed.common."), imported


def test_merging_knows_no_files_and_no_network() -> None:
    for path in files("server/merging"):
        tops = {name.partition(".")[0] for name in imports_of(path)}
        assert not tops & {"flwr", "grpc", "deepspeed", "pathlib", "os", "safetensors", "peft", "transformers"}, path


def test_proto_is_no_package_that_could_shadow_anothers() -> None:
    assert not (ROOT / "proto/__init__.py").exists()


@pytest.mark.parametrize("folder", ["common", "client", "server"])
def test_every_module_says_what_it_is_for(folder: str) -> None:
    for path in files(folder):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
