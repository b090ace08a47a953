"""Which router: its kind and the few numbers that shape it, as a frozen value that travels in JSON."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from pydantic import model_validator

from seedbed.common.algebra import normalized
from seedbed.common.errors import ConfigError, nearest
from seedbed.common.manifest import Record

RouterKind = Literal["uniform", "learned", "molora", "arrow", "phatgoose", "sequence", "oracle"]
KINDS: tuple[str, ...] = get_args(RouterKind)
CONSTANT = ("uniform", "oracle")
"""Kinds that do not look at the input."""
TENSORS: dict[str, dict[str, int]] = {
    "uniform": {},
    "oracle": {},
    "learned": {"weight": 2, "bias": 1},
    "molora": {"weight": 2, "bias": 1},
    "arrow": {"prototypes": 2},
    "phatgoose": {"gates": 2},
}
"""Names of what each kind holds for a module, with their number of dimensions: ``[N, in]`` or ``[N]``."""
_DEFAULT_TOP_K = {"phatgoose": 2}


class RouterSettings(Record):
    """How the probabilities ``p [N]`` of the experts come about.

    Raises:
        ConfigError: if a value makes no sense; `require` adds what needs the number of experts.
    """

    kind: RouterKind = "uniform"
    """`uniform`: the same for every token. `learned`: softmax of a trained linear gate. `molora`: the same gate, trained
    together with the experts. `arrow`: by the leading direction of every expert's update. `phatgoose`: by gates that were
    trained for each expert alone. `sequence`: the mean of another router's probabilities over the sequence so far. `oracle`:
    one expert, chosen by hand."""
    top_k: int | None = None
    """Only the k likeliest experts of a token take part, renormalized (under `learned` and `molora` also those that tie with
    the last of them); none is all, and 2 for `phatgoose`, as published, or all where there are fewer."""
    temperature: float = 1.0
    """Scores are divided by it."""
    weights: tuple[float, ...] | None = None
    """Of `uniform`: one for each expert, divided by their sum; none weighs all the same."""
    of: RouterKind | None = None
    """Of `sequence`: the router whose probabilities are averaged."""
    expert: int = 0
    """Of `oracle`: index of the expert to begin with."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if isinstance(values, dict):
            kinds = [values[field] for field in ("kind", "of") if isinstance(values.get(field), str)]
            for kind in kinds:
                if kind not in KINDS:
                    raise ConfigError(f"there is no router '{kind}'", nearest(kind, KINDS))
            base = kinds[-1] if kinds else "uniform"
            if values.get("top_k") is None and base in _DEFAULT_TOP_K:
                return {**values, "top_k": _DEFAULT_TOP_K[base]}
        return values

    @model_validator(mode="after")
    def _sensible(self) -> RouterSettings:
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k {self.top_k} of the router is not 1 or more", "Leave it out to use all experts.")
        if not (0 < self.temperature < math.inf):
            raise ConfigError(
                f"temperature {self.temperature} of the router is not above 0", "Use 1.0, or leave it out."
            )
        if (self.kind == "sequence") != (self.of is not None) or self.of == "sequence":
            raise ConfigError(
                f"router '{self.kind}' of '{self.of}': a sequence router, and no other, is made of a router by token",
                "Set kind: sequence and of: learned, arrow or phatgoose.",
            )
        if self.weights is not None and self.base != "uniform":
            raise ConfigError(f"router '{self.kind}' takes no weights", "Weights belong to the router 'uniform'.")
        if self.weights is not None:
            normalized(self.weights, len(self.weights))
        if self.top_k is not None and self.base in CONSTANT:
            raise ConfigError(f"router '{self.kind}' takes no top_k: it ranks no experts", "Leave it out.")
        return self

    @property
    def base(self) -> RouterKind:
        """The kind that sees one token: `of` for a sequence router, else `kind`."""
        return self.of or self.kind

    def require(self, count: int) -> None:
        """Check what depends on the number of experts.

        Raises:
            ConfigError: if `top_k` or `expert` is beyond them, or there are not as many weights.
        """
        if self.top_k is not None and self.top_k > max(count, _DEFAULT_TOP_K.get(self.base, 0)):
            raise ConfigError(
                f"top_k {self.top_k} of the router is larger than the number of experts, {count}",
                f"Use {count} or less, or leave it out to use all.",
            )
        if self.base == "oracle" and not 0 <= self.expert < count:
            raise ConfigError(f"expert {self.expert} of the oracle is not one of the {count} experts, counted from 0")
        if self.weights is not None and len(self.weights) != count:
            raise ConfigError(f"expected {count} weights, one for each expert, got {len(self.weights)}")
