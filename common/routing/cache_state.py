"""Running sums of a router by sequence, kept on a key/value cache of transformers.

They are an attribute of the cache: they live and are copied with it, and move where its rows move, as in beam search.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from seedbed.common.errors import ConfigError

Sums = tuple[Tensor, Tensor]
"""Sum of the probabilities ``[rows, N]`` and number of the tokens ``[rows, 1]`` so far."""
_STATE = "seedbed_routing"
_MOVES = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")
"""Methods by which a cache's rows change places."""


@dataclass(frozen=True, slots=True, eq=False)
class CacheState:
    """What a mixture's routers remember of the tokens in a cache."""

    owner: str
    tokens: int
    """Padding included, as the cache counts them."""
    sums: dict[str, Sums]
    """By name of the layer."""

    def moved(self, method: str, argument: Any) -> CacheState:
        """After that method of the cache, called with that argument."""

        def move(rows: Tensor) -> Tensor:
            if method == "batch_repeat_interleave":
                return rows.repeat_interleave(argument, dim=0)
            return rows[torch.as_tensor(argument, device=rows.device)]

        sums = {name: (move(total), move(count)) for name, (total, count) in self.sums.items()}
        return CacheState(self.owner, self.tokens, sums)


def recall(cache: Any, owner: str) -> CacheState | None:
    """The state of a cache; none if it is empty.

    Raises:
        ConfigError: if it holds tokens that the owner did not route, or not all that it did.
    """
    length = int(cache.get_seq_length())
    state: CacheState | None = getattr(cache, _STATE, None)
    known = state.tokens if state is not None and state.owner == owner else 0
    if length == 0:
        return None
    if known != length:
        raise ConfigError(
            f"the key/value cache holds {length} tokens, of which the router by sequence has seen {known}",
            "Fill it with this mixture on the model, and do not cut it.",
        )
    return state


def remember(cache: Any, owner: str, sums: dict[str, Sums]) -> None:
    """Put the sums on a cache, after a forward pass that filled it."""
    fresh = not hasattr(cache, _STATE)
    setattr(cache, _STATE, CacheState(owner, int(cache.get_seq_length()), sums))
    if fresh:
        for name in _MOVES:
            if hasattr(cache, name):
                setattr(cache, name, MethodType(_MOVERS[name], cache))


def _mover(method: str) -> Any:
    def move(cache: Any, argument: Any) -> None:
        getattr(type(cache), method)(cache, argument)
        setattr(cache, _STATE, getattr(cache, _STATE).moved(method, argument))

    return move


_MOVERS = {name: _mover(name) for name in _MOVES}
