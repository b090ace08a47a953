"""How times, sizes and states are said, the same in the table, the terminal and the lines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from seedbed.server.monitor.state import JobView, Status

_BLOCKS = "▁▂▃▄▅▆▇█"


def duration(seconds: float | None) -> str:
    """Such as `42 s`, `3 min`, `1 h 05 min`, `2 d 3 h`; `unknown` where nobody knows."""
    if seconds is None:
        return "unknown"
    whole = round(max(0.0, seconds))
    if whole < 100:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def ago(seconds: float) -> str:
    """A duration in its largest unit alone, such as `3 min`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes in decimal units, such as `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def steps(job: JobView) -> str:
    """Such as `40/100`."""
    if not job.step and not job.steps:
        return ""
    return f"{job.step}/{job.steps or '?'}"


def speed(job: JobView) -> str:
    """Tokens per second."""
    rate = job.tokens_per_second
    return "" if rate is None else f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def progress(status: Status) -> str:
    """The stage and how far it is, such as `experts 3/8`."""
    stage = status.stage
    if not stage.name:
        return "not begun"
    return f"{stage.name} {stage.done}/{stage.total}" if stage.total else f"{stage.name} {stage.done} done"


def transferred(status: Status) -> str:
    return f"{size(status.received)} in, {size(status.sent)} out"


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """A curve in `width` characters at most: each is the mean of its share of the values."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    if high <= low:
        return _BLOCKS[3] * count
    return "".join(_BLOCKS[min(7, int(8 * (mean - low) / (high - low)))] for mean in means)
