"""What a run would do, without doing it: `--dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table

from seedbed.common.batteries import expand
from seedbed.common.config import FederationConfig
from seedbed.common.jobs import Job
from seedbed.common.manifest import BaseIdentity
from seedbed.server.plan import Planner

Shapes = Mapping[str, tuple[int, int]]
_BYTES = 4
"""Adapters are trained in float32."""
_TRANSFER_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Of one number; int8's scales are one float32 for each rank's direction, which is little beside it."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage's jobs and what they cost."""

    name: str
    jobs: int
    steps: int
    """Optimizer steps of all jobs together."""
    examples: int
    """Examples seen by all jobs together, with repetition."""
    bytes_moved: int | None
    """Adapters fetched and handed in; none where the base model's shapes are not known."""


def adapter_bytes(shapes: Shapes, rank: int) -> int:
    """Size of one adapter's tensors."""
    return _BYTES * sum(rank * (rows + columns) for rows, columns in shapes.values())


def stages(config: FederationConfig, shapes: Shapes | None) -> list[StagePlan]:
    """Every training stage of a federation, by the same planner that makes its jobs."""
    planner = Planner(config, BaseIdentity(name=config.base.model))
    tasks = config.tasks.experts
    start = "parent" if config.seed.mode != "none" else None
    rows: list[tuple[str, list[Job]]] = []
    if config.seed.mode == "federated":
        for index in range(config.seed.rounds):
            rows.append((f"seed, round {index + 1}", planner.seed_round(index, "parent" if index else None, tasks)))
    elif config.seed.mode == "public":
        rows.append(("seed, public sample", [planner.public_seed()]))
    rows.append(("experts", planner.experts(start, tasks)))
    if planner.wants_group("tuned"):
        rows.append(("routing-tuned experts", planner.tuned(start, tasks)))
    if planner.wants_group("unseeded"):
        rows.append(("unseeded experts", planner.unseeded(tasks)))
    if planner.wants("joint"):
        rows.append(("joint adapter", [planner.joint(tasks)]))
    rows += [(job.name, [job]) for job in planner.molora(tasks)]
    rows += _routers(planner, tasks)
    size = None if shapes is None else Sizes.of(shapes, config)
    return [_stage(name, jobs, size) for name, jobs in _distinct(rows)]


def _routers(planner: Planner, tasks: Sequence[str]) -> list[tuple[str, list[Job]]]:
    """Stages of gates and learned routers."""
    rows: list[tuple[str, list[Job]]] = []
    for candidate in planner.candidates:
        experts = {task: f"{candidate.of}:{task}" for task in tasks}
        if candidate.trains_gates:
            rows.append((f"gates of {candidate.of}", planner.gates(candidate.of, experts)))
        elif candidate.trains_router:
            for index in range(planner.router_rounds):
                jobs = planner.routers(candidate, index, f"round-{index}" if index else None, experts)
                rows.append((f"router {candidate.name}, round {index + 1}", jobs))
    return rows


def _distinct(rows: Sequence[tuple[str, list[Job]]]) -> list[tuple[str, list[Job]]]:
    """What would be trained twice is counted once: gates of two candidates, or tuned experts without the terms of tuning."""
    seen: set[str] = set()
    kept = []
    for name, jobs in rows:
        new = [job for job in jobs if job.recipe not in seen]
        seen |= {job.recipe for job in new}
        kept += [(name, new)] if new else []
    return kept


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of what travels through the store."""

    adapter: int
    handed_in: int
    """The same in the form in which experts travel."""
    router_row: int
    """What one expert adds to a router."""

    @classmethod
    def of(cls, shapes: Shapes, config: FederationConfig) -> Sizes:
        rows = _BYTES * sum(inputs + 1 for _, inputs in shapes.values())
        whole = adapter_bytes(shapes, config.lora.rank)
        return cls(whole, whole // _BYTES * _TRANSFER_BYTES[config.training.transfer], rows)

    def moved(self, job: Job) -> int:
        """What one job fetches and hands in."""
        if job.kind == "gate":
            return self.handed_in + self.router_row
        if job.kind == "router":
            return len(job.experts) * (self.handed_in + self.router_row * (2 if job.parent else 1))
        if job.kind == "molora":
            return len(job.names) * (self.handed_in + self.router_row)
        return self.handed_in + (self.adapter if job.parent else 0)


def plan_tables(config: FederationConfig, shapes: Shapes | None, tests: Mapping[str, int] | None) -> Group:
    """The plan as tables for a terminal.

    Args:
        config: the federation.
        shapes: ``(out, in)`` of every adapted module; none where the base model is not at hand.
        tests: number of test examples by task; none where they are not at hand.
    """
    found = stages(config, shapes)
    training = Table(title=f"{config.name}: training", title_justify="left")
    for column in ("stage", "jobs", "steps", "examples", "moved"):
        training.add_column(column, justify="left" if column == "stage" else "right")
    for row in found:
        training.add_row(row.name, str(row.jobs), str(row.steps), str(row.examples), _size(row.bytes_moved))
    moved = None if shapes is None else sum(row.bytes_moved or 0 for row in found)
    training.add_section()
    training.add_row(
        "all",
        str(sum(row.jobs for row in found)),
        str(sum(row.steps for row in found)),
        str(sum(row.examples for row in found)),
        _size(moved),
    )
    return Group(training, _evaluation(config, tests), _sizes(config, shapes))


def _stage(name: str, jobs: list[Job], size: Sizes | None) -> StagePlan:
    steps = sum(job.training.steps for job in jobs)
    examples = sum(job.training.steps * job.training.batch_size for job in jobs)
    moved = None if size is None else sum(size.moved(job) for job in jobs)
    return StagePlan(name, len(jobs), steps, examples, moved)


def _evaluation(config: FederationConfig, tests: Mapping[str, int] | None) -> Table:
    tasks = (*config.tasks.experts, *config.tasks.held_out)
    measured = len(tasks) + len(expand(config.evaluation.extra))
    limit = config.evaluation.limit
    items = (
        None
        if tests is None or config.evaluation.extra
        else sum(min(tests[name], limit or tests[name]) for name in tasks)
    )
    table = Table(title="evaluation", title_justify="left")
    for column in ("candidate", "tasks", "items"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for name in config.combine.names:
        if name == "experts" and config.evaluation.expert_tasks == "own":
            own = None if tests is None else sum(min(tests[t], limit or tests[t]) for t in config.tasks.experts)
            table.add_row(
                f"{len(config.tasks.experts)} experts, each its own task", str(len(config.tasks.experts)), _count(own)
            )
        elif name == "tuned":
            own = None if tests is None else sum(min(tests[t], limit or tests[t]) for t in config.tasks.experts)
            count = len(config.tasks.experts)
            table.add_row(f"{count} tuned experts, each its own task", str(count), _count(own))
        elif name == "oracle":
            table.add_row("oracle, from the experts' scores", "", "")
        elif name == "experts":
            count = len(config.tasks.experts)
            table.add_row(f"{count} experts", f"{count} × {measured}", _count(None if items is None else count * items))
        else:
            table.add_row(name, str(measured), _count(items))
    return table


def _sizes(config: FederationConfig, shapes: Shapes | None) -> str:
    if shapes is None:
        return f"Base model {config.base.model} is not on this machine: sizes are not known."
    size = adapter_bytes(shapes, config.lora.rank)
    return (
        f"One adapter: rank {config.lora.rank} on {len(shapes)} modules, {_size(size)}; "
        f"the exact average of {len(config.tasks.experts)}: {_size(size * len(config.tasks.experts))}."
    )


def _count(value: int | None) -> str:
    return "?" if value is None else str(value)


def _size(value: int | None) -> str:
    if value is None:
        return "?"
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError("unreachable")
