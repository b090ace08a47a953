"""One run from its first message to its report: the stages of `server.federation`, then evaluation and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.clientapp import ClientApp
from rich.console import Group

from seedbed.common import basemodel
from seedbed.common.config import FederationConfig
from seedbed.common.datafiles import read_examples
from seedbed.common.errors import ModelError, SeedbedError
from seedbed.common.manifest import BaseIdentity
from seedbed.common.targets import target_shapes
from seedbed.server.assembly import Findings, assemble
from seedbed.server.candidates import resolve
from seedbed.server.contributions import state_of
from seedbed.server.describe import plan_tables
from seedbed.server.evaluation import results as records
from seedbed.server.evaluation.report import write_report
from seedbed.server.evaluation.results import Results
from seedbed.server.federation import Federation
from seedbed.server.inputs import EMBEDDED_TEST, Inputs, complete, find_inputs
from seedbed.server.ledger import Entry
from seedbed.server.measurement import Measurement
from seedbed.server.messenger import Messenger
from seedbed.server.observer import Observer, Silent
from seedbed.server.plan import Planner
from seedbed.server.rundir import RunDirectory
from seedbed.server.simulation import simulate, staff
from seedbed.server.workforce import Nobody, NoParticipantsError, Workforce


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that a run needs except its participants."""

    run: RunDirectory
    inputs: Inputs
    base: BaseIdentity
    shapes: Mapping[str, tuple[int, int]]
    observe: Observer
    command: str = ""

    def federation(self, workforce: Workforce | Messenger) -> Federation:
        return Federation(self.run, workforce, self.base, self.shapes, self.observe)


def conduct(setting: Setting, workforce: Workforce | Messenger) -> Results:
    """All stages, whatever is missing of them, down to the report.

    Raises:
        QuorumError: if a stage ends with too few results.
        SeedbedError: whatever else stops the run; it is in the ledger, too.
    """
    run = setting.run
    try:
        federation = setting.federation(workforce)
        candidates = federation.conduct()
        measurement = Measurement(run, setting.base, setting.inputs, setting.observe)
        scores, drifts = measurement.scores(candidates), measurement.drifts(candidates)
        found = Findings(scores, drifts, measurement.routing(candidates), federation.diagnostics)
        results, outcomes = assemble(run, setting.base, candidates, found, setting.command)
        write_report(results, outcomes, run.root)
    except SeedbedError as error:
        run.ledger.append(Entry(event="failed", reason=error.message))
        raise
    contributed = federation.stages.counted
    run.ledger.append(Entry(event="finished", detail={"contributed": contributed} if contributed else {}))
    return results


def settled(run: RunDirectory) -> bool:
    """Whether a run has finished, and nothing has been contributed or withdrawn since."""
    return (run.root / "results.json").exists() and run.ledger.contributed == state_of(run.root)


def run_simulation(
    config: FederationConfig,
    root: Path,
    client_app: ClientApp,
    observe: Observer,
    *,
    resume: bool = False,
    command: str = "",
) -> Results:
    """Simulate a whole federation into a run directory; see `conduct` for the errors.

    Participants are started only when some training is missing: a run that only lacks scores does without.
    """
    setting = open_setting(config, root, observe, resume=resume, command=command)
    try:
        if settled(setting.run):
            return records.load(setting.run.root)
        if _trained(setting):
            return conduct(setting, Nobody())
        return _with_participants(setting, client_app)
    finally:
        setting.run.close()


def open_setting(
    config: FederationConfig,
    root: Path,
    observe: Observer,
    *,
    resume: bool,
    command: str = "",
    training: bool = True,
) -> Setting:
    """Check everything that can be checked before anything is written, then open the run directory.

    Args:
        training: whether training data lie on this machine; those of a real federation are with its participants.
    """
    resolve(config)
    directory = basemodel.resolve(config.base)
    shapes = target_shapes(directory, config.lora)
    found = find_inputs(config, training=training)
    base = basemodel.identify(directory, config.base.model)
    run = RunDirectory.open(root, config, found.hashes, resume=resume)
    try:
        inputs = complete(found, config, run.root / "data", training=training)
    except BaseException:
        run.close()
        raise
    return Setting(run, inputs, base, shapes, observe, command)


def describe(config: FederationConfig) -> Group:
    """The plan of a run as tables; nothing is written, and a base model that is not at hand leaves sizes open."""
    resolve(config)
    try:
        shapes = target_shapes(basemodel.resolve(config.base), config.lora)
    except ModelError:
        shapes = None
    return plan_tables(config, shapes, _test_sizes(config))


def _test_sizes(config: FederationConfig) -> dict[str, int] | None:
    if config.tasks.data is None and config.base.model != "embedded":
        return None  # a plan can be looked at before the data are there
    found = find_inputs(config)
    if config.tasks.data is None:
        return dict.fromkeys((*config.tasks.experts, *config.tasks.held_out), EMBEDDED_TEST)
    return {name: len(read_examples(path)) for name, path in found.test.items()}


def _trained(setting: Setting) -> bool:
    """Whether the ledger holds all trainings."""
    try:
        replace(setting, observe=Silent()).federation(Nobody()).train()
    except NoParticipantsError:
        return False
    return True


def _with_participants(setting: Setting, client_app: ClientApp) -> Results:
    run = setting.run
    planner = Planner(run.config, setting.base)
    pooled, general = planner.needs_pooled_data, planner.needs_general_text
    nodes, workers = staff(run, setting.inputs, pooled=pooled, general=general)
    results: list[Results] = []
    simulate(run, client_app, nodes, workers, lambda workforce: results.append(conduct(setting, workforce)))
    return results[0]
