"""The contract of the registry as plain data, and its recording: ``python tests/server/registry/contract.py``.

Recording only ever adds: a contract that has lost or changed something is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2

from seedbed.proto.v1 import registry_pb2

SNAPSHOT = Path(__file__).resolve().parents[3] / "proto/v1/registry.snapshot.json"


def contract(file: Any = None) -> dict[str, Any]:
    """Every field and method by its full name, with all that a peer depends on."""
    found = file or descriptor_pb2.FileDescriptorProto.FromString(registry_pb2.DESCRIPTOR.serialized_pb)
    return dict(sorted(_parts(found)))


def broken(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What of an old contract a new one does not keep."""
    return [f"{name}: was {old[name]}, is {new.get(name, 'gone')}" for name in old if new.get(name) != old[name]]


def _parts(file: Any) -> Iterator[tuple[str, Any]]:
    for message in file.message_type:
        yield from _fields(message, file.package)
    for service in file.service:
        for method in service.method:
            streams = ["stream " * method.client_streaming, "stream " * method.server_streaming]
            yield (
                f"{file.package}.{service.name}.{method.name}()",
                f"{streams[0]}{method.input_type} -> {streams[1]}{method.output_type}",
            )


def _fields(message: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    name = f"{prefix}.{message.name}"
    yield name, "message"
    for field in message.field:
        type_name = field.type_name or descriptor_pb2.FieldDescriptorProto.Type.Name(field.type)[5:].lower()
        label = descriptor_pb2.FieldDescriptorProto.Label.Name(field.label)[6:].lower()
        oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else None
        yield f"{name}.{field.name}", {"number": field.number, "type": type_name, "label": label, "oneof": oneof}
    for nested in message.nested_type:
        yield from _fields(nested, name)


def main() -> None:
    old = json.loads(SNAPSHOT.read_text(encoding="utf-8")) if SNAPSHOT.exists() else {}
    new = contract()
    if lost := broken(old, new):
        sys.exit("v1 must keep what it has (see proto/README.md):\n" + "\n".join(lost))
    SNAPSHOT.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    print(f"recorded, with {len(new) - len(old)} additions")


if __name__ == "__main__":
    main()
