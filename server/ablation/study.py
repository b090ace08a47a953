"""An ablation with everything that it needs except participants and a scorer: its cells, a run directory, data, base model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from seedbed.common import basemodel
from seedbed.common.config import FederationConfig
from seedbed.common.errors import ResumeError
from seedbed.common.files import atomic_write
from seedbed.common.manifest import BaseIdentity
from seedbed.common.targets import target_shapes
from seedbed.server.ablation.cells import Group, Variant, configured, expand, groups, whole_config, with_candidates
from seedbed.server.ablation.plan import refuse_change
from seedbed.server.ablation.values import Plan
from seedbed.server.admission import Shapes
from seedbed.server.federation import Federation
from seedbed.server.inputs import Inputs, find_inputs, write_embedded
from seedbed.server.observer import Observer, Within
from seedbed.server.rundir import RunDirectory
from seedbed.server.workforce import Workforce

PLAN = "plan.json"


@dataclass(frozen=True, slots=True)
class Study:
    """An ablation with everything that it needs except participants and a scorer."""

    variants: Sequence[Variant]
    seeds: Sequence[int]
    run: RunDirectory
    base: BaseIdentity
    shapes: Callable[[FederationConfig], Shapes]
    observe: Observer

    def units(self) -> list[Unit]:
        """One for each random seed and configuration."""
        return [Unit(seed, group) for seed in self.seeds for group in groups(self.variants)]

    def federation(self, config: FederationConfig, workforce: Workforce) -> Federation:
        return Federation(self.run.view(config), workforce, self.base, self.shapes(config), Within(self.observe))


@dataclass(frozen=True, slots=True)
class Unit:
    """A configuration with a random seed."""

    seed: int
    group: Group

    @property
    def name(self) -> str:
        return f"{self.group.variants[0].cell.name}, random seed {self.seed}"

    def config(self) -> FederationConfig:
        return configured(self.group.config, self.seed)

    def alone(self) -> Iterator[Unit]:
        """Each cell by itself."""
        for variant in self.group.variants:
            yield Unit(self.seed, Group(with_candidates([variant]), (variant,)))


def open_study(plan: Plan, root: Path, observe: Observer, seeds: Sequence[int], resume: bool) -> tuple[Study, Inputs]:
    """Check everything that can be checked before anything is written, then open the run directory."""
    variants = expand(plan)
    config = whole_config(plan, variants)
    found = groups(variants)
    directory = basemodel.resolve(config.base)
    shapes = {_lora(group.config): target_shapes(directory, group.config.lora) for group in found}
    inputs = [find_inputs(group.config) for group in found]
    ready = [one for one in inputs if one is not None]
    base = basemodel.identify(directory, config.base.model)
    before = _plan_of(root)
    if before is not None and resume:
        refuse_change(before, plan, str(root))
    hashes = {name: value for one in ready for name, value in one.hashes.items()}
    run = RunDirectory.open(root, config, hashes, resume=resume)
    try:
        if before is None:
            if next(run.ledger.of("accepted", "combined"), None) is not None:
                raise ResumeError(f"{root} is a run of another kind: it has no {PLAN}", "Name another --out.")
            atomic_write(run.root / PLAN, (plan.model_dump_json(indent=2) + "\n").encode())
        if not ready:
            ready = [write_embedded(group.config, run.root / "data") for group in found]
    except BaseException:
        run.close()
        raise
    study = Study(variants, seeds, run, base, lambda config: shapes[_lora(config)], observe)
    return study, _union(ready)


def _lora(config: FederationConfig) -> str:
    return json.dumps(config.lora.model_dump(mode="json"), sort_keys=True)


def _plan_of(root: Path) -> Plan | None:
    """The plan that a directory was started with."""
    path = root / PLAN
    if not path.exists():
        return None
    try:
        return Plan.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise ResumeError(f"{path} cannot be read", "Restore it, or name another --out.") from None


def _union(inputs: Sequence[Inputs]) -> Inputs:
    """Where the examples of all configurations lie."""
    merged = inputs[0]
    for one in inputs[1:]:
        merged = replace(
            merged,
            train={**one.train, **merged.train},
            test={**one.test, **merged.test},
            hashes={**one.hashes, **merged.hashes},
            general=merged.general or one.general,
        )
    return merged
