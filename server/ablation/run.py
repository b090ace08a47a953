"""Run an ablation: every distinct configuration and random seed once, over views of one run directory.

Whatever another cell has trained, merged or measured is found by what determines it and not done again. The ledger and the kept
scores are all the state there is, so a run that was ended in any way continues from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flwr.clientapp import ClientApp

from seedbed.common.errors import QuorumError, SeedbedError
from seedbed.common.tasks import EvalTask
from seedbed.common.versions import software_versions
from seedbed.server.ablation.artifacts import Graph
from seedbed.server.ablation.cells import FULL
from seedbed.server.ablation.forecast import score_keys
from seedbed.server.ablation.outcomes import Costs, Made, Scorer, measure, reason_of
from seedbed.server.ablation.prefetch import Gathered, missing, prefetch
from seedbed.server.ablation.study import Study, Unit, open_study
from seedbed.server.ablation.values import CellOutcome, Plan, SeedOutcome
from seedbed.server.assembly import lineage
from seedbed.server.evaluation.compare import Circumstances
from seedbed.server.inputs import Inputs
from seedbed.server.ledger import Entry
from seedbed.server.measurement import Measurement
from seedbed.server.observer import Observer, Within
from seedbed.server.plan import Planner
from seedbed.server.simulation import simulate, staff
from seedbed.server.workforce import Nobody, Workforce


@dataclass
class Trained:
    """What the federations gave."""

    made: list[tuple[int, Made]] = field(default_factory=list)
    """With the random seed."""
    failures: dict[tuple[str, int], SeedbedError] = field(default_factory=dict)
    """By cell and random seed."""


@dataclass(frozen=True, slots=True)
class Ablation:
    """What an ablation gave."""

    outcomes: list[CellOutcome]
    """The full method first, then the cells in the order of the plan."""
    tasks: list[EvalTask]
    """What was measured."""
    circumstances: Circumstances
    """With the lineage of every candidate, of all random seeds."""


def run_ablation(
    plan: Plan,
    root: Path,
    client_app: ClientApp,
    observe: Observer,
    *,
    seeds: Sequence[int] = (0,),
    resume: bool = False,
) -> Ablation:
    """Run a plan into a directory and return what was measured.

    Participants are started only when some training is missing.

    Args:
        seeds: random seeds; everything random is repeated with each.

    Raises:
        ConfigError: if the plan or its configuration makes no sense.
        ResumeError: if `resume` is set and the plan has changed.
        SeedbedError: if the full method fails with every random seed.
    """
    study, inputs = open_study(plan, root, observe, seeds, resume)
    try:
        trained = _train(study, inputs, client_app)
        scorer = Measurement(study.run, study.base, inputs, Within(observe, "evaluate"))
        outcomes = measured(study, trained, scorer)
        study.run.ledger.append(Entry(event="finished", name=plan.name))
        return Ablation(outcomes, scorer.tasks(), circumstances(study, outcomes))
    except SeedbedError as error:
        study.run.ledger.append(Entry(event="failed", reason=error.message))
        raise
    finally:
        study.run.close()


# -- training ---------------------------------------------------------------------------------------------------------


def trained_by(study: Study, workforce: Workforce, participants: int) -> Trained:
    """All federations, whatever is missing of them."""
    units = study.units()
    gathered = Gathered(workforce, participants)
    quiet = [study.federation(unit.config(), gathered) for unit in units]
    prefetch(quiet, gathered, study.observe)
    gathered.forget_failures()  # each gets a second chance, from the cell that needs it
    result = Trained()
    study.observe.stage("combine", len(units))
    for unit in units:
        _conduct(study, unit, gathered, result)
        study.observe.advance(unit.name)
    return result


def _conduct(study: Study, unit: Unit, workforce: Workforce, result: Trained) -> None:
    """All cells of a unit at once; if that fails each alone, so that only those fail that need what failed."""
    federation = study.federation(unit.config(), workforce)
    try:
        found = {made.name: made for made in federation.conduct(diagnose=False)}
        assert federation.parts is not None  # it was conducted
        result.made.append((unit.seed, Made(federation.run, unit.group.variants, federation.parts, found)))
    except Exception as error:
        if len(unit.group.variants) > 1:
            for single in unit.alone():
                _conduct(study, single, workforce, result)
            return
        name = unit.group.variants[0].cell.name
        result.failures[name, unit.seed] = _as_ours(error)
        study.observe.note(f"cell {name}, random seed {unit.seed}: {reason_of(error)}")


def _train(study: Study, inputs: Inputs, client_app: ClientApp) -> Trained:
    """With participants where some training is missing, else without."""
    units = study.units()
    planners = [Planner(unit.config(), study.base) for unit in units]
    if not missing([study.federation(unit.config(), Nobody()) for unit in units]):
        return trained_by(study, Nobody(), 0)
    run, pooled = study.run, any(planner.needs_pooled_data for planner in planners)
    general = any(planner.needs_general_text for planner in planners)
    nodes, workers = staff(run, inputs, pooled=pooled, general=general)
    results: list[Trained] = []
    simulate(run, client_app, nodes, workers, lambda workforce: results.append(trained_by(study, workforce, nodes)))
    return results[0]


# -- measuring --------------------------------------------------------------------------------------------------------


def measured(study: Study, trained: Trained, scorer: Scorer) -> list[CellOutcome]:
    """What every cell gave, in the order of the plan.

    Raises:
        SeedbedError: if the full method failed with every random seed.
    """
    outcomes: dict[str, dict[int, SeedOutcome]] = {variant.cell.name: {} for variant in study.variants}
    failures = dict(trained.failures)
    costs = Costs()
    study.observe.stage("evaluate", len(_scores_to_go(study)))
    for seed, made in trained.made:
        scorer = scorer.of(made.run)
        found, failed = measure(made, scorer, costs)
        for name, outcome in found.items():
            outcomes[name][seed] = outcome
            if outcome.digest is not None:
                study.run.publish(f"{_place(name)}.seed-{seed}", outcome.digest)
        for name, reason in failed.items():
            failures[name, seed] = QuorumError(reason)
            study.observe.note(f"cell {name}, random seed {seed}: {reason}")
    if not outcomes[FULL]:
        error = next(error for (name, _), error in failures.items() if name == FULL)
        # Not the error's own hint, which may be to lower the quorum: here all experts are needed.
        raise type(error)(
            f"the full method failed with every random seed: {error.message}", "Mend that and continue with --resume."
        )
    return [
        CellOutcome(
            cell=variant.cell,
            seeds=outcomes[variant.cell.name],
            failures={seed: error.message for (name, seed), error in failures.items() if name == variant.cell.name},
        )
        for variant in study.variants
    ]


def _scores_to_go(study: Study) -> set[str]:
    ledger = study.run.ledger
    known = Graph(
        {entry.key: entry.digest for entry in ledger.of("accepted")},
        {entry.key: entry.digest for entry in ledger.of("combined")},
    )
    keys = {key for unit in study.units() for key in score_keys(unit.group, unit.seed, study.base, known)}
    return keys - {path.stem for path in (study.run.root / "evaluations").glob("*.json")}


def circumstances(study: Study, outcomes: Sequence[CellOutcome]) -> Circumstances:
    """What an ablation stands on: base, configuration, versions, and the lineage of every candidate and random seed."""
    names: dict[str, str] = {}
    parts: dict[str, None] = {}
    for outcome in outcomes:
        for seed, one in outcome.seeds.items():
            if one.digest is not None:
                several = f", random seed {seed}" if len(study.seeds) > 1 else ""
                names.setdefault(one.digest, f"{outcome.cell.name}{several}")
            parts |= dict.fromkeys(one.of)
    nodes = lineage(study.run.store, study.run.ledger, (*names, *parts))
    return Circumstances(
        base=study.base,
        config=study.run.config.model_dump(mode="json"),
        versions=software_versions(),
        lineage=[node.model_copy(update={"name": names.get(node.digest, node.name)}) for node in nodes],
    )


def _as_ours(error: Exception) -> SeedbedError:
    return error if isinstance(error, SeedbedError) else QuorumError(reason_of(error))


def _place(cell: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._=,+-" else "-" for letter in cell)[:150]
