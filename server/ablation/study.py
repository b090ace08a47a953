"""An ablation with everything that it needs except participants and a scorer: its cells, a run directory, data, base model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from seedbed.common import basemodel
from seedbed.common.config import FederationConfig
from seedbed.common.errors import ResumeError
from seedbed.common.manifest import BaseIdentity
from seedbed.common.targets import target_shapes
from seedbed.server.ablation.cells import Group, Variant, configured, expand, groups, whole_config, with_candidates
from seedbed.server.ablation.plan import PLAN, keep_plan, kept_plan, refuse_change
from seedbed.server.ablation.values import Plan
from seedbed.server.admission import Shapes
from seedbed.server.federation import Federation
from seedbed.server.inputs import Inputs, complete, find_inputs
from seedbed.server.observer import Observer, Within
from seedbed.server.rundir import RunDirectory
from seedbed.server.workforce import Workforce


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
    """Check everything that can be checked before anything is written, then open the run directory.

    A run that is continued may have other rows than before: whatever the old ones have made, the new ones find.
    """
    variants = expand(plan)
    config = whole_config(plan, variants)
    found = groups(variants)
    directory = basemodel.resolve(config.base)
    shapes = {_lora(group.config): target_shapes(directory, group.config.lora) for group in found}
    inputs = [find_inputs(group.config) for group in found]
    base = basemodel.identify(directory, config.base.model)
    before = kept_plan(root)
    if before is not None and resume:
        refuse_change(before, plan, str(root))
    hashes = {name: value for one in inputs for name, value in one.hashes.items()}
    run = RunDirectory.open(root, config, hashes, resume=resume)
    try:
        if before is None and next(run.ledger.of("accepted", "combined"), None) is not None:
            raise ResumeError(f"{root} is a run of another kind: it has no {PLAN}", "Name another --out.")
        keep_plan(run.root, plan)
        ready = [complete(one, group.config, run.root / "data") for one, group in zip(inputs, found, strict=True)]
    except BaseException:
        run.close()
        raise
    study = Study(variants, seeds, run, base, lambda config: shapes[_lora(config)], observe)
    return study, _union(ready)


def _lora(config: FederationConfig) -> str:
    return json.dumps(config.lora.model_dump(mode="json"), sort_keys=True)


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
