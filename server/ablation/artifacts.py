"""The graph of what a configuration needs: trainings, merges and routers, by what determines each one; pure.

Digests of adapters that are not there yet stand for their recipes (`?` and a hash), so equal artifacts of several cells are
one, whether they exist or not. The same walk tells what a plan will cost and what can be trained now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from seedbed.common.config import FederationConfig, Group
from seedbed.common.jobs import Job
from seedbed.common.manifest import BaseIdentity
from seedbed.server.candidates import Candidate, needs_seed, token_level
from seedbed.server.combination import Parts, in_order, merge_options, merge_recipe
from seedbed.server.mixtures import describe_router
from seedbed.server.plan import Planner, molora_job


def is_planned(digest: str) -> bool:
    """Whether a digest stands for something that is not there yet."""
    return digest.startswith("?")


@dataclass
class Graph:
    """Artifacts of any number of configurations.

    Args:
        trained: recipe -> digest of every training that was done.
        combined: recipe -> digest of every merge and router that was made.
    """

    trained: Mapping[str, str] = field(default_factory=dict)
    combined: Mapping[str, str] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    """Every training, by recipe, in the order in which they can be done."""
    made: dict[str, str] = field(default_factory=dict)
    """Kind of every merge and router, by recipe."""

    def train(self, job: Job) -> str:
        self.jobs.setdefault(job.recipe, job)
        return self.trained.get(job.recipe) or f"?{job.recipe}"

    def combine(self, recipe: str, kind: str) -> str:
        self.made[recipe] = kind
        return self.combined.get(recipe) or f"?{recipe}"

    def given_seed(self) -> str:
        return "?given"

    def merge_seed(self, parents: Sequence[str], round_index: int) -> str:
        return self.combine(merge_recipe("factor_mean", parents, kind="seed"), "mean of the seed")

    def mean_router(self, candidate: Candidate, index: int, experts: Mapping[str, str], done: Sequence[str]) -> str:
        return self.routed(token_level(candidate), experts, {"mean": list(done), "round": index})

    def routed(self, settings: Any, experts: Mapping[str, str], made_of: Mapping[str, Any]) -> str:
        return self.combine(describe_router(settings, experts, made_of)[1], "router")

    @property
    def missing(self) -> list[Job]:
        return [job for recipe, job in self.jobs.items() if recipe not in self.trained]

    @property
    def ready(self) -> list[Job]:
        """What is missing and has everything that it starts from."""
        return [job for job in self.missing if not any(map(is_planned, (*job.experts, job.parent or "")))]


def walk(config: FederationConfig, base: BaseIdentity, graph: Graph) -> Parts:
    """Go through all stages of a federation in which everybody succeeds, as `Federation.conduct` does."""
    return _Walk(config, base, graph).parts()


class _Walk:
    def __init__(self, config: FederationConfig, base: BaseIdentity, graph: Graph) -> None:
        self.planner = Planner(config, base)
        self.config = config
        self.tasks = config.tasks.experts
        self.graph = graph

    def parts(self) -> Parts:
        plan, tasks = self.planner, self.tasks
        seed = self._seed()
        groups: dict[Group, dict[str, str]] = {"experts": self._all(plan.experts(seed, tasks))}
        alone = {job.name: self.graph.train(job) for job in plan.molora(tasks)}
        if plan.wants("joint"):
            alone["joint"] = self.graph.train(plan.joint(tasks))
        if plan.wants_group("unseeded"):
            groups["unseeded"] = self._all(plan.unseeded(tasks))
        if plan.wants_group("tuned"):
            groups["tuned"] = self._all(plan.tuned(seed, tasks))
        return Parts(seed, groups, alone, self._routers(groups))

    def _all(self, jobs: Sequence[Job]) -> dict[str, str]:
        return {job.tasks[0]: self.graph.train(job) for job in jobs}

    def _seed(self) -> str | None:
        settings = self.config.seed
        if settings.mode == "none":
            return None
        if settings.mode == "given":
            return self.graph.given_seed()
        if settings.mode == "public":
            return self.graph.train(self.planner.public_seed())
        parent: str | None = None
        for index in range(settings.rounds):
            done = [self.graph.train(job) for job in self.planner.seed_round(index, parent, self.tasks)]
            parent = self.graph.merge_seed(done, index)
        return parent

    def _routers(self, groups: Mapping[Group, Mapping[str, str]]) -> dict[str, str]:
        found: dict[str, str] = {}
        for candidate in self.planner.candidates:
            experts = groups.get(candidate.of, {})
            if candidate.trains_gates:
                gates = self._all(self.planner.gates(candidate.of, experts))
                made_of = {"gates": [gates[task] for task in experts]}
                found[candidate.name] = self.graph.routed(token_level(candidate), experts, made_of)
            elif candidate.trains_router:
                found[candidate.name] = self._learned(candidate, experts)
        return found

    def _learned(self, candidate: Candidate, experts: Mapping[str, str]) -> str:
        parent: str | None = None
        for index in range(self.planner.router_rounds):
            jobs = self.planner.routers(candidate, index, parent, experts)
            parent = self.graph.mean_router(candidate, index, experts, [self.graph.train(job) for job in jobs])
        assert parent is not None  # there is at least one round
        return parent


def candidate_digest(candidate: Candidate, parts: Parts, random_seed: int, graph: Graph) -> str | None:
    """Digest of a candidate that is one model; none is the base model. `experts` and `oracle` are none."""
    group = parts.groups.get(candidate.of, {})
    if candidate.role == "merge":
        assert candidate.method is not None
        assert candidate.options is not None
        seed = parts.seed if needs_seed(candidate.options) else None
        options = merge_options(candidate, random_seed)
        recipe = merge_recipe(candidate.method.name, in_order(candidate, list(group.values())), options, seed)
        return graph.combine(recipe, "merge")
    if candidate.role == "mixture":
        assert candidate.routing is not None
        if candidate.routing.kind == "molora":
            return parts.alone[molora_job(candidate)]
        trained = parts.routers.get(candidate.name)
        if trained is not None and candidate.routing.of is None:
            return trained
        return graph.routed(candidate.routing, group, {"averages": trained} if trained is not None else {})
    return {"seed": parts.seed, "joint": parts.alone.get("joint")}.get(candidate.role)
