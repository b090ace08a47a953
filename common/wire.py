"""Values in and out of Flower's records: one JSON string under one key, so the messages' schema is the values' own.

Nothing here imports Flower: a record is any mapping of strings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from seedbed.common.errors import DataError
from seedbed.common.manifest import Record

RECORD = "seedbed"
"""Name of the config record that carries the value in a message's content."""
_KEY = "json"
_LIMIT = 4_000_000
"""Longest text that is parsed: a manifest is a few kilobytes, so a longer message is no honest one."""

Value = TypeVar("Value", bound=Record)


def pack(value: Record) -> dict[str, Any]:
    """A value as the content of a config record."""
    return {_KEY: value.model_dump_json()}


def unpack(kind: type[Value], record: Mapping[str, Any] | None) -> Value:
    """Read a value back, trusting nothing.

    Raises:
        DataError: if the record is missing, too long, or not a valid `kind`.
    """
    text = None if record is None else record.get(_KEY)
    if not isinstance(text, str):
        raise DataError(f"the message holds no {kind.__name__}", "Both sides need the same version of Seedbed.")
    if len(text) > _LIMIT:
        raise DataError(f"the message's {kind.__name__} is {len(text)} characters long, at most {_LIMIT} are read")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"the message's {kind.__name__} is malformed at '{path}': {first['msg']}",
            "Both sides need the same version of Seedbed.",
        ) from None
