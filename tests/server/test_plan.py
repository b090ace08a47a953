"""Plans compare like with like."""

from __future__ import annotations

from typing import Any

from seedbed.common.config_file import parse_config
from seedbed.common.manifest import BaseIdentity
from seedbed.server.describe import adapter_bytes, stages
from seedbed.server.plan import Planner

BASE = BaseIdentity(name="tiny", digest="0" * 64)


def planner(**seed: Any) -> Planner:
    values = {
        "tasks": {"experts": ["a", "b"]},
        "seed": {"steps": 5, "rounds": 2, **seed},
        "training": {"steps": 20, "batch_size": 4},
    }
    return Planner(parse_config(values), BASE)


def test_an_unseeded_expert_trains_as_long_as_its_seeded_twin_with_its_share_of_the_seed() -> None:
    plan = planner()
    seeded = plan.experts("digest", ["a", "b"])[0].training.steps
    rounds = sum(plan.seed_round(index, None, ["a"])[0].training.steps for index in range(2))
    assert seeded + rounds == 30
    assert plan.unseeded(["a", "b"])[0].training.steps == 30


def test_the_joint_adapter_takes_as_many_steps_as_all_clients_together() -> None:
    assert planner().joint(["a", "b"]).training.steps == 2 * (20 + 2 * 5)


def test_seed_rounds_share_an_initialization_and_differ_in_the_order_of_their_data() -> None:
    first, second = planner().seed_round(0, None, ["a", "b"]), planner().seed_round(1, "digest", ["a", "b"])
    assert len({job.init_seed for job in first}) == 1
    assert first[0].data_seed != second[0].data_seed
    assert first[0].sample_seed == second[0].sample_seed, "all rounds together see one fraction of the data"
    assert {job.fraction for job in first + second} == {0.1}


def test_unseeded_experts_have_initializations_of_their_own() -> None:
    plan = planner()
    seeds = {job.init_seed for job in plan.unseeded(["a", "b"])}
    assert len(seeds) == 2
    assert plan.joint(["a"]).init_seed not in seeds


def test_an_initialization_does_not_depend_on_who_else_is_still_there() -> None:
    both = {job.name: job.recipe for job in planner().unseeded(["a", "b"])}
    (alone,) = planner().unseeded(["b"])
    assert both["unseeded:b"] == alone.recipe


def test_equal_jobs_have_equal_recipes_whatever_they_are_called() -> None:
    job = planner().experts("digest", ["a"])[0]
    assert job.recipe == job.model_copy(update={"name": "other"}).recipe
    assert job.recipe != job.model_copy(update={"parent": "another"}).recipe
    assert job.recipe != job.model_copy(update={"data_seed": 7}).recipe


def test_a_run_with_another_random_seed_shares_no_stream_with_its_neighbour() -> None:
    def seeds(random_seed: int) -> set[int]:
        values = {"tasks": {"experts": ["a", "b"]}, "run": {"random_seed": random_seed}}
        plan = Planner(parse_config(values), BASE)
        jobs = [*plan.unseeded(["a", "b"]), *plan.seed_round(0, None, ["a"]), plan.joint(["a"])]
        return {job.init_seed for job in jobs} | {job.data_seed for job in jobs}

    assert not seeds(0) & seeds(1)


def test_the_described_plan_counts_the_planners_own_jobs() -> None:
    config = planner().config
    shapes = {"layer": (3, 5)}
    size = adapter_bytes(shapes, rank=8)
    assert size == 4 * 8 * (3 + 5)
    found = {stage.name: stage for stage in stages(config, shapes)}
    assert found["seed, round 1"].bytes_moved == 2 * size, "the first round fetches nothing"
    assert found["seed, round 2"].bytes_moved == 4 * size
    assert (found["experts"].jobs, found["experts"].steps, found["experts"].examples) == (2, 40, 160)
    assert found["joint adapter"].steps == found["unseeded experts"].steps == 60


def test_without_a_seed_nobody_trains_for_one() -> None:
    values = {
        "tasks": {"experts": ["a"]},
        "seed": {"mode": "none"},
        "training": {"steps": 20},
        "combine": {"candidates": ["base", "average", "unseeded"]},
    }
    plan = Planner(parse_config(values), BASE)
    assert plan.unseeded(["a"])[0].training.steps == 20
    assert [stage.name for stage in stages(plan.config, None)] == ["experts", "unseeded experts"]


def test_gates_and_routers_are_planned_once_for_all_candidates_that_share_them() -> None:
    slow = {"name": "slow", "router": "sequence", "over": "learned"}
    values = {
        "tasks": {"experts": ["a", "b"]},
        "lora": {"rank": 1},
        "training": {"steps": 20, "batch_size": 4},
        "combine": {
            "candidates": ["learned", slow, "phatgoose", "molora"],
            "routing": {"steps": 5, "rounds": 2, "gate_steps": 7},
        },
    }
    found = {stage.name: stage for stage in stages(parse_config(values), {"layer": (3, 2)})}
    assert not any("slow" in name for name in found)
    assert (found["router learned, round 2"].jobs, found["router learned, round 2"].steps) == (2, 10)
    adapter, row = 4 * (3 + 2), 4 * (2 + 1)
    assert found["router learned, round 1"].bytes_moved == 2 * 2 * (adapter + row), "experts there, a router back"
    assert found["gates of experts"].steps == 14
    assert found["molora"].steps == 2 * (20 + 20), "as many as the joint adapter"


def test_a_routers_candidates_over_other_experts_are_trained_apart() -> None:
    values = {
        "tasks": {"experts": ["a", "b"]},
        "combine": {"candidates": ["learned", {"name": "learned_tuned", "router": "learned", "of": "tuned"}]},
    }
    plan = Planner(parse_config(values), BASE)
    plain, tuned = (
        plan.routers(candidate, 0, None, {"a": f"{candidate.of}-a", "b": f"{candidate.of}-b"})
        for candidate in plan.candidates
    )
    assert plain[0].recipe != tuned[0].recipe
    assert plan.wants_group("tuned")
    assert plan.needs_general_text
