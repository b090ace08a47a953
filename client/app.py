"""The Flower ClientApp: it unpacks a message, does the job, and packs the answer. Work is done in `client.jobs`.

Jobs: `hello` (who are you), `seed` and `expert` (train), `gate` and `router` (train over frozen experts), `joint` and
`molora` (train on several tasks; only where one participant holds them all). Whatever else a message asks for, and one that
cannot be read, is answered with a sentence: the participant lives on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast, get_args

import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from seedbed.client.jobs import introduce, perform
from seedbed.common.errors import ConfigError, SeedbedError, nearest
from seedbed.common.jobs import NODES_VARIABLE, Job, JobKind, JobResult, Node
from seedbed.common.manifest import Record
from seedbed.common.wire import RECORD, pack, unpack


class Participant(ClientApp):  # type: ignore[misc]
    """A ClientApp that answers what it has no function for, where Flower's own raises."""

    def __call__(self, message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if kind in _KNOWN:
            return cast(Message, super().__call__(message, context))
        return _refusal(message, context, f"this participant knows no job '{kind}'", nearest(kind, _KNOWN))


_KNOWN = ("query.hello", *(f"train.{kind}" for kind in get_args(JobKind)))
app = Participant()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    return _reply(message, introduce(_node(context)))


def _work(message: Message, context: Context) -> Message:
    try:
        job = unpack(Job, message.content.config_records.get(RECORD))
    except SeedbedError as error:
        return _refusal(message, context, error.message, error.hint)
    # Nobody waits for an answer after the message's time to live: a training that takes longer is ended.
    return _reply(message, perform(job, _node(context), deadline=message.metadata.ttl))


for _kind in get_args(JobKind):
    app.train(_kind)(_work)


def _refusal(message: Message, context: Context, error: str, hint: str) -> Message:
    return _reply(message, JobResult(node=_node(context).name, name="", recipe="", error=error, hint=hint))


def _reply(message: Message, value: Record) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord(pack(value))}), reply_to=message)


def _node(context: Context) -> Node:
    """Who this participant is: its own node file, or in a simulation the file of its partition."""
    own = context.node_config.get("seedbed-node")
    if own is not None:
        path = Path(str(own))
    elif NODES_VARIABLE in os.environ:
        path = Path(os.environ[NODES_VARIABLE]) / f"{context.node_config['partition-id']}.yaml"
    else:
        raise ConfigError(
            "this participant does not know its node file",
            "Start the SuperNode with --node-config 'seedbed-node=\"FILE.yaml\"'.",
        )
    try:
        return Node.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"node file {path} cannot be used: {error}", "Mend the file.") from None
