"""What a method of merging is: a pure function of adapters, and what a reader of the table wants to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from seedbed.common.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Options:
    """What methods can be told; each uses what its row says it takes."""

    rank: int | None = None
    """Rank of the result; each module has at most the rank that its inputs have together."""


MergeFunction = Callable[[Sequence[Adapter], Sequence[float] | None, Options], Adapter]
"""``(adapters, weights, options) -> adapter``: inputs unchanged, the same inputs give the same result. A function works
module by module: merging one module at a time gives the same as merging whole adapters. A module that an adapter does
not have is a zero update. Weights None means that all weigh the same."""


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table of methods."""

    name: str
    summary: str
    function: MergeFunction
    source: str
    """Where the method was published."""
    cost: str
    """Operations for one module of N adapters of rank r, R = N r, d = in + out."""
    rank: str
    """Rank of the result."""
    takes_rank: bool = False
    """Whether it uses `Options.rank`."""
    takes_mixed: bool = True
    """Whether ranks, scalings and sets of modules may differ between the adapters."""
