"""Routers over frozen experts as artifacts of a run: computed, stacked from gates, or averaged over participants.

A mixture in the store is its router alone, whose parents are the experts, so no expert is stored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seedbed.common.adapter import Adapter
from seedbed.common.manifest import BaseIdentity, recipe_hash
from seedbed.common.routing import Router, RouterSettings, arrow_router, average_routers, gates_of, phatgoose_router
from seedbed.common.routing.router_file import read_router, write_router
from seedbed.common.storage import AdapterStore, read_adapter
from seedbed.server.candidates import Candidate, token_level

Once = Callable[[str, str, Callable[[Path], None]], str]
"""``(name, recipe, make) -> digest``: have a directory made and put into the store, unless the recipe is there."""


class Mixer:
    """Makes routers, each once.

    Args:
        store: where experts, gates and routers are.
        base: the base model that they belong to.
        once: see `Once`.
    """

    def __init__(self, store: AdapterStore, base: BaseIdentity, once: Once) -> None:
        self.store = store
        self.base = base
        self.once = once

    def computed(self, candidate: Candidate, experts: Mapping[str, str]) -> str:
        """A router that needs no training.

        Args:
            experts: digests by task, in order.
        """
        settings = _settings(candidate)

        def make() -> Router:
            if settings.base != "arrow":
                return Router(settings)
            return Router(settings, arrow_router(self._adapters(experts), token_level(candidate)).tensors)

        return self._write(candidate.name, settings, experts, {}, make)

    def of_gates(self, candidate: Candidate, experts: Mapping[str, str], gates: Mapping[str, str]) -> str:
        """One router of all experts' own gates.

        Args:
            experts, gates: digests by task.
        """
        settings = token_level(candidate)

        def make() -> Router:
            alone = [gates_of(self._router(gates[task])) for task in experts]
            return phatgoose_router(self._adapters(experts), alone, settings)

        made_of = {"gates": [gates[task] for task in experts]}
        return self._write(candidate.name, settings, experts, made_of, make)

    def mean(self, candidate: Candidate, round_index: int, experts: Mapping[str, str], routers: Sequence[str]) -> str:
        """The mean of routers that participants trained from one start, each on its own data.

        Args:
            routers: digests, over the same experts.
        """
        settings = token_level(candidate)

        def make() -> Router:
            return average_routers((self._router(digest), 1.0) for digest in routers)

        made_of = {"mean": list(routers), "round": round_index}
        return self._write(f"{candidate.name}:round-{round_index + 1}", settings, experts, made_of, make)

    def averaged(self, candidate: Candidate, experts: Mapping[str, str], router: str) -> str:
        """The router of a sequence-level candidate, from the trained one that chooses for each token; others are kept."""
        settings = _settings(candidate)
        if settings.of is None:
            return router
        return self._write(
            candidate.name,
            settings,
            experts,
            {"averages": router},
            lambda: Router(settings, self._router(router).tensors),
        )

    def _write(
        self,
        name: str,
        settings: RouterSettings,
        experts: Mapping[str, str],
        made_of: Mapping[str, Any],
        make: Callable[[], Router],
    ) -> str:
        parents = tuple(experts.values())
        described, recipe = describe_router(settings, experts, made_of)

        def write(directory: Path) -> None:
            write_router(
                directory,
                make(),
                kind="router",
                base=self.base,
                names=tuple(experts),
                parents=parents,
                recipe=recipe,
                settings=described,
            )

        return self.once(name, recipe, write)

    def _router(self, digest: str) -> Router:
        return read_router(self.store.open(digest))[0]

    def _adapters(self, experts: Mapping[str, str]) -> list[Adapter]:
        return [read_adapter(self.store.open(digest))[0] for digest in experts.values()]


def describe_router(
    settings: RouterSettings, experts: Mapping[str, str], made_of: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """What the manifest of a router says, and the recipe under which it is made once.

    Args:
        experts: digests by task, in order.
        made_of: digests of gates or routers that it was computed from.
    """
    described = {"router": settings.model_dump(mode="json"), "names": list(experts), **made_of}
    return described, recipe_hash({**described, "parents": list(experts.values())})


def _settings(candidate: Candidate) -> RouterSettings:
    assert candidate.routing is not None  # asked of mixtures only
    return candidate.routing
