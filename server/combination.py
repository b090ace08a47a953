"""Stage combine: from experts to candidates, each an adapter of the store with its lineage (or none, for the base)."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from seedbed.common import algebra
from seedbed.common.adapter import Adapter
from seedbed.common.manifest import BaseIdentity, Kind, recipe_hash
from seedbed.common.storage import read_adapter, write_adapter
from seedbed.server.ledger import Entry
from seedbed.server.merge_files import merge_directories
from seedbed.server.observer import Observer
from seedbed.server.rundir import RunDirectory


@dataclass(frozen=True, slots=True)
class Combination:
    """One candidate: a name, the digest of its adapter (none for the base alone), and whose task it is, for an expert."""

    name: str
    digest: str | None
    task: str | None = None


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a candidate is merged: of which experts, by which row of the table of methods."""

    parents: str
    """`experts` or `unseeded`."""
    method: str
    takes_rank: bool = False


_MERGED = {
    "average": _Recipe("experts", "average"),
    "compressed": _Recipe("experts", "svd", takes_rank=True),
    "factor_mean": _Recipe("experts", "factor_mean"),
    "unseeded": _Recipe("unseeded", "average"),
}


class Combiner:
    """Makes combined adapters, each once: what the ledger and the store hold is not made again."""

    def __init__(self, run: RunDirectory, base: BaseIdentity, observe: Observer) -> None:
        self.run = run
        self.base = base
        self.observe = observe

    def given_seed(self, adapter: Adapter) -> str:
        """Take an adapter from outside into the store as the seed."""
        recipe = recipe_hash({"given": _content(adapter)})

        def make(directory: Path) -> None:
            write_adapter(directory, adapter, kind="seed", base=self.base, recipe=recipe)

        return self._once("seed", recipe, make)

    def seed(self, parents: Sequence[str], round_index: int) -> str:
        """One round's seed: A and B averaged apart, nearly exact since all parents share their start."""
        return self._merge(f"seed:round-{round_index + 1}", "factor_mean", parents, kind="seed")

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
        groups = {"factor_gap_seeded": list(experts.values()), "factor_gap_unseeded": _unseeded(references)}
        return {name: self._factor_gap(digests) for name, digests in groups.items() if len(digests) > 1}

    def _factor_gap(self, digests: Sequence[str]) -> float:
        adapters = [read_adapter(self.run.store.open(digest))[0] for digest in digests]
        return float(algebra.factor_gap(adapters).overall)

    def _candidate(
        self, name: str, seed: str | None, experts: Mapping[str, str], references: Mapping[str, str]
    ) -> list[Combination]:
        if name == "base":
            return [Combination("base", None)]
        if name == "seed":
            return [Combination("seed", seed)]
        if name == "experts":
            return [Combination(job, digest, job.partition(":")[2]) for job, digest in experts.items()]
        if name == "joint":
            return [Combination("joint", references["joint"])]
        recipe = _MERGED[name]
        parents = list(experts.values()) if recipe.parents == "experts" else _unseeded(references)
        rank = (self.run.config.combine.rank or self.run.config.lora.rank) if recipe.takes_rank else None
        return [Combination(name, self._merge(name, recipe.method, parents, rank))]

    def _merge(
        self, name: str, method: str, parents: Sequence[str], rank: int | None = None, kind: Kind = "merge"
    ) -> str:
        recipe = recipe_hash({"combine": method, "parents": list(parents), "rank": rank, "kind": kind})

        def make(directory: Path) -> None:
            merge_directories([self.run.store.open(digest) for digest in parents], method, directory, rank, kind=kind)

        return self._once(name, recipe, make)

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


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=root, prefix=".tmp-combine-") as directory:
        yield Path(directory) / "adapter"


def _unseeded(references: Mapping[str, str]) -> list[str]:
    return [digest for job, digest in references.items() if job.startswith("unseeded:")]


def _content(adapter: Adapter) -> dict[str, list[float | str]]:
    """What an adapter computes, hashed: the same for equal factors, whatever file they came in."""

    def digest(factor: object) -> str:
        import torch

        assert isinstance(factor, torch.Tensor)
        return hashlib.sha256(factor.detach().float().contiguous().cpu().numpy().tobytes()).hexdigest()

    return {name: [module.scaling, digest(module.A), digest(module.B)] for name, module in adapter.items()}
