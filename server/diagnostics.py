"""Numbers that say how far the combination of a run can be trusted: computed once, from adapters in the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from seedbed.common import algebra
from seedbed.common.config import Group
from seedbed.common.files import atomic_write
from seedbed.common.manifest import recipe_hash
from seedbed.common.storage import AdapterFile, read_adapter
from seedbed.server.candidates import Candidate
from seedbed.server.merging.order import OrderSensitivity, order_sensitivity
from seedbed.server.rundir import RunDirectory

ORDERS, MODULES = 3, 32
"""Order sensitivity is measured with so many other orders, on at most so many modules, spread evenly over the model."""
_LABELS: Mapping[Group, str] = {"experts": "seeded", "tuned": "tuned", "unseeded": "unseeded"}


class Diagnostics:
    """Diagnostics of one run, each kept in its directory as soon as it is there."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def all(self, candidates: Sequence[Candidate], groups: Mapping[Group, Mapping[str, str]]) -> dict[str, float]:
        """`factor_gap_GROUP`: how far averaging A and B apart is from the exact mean, for each group of several adapters.
        `order_sensitivity_CANDIDATE`: mean relative distance between an ordered merge and the same in other orders.

        Args:
            groups: digests by task.
        """
        found = {}
        for group, label in _LABELS.items():
            digests = list(groups.get(group, {}).values())
            if len(digests) > 1:
                found[f"factor_gap_{label}"] = self._once("factor_gap", digests, {}, partial(self._factor_gap, digests))
        for candidate in candidates:
            digests = list(groups.get(candidate.of, {}).values())
            if candidate.method is not None and candidate.method.ordered and len(digests) > 1:
                found[f"order_sensitivity_{candidate.name}"] = self._order(candidate, digests)
        return found

    def _order(self, candidate: Candidate, digests: Sequence[str]) -> float:
        assert candidate.method is not None
        assert candidate.options is not None
        settings = {"method": candidate.method.name, "options": candidate.options.model_dump(mode="json")}
        return self._once("order", digests, settings, partial(self._order_sensitivity, candidate, digests))

    def _once(
        self, name: str, digests: Sequence[str], settings: Mapping[str, object], compute: Callable[[], float]
    ) -> float:
        key = recipe_hash({"diagnostic": name, "of": list(digests), **settings})
        path = self.run.root / "evaluations" / f"{key}.number.json"
        try:
            return float(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            value = compute()
            atomic_write(path, json.dumps(value).encode())
            return value

    def _factor_gap(self, digests: Sequence[str]) -> float:
        return algebra.factor_gap([read_adapter(self.run.store.open(digest))[0] for digest in digests]).overall

    def _order_sensitivity(self, candidate: Candidate, digests: Sequence[str]) -> float:
        assert candidate.method is not None
        files = [AdapterFile(self.run.store.open(digest)) for digest in digests]
        names = sorted({name for file in files for name in file.names})
        chosen = names[:: -(-len(names) // MODULES)]
        shares = [1 / len(files)] * len(files)
        parts = []
        for name in chosen:
            updates = [file.factors(name) if name in file.names else None for file in files]
            parts.append(order_sensitivity(candidate.method, name, updates, shares, candidate.options, orders=ORDERS))
        return OrderSensitivity.total(parts).mean
