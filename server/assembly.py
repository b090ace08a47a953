"""From a run's artifacts and scores to one `Results`: what was found, from what, and at what cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from seedbed.common.drift import TextDrift
from seedbed.common.manifest import BaseIdentity, Manifest
from seedbed.common.routing import Mixture, RoutingDiagnostics
from seedbed.common.storage import AdapterStore, read_manifest
from seedbed.common.versions import software_versions
from seedbed.server.combination import Combination
from seedbed.server.evaluation.compare import Circumstances, Measured, build_results
from seedbed.server.evaluation.results import Cost, LineageNode, Outcomes, Results
from seedbed.server.evaluation.suite import TaskResult
from seedbed.server.ledger import Ledger
from seedbed.server.measurement import wearable
from seedbed.server.rundir import RunDirectory


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured of the candidates, by their names."""

    scores: Mapping[str, Sequence[TaskResult]]
    drifts: Mapping[str, TextDrift] = field(default_factory=dict)
    routing: Mapping[str, Mapping[str, RoutingDiagnostics]] = field(default_factory=dict)
    """Of mixtures, by task."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """Of the combination as a whole."""


def assemble(
    run: RunDirectory,
    base: BaseIdentity,
    candidates: Sequence[Combination],
    found: Findings,
    command: str,
) -> tuple[Results, Outcomes]:
    """Put scores, lineage, costs and circumstances of a run into one document."""
    measured = [_measured(run.store, candidate, found) for candidate in candidates]
    digests = [candidate.digest for candidate in candidates if candidate.digest]
    circumstances = Circumstances(
        command=command,
        base=base,
        config=run.config.model_dump(mode="json"),
        versions=software_versions(),
        lineage=lineage(run.store, run.ledger, digests),
        costs=_costs(run.ledger, run.config.training.batch_size),
        diagnostics=found.diagnostics,
        notes=_notes(run.ledger),
    )
    return build_results(run.config.name, measured, circumstances, seed=run.config.run.random_seed)


def lineage(store: AdapterStore, ledger: Ledger, digests: Iterable[str]) -> list[LineageNode]:
    """The adapters and all their ancestors, each once, parents first."""
    names = {entry.digest: entry.name for entry in ledger.of("accepted", "combined")}
    nodes: dict[str, LineageNode] = {}

    def visit(digest: str) -> None:
        if digest in nodes:
            return
        manifest: Manifest = read_manifest(store.open(digest))
        parents = _made_of(manifest)
        for parent in parents:
            visit(parent)
        nodes[digest] = LineageNode(
            digest=digest, name=names.get(digest, _own_name(manifest)), kind=manifest.kind, parents=parents
        )

    for digest in digests:
        visit(digest)
    return list(nodes.values())


def _own_name(manifest: Manifest) -> str:
    """Of an adapter that came with another: an expert that was trained together with its router, or a given one."""
    return f"{manifest.kind}:{manifest.task}" if manifest.task else "given"


def _made_of(manifest: Manifest) -> tuple[str, ...]:
    """Parents, and for a router also the gates or routers that it was made of."""
    if manifest.kind != "router":
        return manifest.parents
    others = [*manifest.settings.get("gates", ()), *manifest.settings.get("mean", ())]
    others += [manifest.settings[key] for key in ("averages", "parent") if manifest.settings.get(key)]
    return (*manifest.parents, *others)


def _measured(store: AdapterStore, candidate: Combination, found: Findings) -> Measured:
    scores = found.scores[candidate.name]
    drift = found.drifts.get(candidate.name)
    if candidate.digest is None:
        return Measured(candidate.name, scores, drift=drift)
    manifest = read_manifest(store.open(candidate.digest))
    rank, parameters = _size(store, candidate.digest)
    return Measured(
        candidate.name,
        scores,
        digest=candidate.digest,
        rank=rank,
        parameters=parameters,
        parents=manifest.parents,
        drift=drift,
        routing=found.routing.get(candidate.name, {}),
        mixture=manifest.kind == "router",
    )


def _size(store: AdapterStore, digest: str) -> tuple[int, int]:
    """Largest rank and stored numbers; of a mixture the ranks of all experts together, and its router's numbers, too."""
    worn = wearable(store, digest)
    if not isinstance(worn, Mixture):
        return max(factors.rank for factors in worn.values()), worn.parameters
    ranks = [sum(factors.rank for factors in worn.factors(name) if factors is not None) for name in worn.shapes]
    router = sum(tensor.numel() for module in worn.router.tensors.values() for tensor in module.values())
    return max(ranks), router + sum(expert.parameters for expert in worn.experts)


def _costs(ledger: Ledger, batch_size: int) -> list[Cost]:
    return [
        Cost(
            name=entry.name,
            node=entry.node,
            seconds=entry.seconds,
            steps=int(entry.detail.get("steps", 0)),
            examples=int(entry.detail.get("steps", 0)) * batch_size,
            tokens=int(entry.detail.get("tokens", 0)),
        )
        for entry in ledger.of("accepted")
    ]


def _notes(ledger: Ledger) -> list[str]:
    """Who was left out and why; each once, however often the run was resumed."""
    told = [f"{entry.node} was left out of {entry.name}: {entry.reason}" for entry in ledger.of("quarantined")]
    return list(dict.fromkeys(told))
