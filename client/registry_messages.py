"""Messages of the wire as Seedbed's values, and back."""

from __future__ import annotations

import json

from pydantic import ValidationError

from seedbed.common.config import BaseModelConfig, LoraSettings
from seedbed.common.errors import EnvironmentFailure
from seedbed.common.events import Event
from seedbed.common.manifest import BaseIdentity
from seedbed.common.registry import Contribution, FederationInfo
from seedbed.proto.v1 import registry_pb2 as pb


def federation(message: pb.Federation) -> FederationInfo:
    """What a federation says of itself.

    Raises:
        EnvironmentFailure: if this version of Seedbed does not understand it.
    """
    base, lora = message.base, message.lora
    plain = ("name", "version", "prompt", "needs_general_text", "registry_port", "secure", "seed", "best")
    try:
        return FederationInfo.model_validate(
            {
                **{field: getattr(message, field) for field in plain},
                "state": message.state,
                "base": BaseModelConfig.model_validate(
                    {
                        "model": base.model,
                        "revision": base.revision if base.HasField("revision") else None,
                        "dtype": base.dtype,
                        "quantization": base.quantization,
                    }
                ),
                "identity": BaseIdentity(name=base.name, digest=base.digest),
                "lora": LoraSettings.model_validate(
                    {
                        "rank": lora.rank,
                        "alpha": lora.alpha,
                        "targets": tuple(lora.targets) or "all-linear",
                        "rslora": lora.rslora,
                        "dropout": lora.dropout,
                    }
                ),
                "tasks": tuple(message.tasks),
                "held_out": tuple(message.held_out),
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EnvironmentFailure(
            f"the federation says of its {where} what this version does not understand: {first['msg']}",
            f"Use the coordinator's version of Seedbed, {message.version}.",
        ) from None


def event(message: pb.Event) -> Event | None:
    """An event; None if it is of a kind that this version does not know."""
    try:
        detail = json.loads(message.detail or "{}")
        return Event.model_validate(
            {
                "kind": message.kind,
                "time": message.time,
                "node": message.node,
                "name": message.name,
                "detail": detail,
            }
        )
    except (ValueError, RecursionError):
        return None


def reported(event: Event) -> pb.Event:
    detail = json.dumps(event.model_dump(mode="json")["detail"], ensure_ascii=False)
    return pb.Event(kind=event.kind, time=event.time, node=event.node, name=event.name, detail=detail)


def contribution(message: pb.Contribution) -> Contribution:
    return Contribution(
        digest=message.digest,
        task=message.task,
        name=message.name,
        participant=message.participant,
        time=message.time,
        withdrawn=message.withdrawn,
    )
