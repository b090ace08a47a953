"""Shapes of the modules that an adapter has, known from its file's header before any tensor is read."""

from __future__ import annotations

from collections.abc import Mapping

from seedbed.common.errors import AdapterMismatchError

Shapes = Mapping[str, tuple[int, int]]
"""``(out, in)`` of each module."""


def require_shapes(got: Shapes, expected: Shapes) -> None:
    """Refuse an adapter that does not adapt the expected modules, whatever its rank.

    Args:
        expected: those of the federation's seed, or of its base model.

    Raises:
        AdapterMismatchError: naming the first module that differs, what was expected, and what was got.
    """
    hint = "Train it from the federation's seed (`seedbed fetch seed`), or with the same target modules."
    missing, surplus = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    if missing or surplus:
        what = f"misses module {missing[0]}" if missing else f"has the unexpected module {surplus[0]}"
        raise AdapterMismatchError(f"the adapter {what}: expected {len(expected)} modules, got {len(got)}", hint)
    for name, shape in got.items():
        if shape != expected[name]:
            raise AdapterMismatchError(f"module {name}: expected shape {list(expected[name])}, got {list(shape)}", hint)
