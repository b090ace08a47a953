"""Which candidates a federation makes: from the names and mappings of `combine.candidates` to what each one is made of.

Names are looked up in the tables of references, merge methods and routers, so that a wrong one is refused, with the nearest,
before anything starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from seedbed.common.config import ROUTER_KINDS, CandidateSettings, FederationConfig, Group, RouterKind
from seedbed.common.errors import ConfigError, nearest
from seedbed.common.routing.settings import RouterSettings
from seedbed.server.merging import METHODS, Method, Options, method_named

Role = Literal["base", "seed", "alone", "joint", "merge", "mixture", "oracle"]
_PLAIN: dict[str, Role] = {"base": "base", "seed": "seed", "joint": "joint", "oracle": "oracle"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one candidate is made of.

    `alone` is a group of adapters, each a candidate of its own; `merge` one adapter by a method; `mixture` a group's experts
    under a router; `oracle` no model, but for each task the score of the best single expert, which needs `experts`.
    """

    name: str
    role: Role
    of: Group = "experts"
    method: Method | None = None
    options: Options | None = None
    routing: RouterSettings | None = None
    order: int | None = None
    """Of a merge: its adapters come in a random order drawn from this number."""

    @property
    def trains_router(self) -> bool:
        """Whether a learned router must be trained over the group's frozen experts."""
        return self.routing is not None and self.routing.base == "learned"

    @property
    def trains_gates(self) -> bool:
        return self.routing is not None and self.routing.base == "phatgoose"


def resolve(config: FederationConfig) -> list[Candidate]:
    """All candidates, in the configuration's order.

    Raises:
        ConfigError: if a name, a method or an option is unknown, or does not fit the rest of the configuration.
    """
    found = [_named(entry, config) if isinstance(entry, str) else _made(entry) for entry in config.combine.candidates]
    for candidate in found:
        _check(candidate, config)
    if any(candidate.role == "oracle" for candidate in found) and "experts" not in config.combine.names:
        raise ConfigError("combine.candidates: 'oracle' needs 'experts'", "Add 'experts' to the candidates.")
    return found


def groups(candidates: list[Candidate]) -> set[Group]:
    """The groups of adapters that must be trained; the experts always."""
    return {"experts", *(candidate.of for candidate in candidates)}


def _named(name: str, config: FederationConfig) -> Candidate:
    if name in _PLAIN:
        return Candidate(name, _PLAIN[name])
    special: dict[str, Callable[[], Candidate]] = {
        "experts": lambda: Candidate(name, "alone"),
        "tuned": lambda: Candidate(name, "alone", of="tuned"),
        "individual": lambda: Candidate(name, "alone", of="unseeded"),
        "compressed": lambda: _merge(name, "svd", {"rank": config.combine.rank or config.lora.rank}),
        "unseeded": lambda: _merge(name, "average", {}, "unseeded"),
    }
    if name in special:
        return special[name]()
    if name in METHODS:
        return _merge(name, name, {})
    if name in ROUTER_KINDS:
        return Candidate(name, "mixture", routing=_router(cast(RouterKind, name)))
    raise ConfigError(
        f"combine.candidates: there is no candidate '{name}'",
        nearest(name, [*_PLAIN, *special, *METHODS, *ROUTER_KINDS]),
    )


def _made(entry: CandidateSettings) -> Candidate:
    if entry.method is not None:
        return replace(_merge(entry.name, entry.method, entry.options, entry.of), order=entry.order)
    assert entry.router is not None  # the configuration has checked it
    routing = _router(entry.router, entry.over, entry.top_k, entry.temperature)
    return Candidate(entry.name, "mixture", of=entry.of, routing=routing)


def _router(
    kind: RouterKind, over: RouterKind = "arrow", top_k: int | None = None, temperature: float = 1.0
) -> RouterSettings:
    values: dict[str, Any] = {"kind": kind, "temperature": temperature}
    values |= {"of": over} if kind == "sequence" else {}
    return RouterSettings.model_validate(values if top_k is None else {**values, "top_k": top_k})


def _merge(name: str, method: str, options: dict[str, object], of: Group = "experts") -> Candidate:
    row = method_named(method)
    return Candidate(name, "merge", of=of, method=row, options=row.parse(options))


def _check(candidate: Candidate, config: FederationConfig) -> None:
    where = f"combine.candidates: '{candidate.name}'"
    experts = len(config.tasks.experts)
    if candidate.routing is not None:
        candidate.routing.require(experts)
    if candidate.options is not None and needs_seed(candidate.options) and config.seed.mode == "none":
        raise ConfigError(f"{where} needs the seed, but seed.mode is 'none'", "Leave out task_scale and include_seed.")
    if candidate.options is not None and needs_seed(candidate.options) and candidate.of == "unseeded":
        raise ConfigError(
            f"{where} refers to a seed that unseeded experts have not", "Leave out task_scale and include_seed."
        )
    rank = getattr(candidate.options, "rank", None)
    whole = experts * config.lora.rank
    if candidate.method is not None and candidate.method.within_inputs and rank is not None and rank > whole:
        raise ConfigError(
            f"{where}: expected a rank from 1 to {whole}, which is what the experts have together, got {rank}",
            "Use 'average' to keep everything.",
        )


def needs_seed(options: Options) -> bool:
    """Whether a merge with these options must be given the seed."""
    return getattr(options, "task_scale", 1.0) != 1.0 or bool(getattr(options, "include_seed", False))


def token_level(candidate: Candidate) -> RouterSettings:
    """The router that chooses for each token: what is trained, also for a candidate that averages it over a sequence."""
    assert candidate.routing is not None  # asked of mixtures only
    if candidate.routing.of is None:
        return candidate.routing
    values = candidate.routing.model_dump(exclude={"of", "kind"})
    return RouterSettings.model_validate({**values, "kind": candidate.routing.of})
