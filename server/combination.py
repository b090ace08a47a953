"""Stage combine: from experts to candidates, each an adapter of the store with its lineage (or none, for the base)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seedbed.common import algebra, lowrank
from seedbed.common.adapter import Adapter
from seedbed.common.manifest import BaseIdentity, Kind, recipe_hash
from seedbed.common.storage import read_adapter, write_adapter
from seedbed.common.versions import software_versions
from seedbed.server.ledger import Entry
from seedbed.server.observer import Observer
from seedbed.server.rundir import RunDirectory


@dataclass(frozen=True, slots=True)
class Combination:
    """One candidate: a name, the digest of its adapter (none for the base alone), and whose task it is, for an expert."""

    name: str
    digest: str | None
    task: str | None = None


class Combiner:
    """Makes combined adapters, each once: what the ledger and the store hold is not made again."""

    def __init__(self, run: RunDirectory, base: BaseIdentity, observe: Observer) -> None:
        self.run = run
        self.base = base
        self.observe = observe

    def given_seed(self, adapter: Adapter) -> str:
        """Take an adapter from outside into the store as the seed."""
        return self._put("seed", "seed", recipe_hash({"given": _content(adapter)}), (), {}, lambda: adapter)

    def seed(self, parents: Sequence[str], round_index: int) -> str:
        """One round's seed: A and B averaged apart, nearly exact since all parents share their start."""
        options = {"round": round_index + 1}
        recipe = _recipe("factor_mean", parents, options)
        return self._put(
            f"seed:round-{round_index + 1}", "seed", recipe, parents, options, lambda: self._factor_mean(parents)
        )

    def combine(self, seed: str | None, experts: Mapping[str, str], references: Mapping[str, str]) -> list[Combination]:
        """All candidates that the configuration names, in its order, published under ``adapters/``.

        Args:
            seed: digest of the seed.
            experts: digests by job name ``expert:TASK``.
            references: digests by job name ``unseeded:TASK`` and ``joint``.
        """
        names = self.run.config.combine.candidates
        self.observe.stage("combine", len(names))
        found: list[Combination] = []
        for name in names:
            found += self._candidate(name, seed, experts, references)
            self.observe.advance(name)
        for candidate in found:
            if candidate.digest is not None:
                self.run.publish(candidate.name, candidate.digest)
        return found

    def diagnostics(self, experts: Mapping[str, str], references: Mapping[str, str]) -> dict[str, float]:
        """How far averaging A and B apart is from the exact mean, for seeded and for unseeded experts."""
        gaps = {"factor_gap_seeded": list(experts.values()), "factor_gap_unseeded": _unseeded(references)}
        return {
            name: float(algebra.factor_gap([self._adapter(digest) for digest in digests]).overall)
            for name, digests in gaps.items()
            if len(digests) > 1
        }

    def _candidate(
        self, name: str, seed: str | None, experts: Mapping[str, str], references: Mapping[str, str]
    ) -> list[Combination]:
        parents = list(experts.values())
        rank = self.run.config.combine.rank or self.run.config.lora.rank
        if name == "base":
            return [Combination("base", None)]
        if name == "seed":
            return [Combination("seed", seed)]
        if name == "experts":
            return [Combination(job, digest, job.partition(":")[2]) for job, digest in experts.items()]
        if name == "joint":
            return [Combination("joint", references["joint"])]
        if name == "unseeded":
            parents = _unseeded(references)
        rows: dict[str, tuple[dict[str, Any], Callable[[], Adapter]]] = {
            "average": ({}, lambda: self._average(parents)),
            "unseeded": ({}, lambda: self._average(parents)),
            "compressed": ({"rank": rank}, lambda: lowrank.compress(self._average(parents), rank)),
            "factor_mean": ({}, lambda: self._factor_mean(parents)),
        }
        options, make = rows[name]
        return [Combination(name, self._put(name, "merge", _recipe(name, parents, options), parents, options, make))]

    def _average(self, digests: Sequence[str]) -> Adapter:
        return algebra.average([self._adapter(digest) for digest in digests])

    def _factor_mean(self, digests: Sequence[str]) -> Adapter:
        return algebra.factor_mean(self._each(digests))

    def _each(self, digests: Sequence[str]) -> Iterable[tuple[Adapter, float]]:
        return ((self._adapter(digest), 1.0) for digest in digests)

    def _adapter(self, digest: str) -> Adapter:
        return read_adapter(self.run.store.open(digest))[0]

    def _put(
        self,
        name: str,
        kind: Kind,
        recipe: str,
        parents: Sequence[str],
        options: Mapping[str, Any],
        make: Callable[[], Adapter],
    ) -> str:
        held = self.run.ledger.accepted(recipe, "combined")
        if held:
            return held.digest
        with tempfile.TemporaryDirectory(dir=self.run.root, prefix=".combine-") as scratch:
            directory = Path(scratch) / "adapter"
            write_adapter(
                directory,
                make(),
                kind=kind,
                base=self.base,
                parents=tuple(parents),
                recipe=recipe,
                settings={"method": name.partition(":")[0], **options},
                versions=software_versions(),
            )
            digest = self.run.store.put(directory)
        self.run.ledger.append(Entry(event="combined", name=name, key=recipe, digest=digest))
        return digest


def _unseeded(references: Mapping[str, str]) -> list[str]:
    return [digest for job, digest in references.items() if job.startswith("unseeded:")]


def _recipe(method: str, parents: Sequence[str], options: Mapping[str, Any]) -> str:
    return recipe_hash({"combine": method, "parents": list(parents), "options": dict(options)})


def _content(adapter: Adapter) -> dict[str, Any]:
    import hashlib

    return {
        name: [
            factors.scaling,
            *(
                hashlib.sha256(m.float().contiguous().cpu().numpy().tobytes()).hexdigest()
                for m in (factors.A, factors.B)
            ),
        ]
        for name, factors in adapter.items()
    }
