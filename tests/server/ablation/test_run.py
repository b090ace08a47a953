"""Ablations over participants of a few lines: what is trained, how often, what a failure costs, what a resumed run redoes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from village import BASE, SHAPES, TASKS, Fault, Village, adapter, config, done, put

from seedbed.common.drift import TextDrift
from seedbed.common.errors import QuorumError
from seedbed.common.jobs import Job, JobResult
from seedbed.common.routing import Mixture, RoutingDiagnostics
from seedbed.common.storage import read_adapter
from seedbed.server.ablation.artifacts import Graph, candidate_digest, walk
from seedbed.server.ablation.cells import configured, expand, groups, whole_config
from seedbed.server.ablation.plan import parse_plan
from seedbed.server.ablation.run import Trained, circumstances, measured, trained_by
from seedbed.server.ablation.study import Study
from seedbed.server.ablation.values import CellOutcome, Plan
from seedbed.server.combination import Combination
from seedbed.server.evaluation.suite import TaskResult
from seedbed.server.measurement import wearable
from seedbed.server.observer import Silent
from seedbed.server.rundir import RunDirectory
from seedbed.server.workforce import Failure

HELD_OUT = ("x", "y")
ROWS: list[dict[str, Any]] = [
    {"part": "seed_expert", "action": "remove"},
    {"part": "routing", "action": "replace", "with": ["uniform", "arrow", "oracle", "base"]},
    {"part": "options.task_scale", "action": "replace", "with": [2.0]},
    {"part": "kl_loss", "action": "remove", "label": "unused by the full method"},
    {"part": "experts", "action": "replace", "with": [2]},
]


def make_plan(root: Path, rows: Sequence[Mapping[str, Any]] = ROWS, full: str = "average", **values: Any) -> Plan:
    settings = config(combine={"candidates": ["base", "experts", "average", "tuned", "ties"]}, **values)
    settings = settings.model_copy(update={"tasks": settings.tasks.model_copy(update={"held_out": HELD_OUT})})
    root.mkdir(exist_ok=True)
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return parse_plan({"name": "test", "config": str(path), "full": full, "rows": list(rows)})


def study(plan: Plan, root: Path, seeds: Sequence[int] = (0,), resume: bool = False) -> Study:
    variants = expand(plan)
    run = RunDirectory.open(root / "run", whole_config(plan, variants), {}, resume=resume)
    return Study(variants, seeds, run, BASE, lambda _: SHAPES, Silent())


class Judge:
    """Scores a model by the one number that it is made of: the share of ten examples that are right is a hundredth of it."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.asked: list[str] = []

    def of(self, run: RunDirectory) -> Judge:
        other = Judge(run)
        other.asked = self.asked
        return other

    def scores(self, candidates: Sequence[Combination]) -> dict[str, list[TaskResult]]:
        self.asked += [candidate.name for candidate in candidates]
        own_only = self.run.config.evaluation.expert_tasks == "own"
        tasks = (*TASKS, *HELD_OUT)
        return {
            one.name: [
                self._score(one, task, index)
                for index, task in enumerate(tasks)
                if not (own_only and one.task) or task == one.task
            ]
            for one in candidates
        }

    def drifts(self, candidates: Sequence[Combination]) -> dict[str, TextDrift]:
        return {}

    def routing(self, candidates: Sequence[Combination]) -> dict[str, dict[str, RoutingDiagnostics]]:
        return {}

    def _score(self, one: Combination, task: str, index: int) -> TaskResult:
        value = (self.number(one.digest) + index) / 100
        return TaskResult(
            task=task, metric="acc", value=value, n=2, stderr=0.0, held_in=True, outcomes=(value - 0.01, value + 0.01)
        )

    def number(self, digest: str | None) -> float:
        if digest is None:
            return 0.0
        worn = wearable(self.run.store, digest)
        experts = worn.experts if isinstance(worn, Mixture) else (worn,)
        return sum(float(expert["layer"].delta()[0, 0]) for expert in experts) / len(experts)


def conduct(found: Study, village: Village) -> tuple[Trained, list[CellOutcome]]:
    trained = trained_by(found, village, len(TASKS) + 1)
    return trained, measured(found, trained, Judge(found.run))


def accepted(found: Study) -> Counter[str]:
    return Counter(entry.key for entry in found.run.ledger.of("accepted"))


def needed(plan: Plan, seeds: Sequence[int] = (0,), known: Study | None = None) -> Graph:
    ledger = known.run.ledger if known else None
    graph = Graph(
        {entry.key: entry.digest for entry in ledger.of("accepted")} if ledger else {},
        {entry.key: entry.digest for entry in ledger.of("combined")} if ledger else {},
    )
    for seed in seeds:
        for group in groups(expand(plan)):
            walk(configured(group.config, seed), BASE, graph)
    return graph


def test_as_many_trainings_as_the_cells_distinctly_need(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    found = study(plan, tmp_path)
    village = Village(found.run.root / "store")
    conduct(found, village)
    # Seed and experts of the full method, experts without a seed, and the seed of two experts with those two: 4+4+4+2.
    # The seeds of two clients are the same trainings as in the full method, merged differently.
    assert len(village.asked) == len(accepted(found)) == 4 + 4 + 4 + 2
    assert set(accepted(found).values()) == {1}
    assert len(needed(plan).jobs) == 14, "what a dry run counts beforehand is what is trained"
    assert set(needed(plan, known=found).jobs) == set(accepted(found))


def test_every_random_seed_repeats_every_training(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    found = study(plan, tmp_path, seeds=(0, 1, 2))
    conduct(found, Village(found.run.root / "store"))
    assert len(accepted(found)) == 3 * 14 == len(needed(plan, (0, 1, 2)).jobs)


def test_cells_give_what_their_parts_say(tmp_path: Path) -> None:
    found = study(make_plan(tmp_path), tmp_path)
    _, outcomes = conduct(found, Village(found.run.root / "store"))
    seeds = {outcome.cell.name: outcome.seeds[0] for outcome in outcomes}
    first = {name: seed.scores[0].value for name, seed in seeds.items()}
    assert first == pytest.approx(
        {
            "full": 0.07,  # 2 seed steps, 3 steps, and twice the length of a task's name
            "seed.mode=none": 0.04,
            "candidate=uniform": 0.07,
            "candidate=arrow": 0.07,
            "candidate=oracle": 0.07,
            "candidate=base": 0.0,
            "options.task_scale=2.0": 0.11,  # the seed's 3 and twice the tasks' own 4
            "routing_tuning.kl_weight=0.0": 0.07,
            "tasks.experts=2": 0.07,
        }
    )
    assert seeds["full"].own == pytest.approx({task: (7 + index) / 100 for index, task in enumerate(TASKS)})
    assert seeds["full"].seen_by_seed == TASKS
    assert seeds["seed.mode=none"].seen_by_seed == ()
    assert seeds["tasks.experts=2"].seen_by_seed == ("a", "b")
    assert [score.task for score in seeds["tasks.experts=2"].scores if score.held_in] == ["a", "b"]
    assert [score.task for score in seeds["full"].scores if not score.held_in] == list(HELD_OUT)
    assert (seeds["full"].trainings, seeds["seed.mode=none"].trainings, seeds["candidate=base"].trainings) == (8, 4, 0)


def test_the_cost_of_a_cell_is_that_of_its_lineage(tmp_path: Path) -> None:
    found = study(make_plan(tmp_path, [ROWS[0]]), tmp_path)

    def slow(job: Job, store: Path) -> JobResult:
        answer = Village(store)._train(job)
        return answer.model_copy(update={"seconds": 2.0})

    names = [f"expert:{task}" for task in TASKS]
    _, (full, unseeded) = conduct(found, Village(found.run.root / "store", dict.fromkeys(names, slow)))
    assert full.seeds[0].seconds == unseeded.seeds[0].seconds == 4 * 2
    # Seeded experts fetch the seed and hand in themselves; seeds and unseeded experts are only handed in.
    assert full.seeds[0].bytes_moved == pytest.approx(3 * unseeded.seeds[0].bytes_moved, rel=0.05)


def test_cells_of_one_configuration_share_one_federation(tmp_path: Path) -> None:
    variants = expand(make_plan(tmp_path))
    found = groups(variants)
    assert [len(group.variants) for group in found] == [6, 1, 1, 1]
    assert list(found[0].config.combine.names) == [
        "average",
        "uniform",
        "arrow",
        "experts",
        "oracle",
        "base",
        "average.task_scale-2.0",
    ]


def test_permuted_rows_give_the_same_results(tmp_path: Path) -> None:
    for place, rows in (("one", ROWS), ("two", ROWS[::-1])):
        (tmp_path / place).mkdir()
        found = study(make_plan(tmp_path / place, rows), tmp_path / place)
        conduct(found, Village(found.run.root / "store"))
    one, two = (
        {
            outcome.cell.name: outcome.seeds[0].model_dump(exclude={"seconds"})
            for outcome in _again(tmp_path / place, rows)
        }
        for place, rows in (("one", ROWS), ("two", ROWS[::-1]))
    )
    assert one == two


def _again(root: Path, rows: Sequence[Mapping[str, Any]]) -> list[CellOutcome]:
    plan = make_plan(root, rows)
    (root / "run/.lock").unlink()
    found = study(plan, root, resume=True)
    village = Village(found.run.root / "store")
    _, outcomes = conduct(found, village)
    assert village.asked == [], "a finished ablation trains nothing"
    return outcomes


@pytest.mark.parametrize("after", [1, 5, 9, 13])
def test_ended_anywhere_it_resumes_and_trains_only_what_is_missing(after: int, tmp_path: Path) -> None:
    class Ended(BaseException):
        pass

    plan = make_plan(tmp_path)
    found = study(plan, tmp_path)

    class Ending(Village):
        def _train(self, job: Job) -> JobResult:
            if len(self.asked) > after:
                raise Ended
            return super()._train(job)

    with pytest.raises(Ended):
        conduct(found, Ending(found.run.root / "store"))
    found.run.close()
    again = study(plan, tmp_path, resume=True)
    rest = Village(again.run.root / "store")
    conduct(again, rest)
    assert len(rest.asked) == 14 - after
    assert set(accepted(again).values()) == {1}


def failing(job: Job, store: Path) -> JobResult | Failure | None:
    return Failure(0, "out of memory")


def test_a_cell_that_fails_says_why_and_does_not_stop_the_others(tmp_path: Path) -> None:
    rows = [{"part": "candidate", "action": "replace", "with": ["molora", "joint", "phatgoose"]}]
    found = study(make_plan(tmp_path, rows), tmp_path)
    faults: dict[str, Fault] = {"molora": failing, "gate:b": failing}
    village = Village(found.run.root / "store", faults)
    _, outcomes = conduct(found, village)
    assert {one.cell.name: list(one.seeds) for one in outcomes} == {
        "full": [0],
        "candidate=molora": [],
        "candidate=joint": [0],
        "candidate=phatgoose": [],
    }
    reasons = {one.cell.name: one.failures for one in outcomes if one.failures}
    assert set(reasons) == {"candidate=molora", "candidate=phatgoose"}
    assert "out of memory" in reasons["candidate=molora"][0]
    assert "stage 'gates' has 3 of 4 results" in reasons["candidate=phatgoose"][0]
    assert Counter(village.asked)["molora"] == 2, "one more try, not one for every cell"


def test_a_configuration_of_which_one_expert_fails_is_not_compared_with_the_others(tmp_path: Path) -> None:
    found = study(make_plan(tmp_path, [ROWS[0]]), tmp_path)

    def without_seed(job: Job, store: Path) -> JobResult | Failure | None:
        return failing(job, store) if job.parent is None else None

    _, (full, unseeded) = conduct(found, Village(found.run.root / "store", {"expert:c": without_seed}))
    assert list(full.seeds) == [0]
    assert unseeded.seeds == {}
    assert "3 of 4" in unseeded.failures[0]


def test_if_the_full_method_fails_with_every_seed_so_does_the_plan(tmp_path: Path) -> None:
    found = study(make_plan(tmp_path), tmp_path, seeds=(0, 1))
    with pytest.raises(QuorumError, match=r"full method failed with every random seed: .*out of memory"):
        conduct(found, Village(found.run.root / "store", {"expert:a": failing}))


def test_a_participant_that_is_refused_fails_only_the_cells_that_need_it(tmp_path: Path) -> None:
    rows = [{"part": "tasks.experts", "action": "replace", "with": [list(TASKS)]}]
    plan = make_plan(tmp_path, rows, tasks={"experts": ["a", "b"]})
    found = study(plan, tmp_path)
    village = Village(found.run.root / "store")
    village.hellos[3] = Failure(3, "did not answer within 1 s")
    _, (full, four) = conduct(found, village)
    assert list(full.seeds) == [0]
    assert "stage 'hello' has 3 of 4 results" in four.failures[0]


def test_if_the_full_method_fails_with_one_seed_the_others_count(tmp_path: Path) -> None:
    found = study(make_plan(tmp_path, [ROWS[0]]), tmp_path, seeds=(0, 1))

    def first_only(job: Job, store: Path) -> JobResult | Failure | None:
        return failing(job, store) if job.data_seed < 10_000 else None

    _, (full, _) = conduct(found, Village(found.run.root / "store", {"expert:a": first_only}))
    assert (list(full.seeds), list(full.failures)) == ([1], [0])


def test_references_are_computed_from_experts_alone(tmp_path: Path) -> None:
    rows = [{"part": "candidate", "action": "replace", "with": ["experts", "oracle"]}]
    found = study(make_plan(tmp_path, rows), tmp_path)
    strong: Fault = lambda job, store: done(job, put(store, job, adapter(15.0)))  # noqa: E731
    _, (_, alone, oracle) = conduct(found, Village(found.run.root / "store", {"expert:a": strong}))
    values = [{score.task: score.value for score in cell.seeds[0].scores} for cell in (alone, oracle)]
    # Own tasks by their own experts (15, 7, 7, 7), others by their mean of 9, or by the best of them.
    assert values[0] == pytest.approx({"a": 0.15, "b": 0.08, "c": 0.09, "d": 0.1, "x": 0.13, "y": 0.14})
    assert values[1] == pytest.approx({"a": 0.15, "b": 0.08, "c": 0.09, "d": 0.1, "x": 0.19, "y": 0.2})
    assert (alone.seeds[0].digest, alone.seeds[0].trainings) == (None, 8)


def test_the_lineage_reaches_from_every_candidate_of_every_random_seed_to_its_first_adapters(tmp_path: Path) -> None:
    rows = [{"part": "candidate", "action": "replace", "with": ["individual", "base"]}]
    found = study(make_plan(tmp_path, rows), tmp_path, seeds=(0, 1))
    _, outcomes = conduct(found, Village(found.run.root / "store"))
    nodes = circumstances(found, outcomes).lineage
    # For each random seed: four seeds and their mean, four experts and their average, four experts of their own.
    assert Counter(node.kind for node in nodes) == {"seed": 10, "expert": 16, "merge": 2}
    assert {node.name for node in nodes if node.kind == "merge"} == {"full, random seed 0", "full, random seed 1"}
    trained = {entry.digest for entry in found.run.ledger.of("accepted")}
    assert trained <= {node.digest for node in nodes}


def test_lora_per_task_stands_on_unseeded_experts(tmp_path: Path) -> None:
    rows = [{"part": "candidate", "action": "replace", "with": ["individual", "unseeded"]}]
    found = study(make_plan(tmp_path, rows), tmp_path)
    village = Village(found.run.root / "store")
    _, (full, individual, unseeded) = conduct(found, village)
    assert len(village.asked) == 12, "both stand on the same four experts"
    # Three steps, the seed's two, and the length of a name.
    assert {score.task: score.value for score in individual.seeds[0].scores} == pytest.approx(
        {task: (6 + index) / 100 for index, task in enumerate((*TASKS, *HELD_OUT))}
    )
    assert individual.seeds[0].own == unseeded.seeds[0].own != full.seeds[0].own
    assert individual.seeds[0].seen_by_seed == ()


def test_all_that_can_be_trained_is_given_out_together(tmp_path: Path) -> None:
    class Counting(Village):
        batches: list[int] = []

        def perform(self, jobs: Any, deadline: float, on_answer: Any) -> None:
            self.batches.append(len(jobs))
            super().perform(jobs, deadline, on_answer)

    rows = [*ROWS, {"part": "routing", "action": "replace", "with": ["learned", "phatgoose"], "label": "trained"}]
    found = study(make_plan(tmp_path, rows), tmp_path, seeds=(0, 1))
    village = Counting(found.run.root / "store")
    conduct(found, village)
    # Of each random seed: 4 of the seed and 4 experts without; then 4 + 2 experts; then 4 gates and 4 routers; then 4 routers.
    assert village.batches == [16, 12, 16, 8]


def test_the_same_random_seed_gives_the_same_numbers_and_another_one_others(tmp_path: Path) -> None:
    rows = [
        {"part": "merge_rule", "action": "replace", "with": ["random", "dare_linear", "iterative"]},
        {"part": "order", "action": "replace", "with": [1]},
    ]
    values = []
    for place, seeds in (("one", (0, 1)), ("two", (1, 0))):
        found = study(make_plan(tmp_path / place, rows), tmp_path / place, seeds=seeds)
        _, outcomes = conduct(found, Village(found.run.root / "store"))
        values.append({one.cell.name: {seed: one.seeds[seed].digest for seed in (0, 1)} for one in outcomes})
    assert values[0] == values[1]
    judge = Judge(found.run)
    random = [judge.number(values[0]["method=random"][seed]) for seed in (0, 1)]
    assert random[0] != random[1], "random directions are drawn anew"


def test_every_candidate_is_known_by_its_digest_before_it_is_looked_at(tmp_path: Path) -> None:
    routed = ["uniform", "arrow", "learned", "phatgoose", "molora", "joint", "seed", "base", "unseeded"]
    slow = {"name": "slow", "router": "sequence", "over": "learned"}
    rows = [
        *ROWS[:1],
        {"part": "candidate", "action": "replace", "with": [*routed, slow]},
        {"part": "merge_rule", "action": "replace", "with": ["random", "iterative"]},
        {"part": "order", "action": "replace", "with": [1]},
        {"part": "include_seed", "action": "replace", "with": [True]},
    ]
    found = study(make_plan(tmp_path, rows), tmp_path, seeds=(0, 1))
    _, outcomes = conduct(found, Village(found.run.root / "store"))
    ledger = found.run.ledger
    graph = Graph(
        {entry.key: entry.digest for entry in ledger.of("accepted")},
        {entry.key: entry.digest for entry in ledger.of("combined")},
    )
    for variant, outcome in zip(found.variants, outcomes, strict=True):
        for seed in (0, 1):
            parts = walk(configured(variant.config, seed), BASE, graph)
            assert candidate_digest(variant.candidate, parts, seed, graph) == outcome.seeds[seed].digest, (
                variant.cell.name
            )


def test_published_adapters_are_those_of_the_cells(tmp_path: Path) -> None:
    found = study(make_plan(tmp_path, [ROWS[0]]), tmp_path)
    _, outcomes = conduct(found, Village(found.run.root / "store"))
    for outcome in outcomes:
        place = found.run.adapters / f"{outcome.cell.name}.seed-0"
        worn = wearable(found.run.store, str(outcome.seeds[0].digest))
        assert not isinstance(worn, Mixture)
        assert torch.equal(read_adapter(place)[0]["layer"].delta(), worn["layer"].delta())
