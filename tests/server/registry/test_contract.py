"""The wire's contract is kept, and the generated code is what its source says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from registry import contract

from seedbed.proto.v1 import registry_pb2

ROOT = Path(__file__).resolve().parents[3]


def changed(edit: str) -> dict[str, object]:
    """The contract after an edit of its descriptor."""
    file = descriptor_pb2.FileDescriptorProto.FromString(registry_pb2.DESCRIPTOR.serialized_pb)
    message = next(message for message in file.message_type if message.name == "FetchRequest")
    if edit == "renumber":
        message.field[1].number = 7
    elif edit == "remove":
        del message.field[1]
    elif edit == "retype":
        message.field[1].type = descriptor_pb2.FieldDescriptorProto.TYPE_INT32
    elif edit == "unstream":
        file.service[0].method[2].server_streaming = False
    elif edit == "add":
        message.field.add(name="more", number=3, type=descriptor_pb2.FieldDescriptorProto.TYPE_BOOL, label=1)
    found: dict[str, object] = contract.contract(file)
    return found


def test_nothing_that_was_recorded_of_v1_is_gone_or_changed() -> None:
    assert contract.broken(json.loads(contract.SNAPSHOT.read_text()), contract.contract()) == []


def test_everything_of_v1_is_recorded() -> None:
    new = set(contract.contract()) - set(json.loads(contract.SNAPSHOT.read_text()))
    assert not new, f"run `python tests/server/registry/contract.py` to record {sorted(new)}"


@pytest.mark.parametrize("edit", ["renumber", "remove", "retype", "unstream"])
def test_a_change_that_an_old_peer_would_not_understand_is_noticed(edit: str) -> None:
    assert len(contract.broken(contract.contract(), changed(edit))) == 1


def test_an_addition_breaks_nothing() -> None:
    assert contract.broken(contract.contract(), changed("add")) == []


def test_the_generated_code_is_what_the_compiler_makes_of_the_source(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    source = "seedbed/proto/v1/registry.proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / ".typecheck"), *outputs, source]
    subprocess.run(command, check=True)
    made = sorted((tmp_path / "seedbed/proto/v1").iterdir())
    assert [path.name for path in made] == ["registry_pb2.py", "registry_pb2.pyi", "registry_pb2_grpc.py"]
    for path in made:
        assert path.read_bytes() == (ROOT / "proto/v1" / path.name).read_bytes(), f"{path.name}: generate it again"


def test_no_folder_of_the_contract_is_a_regular_package() -> None:
    assert list((ROOT / "proto").rglob("__init__.py")) == []


def test_the_contract_does_not_hide_another_package_called_proto(tmp_path: Path) -> None:
    (tmp_path / "proto").mkdir()
    (tmp_path / "proto/__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; import proto; print(proto.__file__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(tmp_path / "proto/__init__.py")
