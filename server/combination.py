"""Stage combine: from experts to candidates, each an adapter of the store with its lineage (or none, for the base)."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from seedbed.common.adapter import Adapter
from seedbed.common.config import Group
from seedbed.common.errors import AdapterMismatchError, ConfigError
from seedbed.common.manifest import BaseIdentity, Kind, recipe_hash
from seedbed.common.storage import write_adapter
from seedbed.server.adapters.files import merge_directories
from seedbed.server.candidates import Candidate, Role, needs_seed, resolve
from seedbed.server.diagnostics import Diagnostics
from seedbed.server.ledger import Entry
from seedbed.server.merging.order import random_orders
from seedbed.server.mixtures import Mixer
from seedbed.server.observer import Observer
from seedbed.server.plan import molora_job
from seedbed.server.rundir import RunDirectory


@dataclass(frozen=True, slots=True)
class Combination:
    """One candidate: a name, the digest of its adapter (none for the base alone), and whose task it is, for an expert."""

    name: str
    digest: str | None
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Parts:
    """What candidates are made of, by digest."""

    seed: str | None
    groups: Mapping[Group, Mapping[str, str]]
    """Adapters by task, for each group that was trained."""
    alone: Mapping[str, str] = field(default_factory=dict)
    """`joint`, and routers trained together with their experts, by job name."""
    routers: Mapping[str, str] = field(default_factory=dict)
    """Trained routers, by candidate."""
    guests: Mapping[str, str] = field(default_factory=dict)
    """Contributed experts for further tasks, by name: they join the merges of the experts."""
    contributed: frozenset[str] = frozenset()
    """Digests of all contributed experts, whose ranks may differ from the others'."""

    def trained_here(self, group: Group) -> dict[str, str]:
        """Adapters of a group whose participants are in the federation, and can train what is over them."""
        return {task: digest for task, digest in self.groups.get(group, {}).items() if digest not in self.contributed}


class Combiner:
    """Makes combined adapters, each once: what the ledger and the store hold is not made again."""

    def __init__(self, run: RunDirectory, base: BaseIdentity, observe: Observer) -> None:
        self.run = run
        self.base = base
        self.observe = observe
        self.mixer = Mixer(run.store, base, self._once)

    def given_seed(self, adapter: Adapter) -> str:
        """Take an adapter from outside into the store as the seed."""
        recipe = recipe_hash({"given": _content(adapter)})

        def make(directory: Path) -> None:
            write_adapter(directory, adapter, kind="seed", base=self.base, recipe=recipe)

        return self._once("seed", recipe, make)

    def seed(self, parents: Sequence[str], round_index: int) -> str:
        """One round's seed: A and B averaged apart, nearly exact since all parents share their start."""
        return self._merge(f"seed:round-{round_index + 1}", "factor_mean", parents, kind="seed")

    def combine(self, parts: Parts) -> list[Combination]:
        """All candidates that the configuration names, in its order, published under ``adapters/``."""
        candidates = resolve(self.run.config)
        self.observe.stage("combine", len(candidates))
        found: list[Combination] = []
        for candidate in candidates:
            missing = _missing(candidate, parts)
            if missing:
                self.run.ledger.quarantine("candidate", candidate.name, missing)
                self.observe.note(f"no candidate '{candidate.name}': {missing}")
            else:
                found += self._attempt(candidate, parts)
            self.observe.advance(candidate.name)
        for made in found:
            if made.digest is not None:
                self.run.publish(made.name, made.digest)
        return found

    def _attempt(self, candidate: Candidate, parts: Parts) -> list[Combination]:
        """As `_candidate`; what became impossible on the way is left out.

        A contribution may have another rank than means of factors take; with experts missing, there may be fewer than a
        router's `top_k`.
        """
        try:
            return self._candidate(candidate, parts)
        except (AdapterMismatchError, ConfigError) as error:
            fewer = len(parts.groups.get(candidate.of, {})) < len(self.run.config.tasks.experts)
            if not parts.contributed and not fewer:
                raise
            self.run.ledger.quarantine("candidate", candidate.name, error.message)
            self.observe.note(f"no candidate '{candidate.name}': {error.message}")
            return []

    def diagnostics(self, parts: Parts) -> dict[str, float]:
        """See `Diagnostics.all`."""
        return Diagnostics(self.run).all(resolve(self.run.config), parts.groups)

    def _candidate(self, candidate: Candidate, parts: Parts) -> list[Combination]:
        group = parts.groups.get(candidate.of, {})
        makers: dict[Role, Callable[[], list[Combination]]] = {
            "base": lambda: [Combination("base", None)],
            "seed": lambda: [Combination("seed", parts.seed)],
            "joint": lambda: [Combination("joint", parts.alone["joint"])],
            "oracle": list,  # computed from the experts' scores
            "alone": lambda: [Combination(alone_name(candidate.of, task), group[task], task) for task in group],
            "merge": lambda: [
                Combination(candidate.name, self._merged(candidate, with_guests(candidate, parts), parts.seed))
            ],
            "mixture": lambda: [Combination(candidate.name, self._mixture(candidate, parts))],
        }
        return makers[candidate.role]()

    def _merged(self, candidate: Candidate, group: Mapping[str, str], seed: str | None) -> str:
        assert candidate.method is not None
        assert candidate.options is not None
        options = merge_options(candidate, self.run.config.run.random_seed)
        given = seed if needs_seed(candidate.options) else None
        parents = in_order(candidate, list(group.values()))
        return self._merge(candidate.name, candidate.method.name, parents, options, given)

    def _merge(
        self,
        name: str,
        method: str,
        parents: Sequence[str],
        options: Mapping[str, Any] | None = None,
        seed: str | None = None,
        kind: Kind = "merge",
    ) -> str:
        chosen = dict(options or {})
        recipe = merge_recipe(method, parents, chosen, seed, kind)

        def make(directory: Path) -> None:
            inputs = [self.run.store.open(digest) for digest in parents]
            start = self.run.store.open(seed) if seed else None
            merge_directories(inputs, method, directory, options=chosen, seed=start, kind=kind)

        return self._once(name, recipe, make)

    def _mixture(self, candidate: Candidate, parts: Parts) -> str:
        """Digest of the candidate's router, whose parents are the experts."""
        trained = candidate.trains_gates or candidate.trains_router
        group = parts.trained_here(candidate.of) if trained else parts.groups.get(candidate.of, {})
        assert candidate.routing is not None
        if candidate.routing.kind == "molora":
            return parts.alone[molora_job(candidate)]
        candidate.routing.require(len(group))
        if candidate.name in parts.routers:
            return self.mixer.averaged(candidate, group, parts.routers[candidate.name])
        return self.mixer.computed(candidate, group)

    def _once(self, name: str, recipe: str, make: Callable[[Path], None]) -> str:
        """Have an adapter written and put into the store, unless the ledger says that it is there."""
        held = self.run.ledger.accepted(recipe, "combined")
        if held:
            return held.digest
        with _scratch(self.run.root) as directory:
            make(directory)
            digest = self.run.store.put(directory)
        self.run.ledger.append(Entry(event="combined", name=name, key=recipe, digest=digest))
        return digest


def merge_recipe(
    method: str,
    parents: Sequence[str],
    options: Mapping[str, Any] | None = None,
    seed: str | None = None,
    kind: Kind = "merge",
) -> str:
    """The hash of everything that determines a merge: by it the merge is made once."""
    return recipe_hash(
        {"combine": method, "parents": list(parents), "options": dict(options or {}), "seed": seed, "kind": kind}
    )


def merge_options(candidate: Candidate, random_seed: int) -> dict[str, Any]:
    """Options of a candidate's merge where they are not the defaults. Methods that draw, draw anew for every run's seed."""
    assert candidate.options is not None  # asked of merges only
    options = candidate.options.model_dump(mode="json", exclude_defaults=True)
    if random_seed and "random_seed" in type(candidate.options).model_fields:
        options["random_seed"] = random_seed * 10_000 + int(options.get("random_seed", 0))
    return options


def in_order(candidate: Candidate, digests: Sequence[str]) -> list[str]:
    """Adapters in the order in which a candidate merges them."""
    if candidate.order is None or len(digests) < 2:
        return list(digests)
    (order,) = random_orders(len(digests), 1, candidate.order)
    return [digests[index] for index in order]


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=root, prefix=".tmp-combine-") as directory:
        yield Path(directory) / "adapter"


def _missing(candidate: Candidate, parts: Parts) -> str:
    """Why a candidate cannot be made; empty where it can."""
    if candidate.role in ("merge", "mixture", "alone") and not parts.groups.get(candidate.of):
        return f"no adapter of the group '{candidate.of}' is there"
    job = molora_job(candidate) if candidate.routing is not None and candidate.routing.kind == "molora" else "joint"
    if (candidate.role == "joint" or job != "joint") and job not in parts.alone:
        return f"the job '{job}' gave no result"
    return ""


def with_guests(candidate: Candidate, parts: Parts) -> dict[str, str]:
    """What a candidate merges: its group, and over the experts whoever came from elsewhere."""
    guests = parts.guests if candidate.of == "experts" else {}
    return {**parts.groups.get(candidate.of, {}), **guests}


def alone_name(group: Group, task: str) -> str:
    """What a single adapter of a group is called as a candidate."""
    return f"expert:{task}" if group == "experts" else f"{group}:{task}"


def _content(adapter: Adapter) -> dict[str, list[float | str]]:
    """What an adapter computes, hashed: the same for equal factors, whatever file they came in."""

    def digest(factor: object) -> str:
        assert isinstance(factor, Tensor)
        return hashlib.sha256(factor.detach().float().contiguous().cpu().numpy().tobytes()).hexdigest()

    return {name: [module.scaling, digest(module.A), digest(module.B)] for name, module in adapter.items()}
