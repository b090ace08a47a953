"""Seedbed's values as messages of the wire, and back."""

from __future__ import annotations

import json

from seedbed.common.errors import ConfigError
from seedbed.common.events import Event
from seedbed.common.registry import Contribution, FederationInfo
from seedbed.proto.v1 import registry_pb2 as pb


def federation(info: FederationInfo) -> pb.Federation:
    targets = () if info.lora.targets == "all-linear" else info.lora.targets
    return pb.Federation(
        base=pb.BaseModel(
            name=info.identity.name,
            digest=info.identity.digest,
            **info.base.model_dump(exclude={"revision"} if info.base.revision is None else None),
        ),
        lora=pb.Lora(targets=targets, **info.lora.model_dump(exclude={"targets"})),
        **info.model_dump(exclude={"format", "base", "identity", "lora", "training"}),
    )


def event(value: Event) -> pb.Event:
    detail = json.dumps(value.detail, ensure_ascii=False)
    return pb.Event(kind=value.kind, time=value.time, node=value.node, name=value.name, detail=detail)


def contribution(value: Contribution) -> pb.Contribution:
    return pb.Contribution(**value.model_dump())


def reported(message: pb.Event, node: str) -> Event:
    """A participant's event, in its own name and at this machine's time.

    Raises:
        ConfigError: if it is malformed.
    """
    try:
        detail = json.loads(message.detail or "{}", parse_constant=lambda _: None)
        return Event(kind=message.kind, node=node, name=message.name, detail=detail)
    except (ValueError, RecursionError):
        raise ConfigError(f"this is no event: kind {message.kind[:40]!r}, detail {message.detail[:40]!r}") from None
