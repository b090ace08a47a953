"""What an event's `detail` holds, read with suspicion: participants write events too."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from seedbed.server.monitor.state import NODES, TEXT

_MOST = float(1 << 62)
"""Numbers beyond this are taken for nonsense."""


def number(detail: Mapping[str, Any], *keys: str, negative: bool = False) -> float | None:
    """The first of several keys that holds a finite number of a sensible size."""
    for key in keys:
        value = detail.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and _sensible(value, negative):
            return float(value)
    return None


def _sensible(value: float, negative: bool) -> bool:
    return math.isfinite(value) and abs(value) < _MOST and (negative or value >= 0)


def text(value: object) -> str:
    """A text without control characters (which a terminal would obey), and not too long."""
    if not isinstance(value, str):
        return "" if value is None else text(str(value))
    if value.isascii() and value.isprintable() and len(value) <= TEXT:
        return value
    kept = "".join(sign if not unicodedata.category(sign).startswith("C") else " " for sign in value[: 4 * TEXT])
    kept = " ".join(kept.split())
    return kept if len(kept) <= TEXT else kept[: TEXT - 1] + "…"


def texts(value: object) -> tuple[str, ...]:
    return tuple(text(one) for one in value[:NODES]) if isinstance(value, list | tuple) else ()
