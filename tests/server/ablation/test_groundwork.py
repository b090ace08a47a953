"""What an ablation asks of a federation: a seed of some tasks, plain tuning, orders of merging, views of one directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from village import BASE, SHAPES, TASKS, Village, config, open_run

from seedbed.common.errors import ConfigError
from seedbed.common.storage import read_manifest
from seedbed.server.candidates import resolve
from seedbed.server.combination import in_order, merge_options
from seedbed.server.describe import stages
from seedbed.server.federation import Federation
from seedbed.server.observer import Silent
from seedbed.server.plan import Planner


def test_only_the_named_clients_train_the_seed_and_all_train_experts(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", config(seed={"steps": 2, "tasks": ["b", "c"]}))
    village = Village(run.root / "store")
    Federation(run, village, BASE, SHAPES, Silent()).conduct()
    assert [name for name in village.asked if name.startswith("seed:")] == ["seed:b:round-1", "seed:c:round-1"]
    assert [name for name in village.asked if name.startswith("expert:")] == [f"expert:{task}" for task in TASKS]


def test_an_unseeded_twin_gets_the_seeds_steps_only_where_its_client_trained_the_seed() -> None:
    planner = Planner(config(seed={"steps": 2, "tasks": ["b"]}), BASE)
    assert [job.training.steps for job in planner.unseeded(TASKS)] == [3, 5, 3, 3]
    assert planner.joint(TASKS).training.steps == 3 + 5 + 3 + 3


def test_naming_all_tasks_of_the_seed_is_naming_none() -> None:
    some, none = (Planner(config(seed={"steps": 2, "tasks": tasks}), BASE) for tasks in (list(TASKS), None))
    for ours, theirs in zip(some.seed_round(0, None, TASKS), none.seed_round(0, None, TASKS), strict=True):
        assert ours.recipe == theirs.recipe


@pytest.mark.parametrize(
    ("seed", "sentence"),
    [
        ({"tasks": ["x"]}, "seed.tasks names x, which is not among tasks.experts"),
        ({"tasks": []}, "seed.tasks is empty"),
    ],
)
def test_a_seed_of_no_task_or_an_unknown_one_is_refused(seed: dict[str, list[str]], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(seed=seed)


def test_tuning_without_its_terms_is_the_plain_training_and_done_once(tmp_path: Path) -> None:
    settings = config(
        routing_tuning={"kl_weight": 0, "norm_weight": 0}, combine={"candidates": ["experts", "tuned", "average"]}
    )
    run = open_run(tmp_path / "run", settings)
    village = Village(run.root / "store")
    found = {made.name: made.digest for made in Federation(run, village, BASE, SHAPES, Silent()).conduct()}
    assert not [name for name in village.asked if name.startswith("tuned:")]
    assert all(found[f"tuned:{task}"] == found[f"expert:{task}"] for task in TASKS)
    doubled = Planner(config(routing_tuning={"kl_weight": 0, "norm_weight": 0, "task_weight": 2}), BASE)
    assert doubled.tuned(None, TASKS)[0].tuning is not None, "twice the loss is another training"


def test_a_plan_of_a_run_counts_such_experts_once() -> None:
    settings = config(routing_tuning={"kl_weight": 0, "norm_weight": 0}, combine={"candidates": ["experts", "tuned"]})
    assert [(stage.name, stage.jobs) for stage in stages(settings, None)] == [("seed, round 1", 4), ("experts", 4)]


def test_an_order_permutes_the_adapters_of_a_merge_and_stands_in_its_lineage(tmp_path: Path) -> None:
    moved = {"name": "moved", "method": "iterative", "order": 1}
    run = open_run(tmp_path / "run", config(combine={"candidates": ["experts", "iterative", moved]}))
    found = {
        made.name: str(made.digest)
        for made in Federation(run, Village(run.root / "store"), BASE, SHAPES, Silent()).conduct()
    }
    given, other = (read_manifest(run.store.open(found[name])).parents for name in ("iterative", "moved"))
    assert given == tuple(found[f"expert:{task}"] for task in TASKS)
    assert given != other
    assert sorted(given) == sorted(other)


def test_an_order_is_the_same_whenever_it_is_drawn_and_different_numbers_draw_differently() -> None:
    entries = [{"name": f"x{order}", "method": "iterative", "order": order} for order in (1, 2)]
    one, two = resolve(config(combine={"candidates": entries}))
    digests = [f"{index}" for index in range(8)]
    assert in_order(one, digests) == in_order(one, digests) != in_order(two, digests)


def test_a_method_that_draws_draws_anew_for_every_random_seed() -> None:
    entries = ["dare_linear", {"name": "mine", "method": "random", "options": {"random_seed": 4}}, "average"]
    dare, mine, average = resolve(config(combine={"candidates": entries}))
    assert [merge_options(dare, seed).get("random_seed") for seed in (0, 1)] == [None, 10_000]
    assert [merge_options(mine, seed)["random_seed"] for seed in (0, 1)] == [4, 10_004]
    assert merge_options(average, 1) == {}


def test_an_order_belongs_to_a_merge() -> None:
    with pytest.raises(ConfigError, match="order belongs to a merge method"):
        config(combine={"candidates": [{"name": "x", "router": "arrow", "order": 1}]})


def test_views_of_a_directory_share_store_and_ledger_and_publish_nothing(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    village = Village(run.root / "store")
    Federation(run.view(config()), village, BASE, SHAPES, Silent()).conduct()
    asked = len(village.asked)
    other = run.view(config(combine={"candidates": ["seed", "ties"]}))
    made = Federation(other, village, BASE, SHAPES, Silent()).conduct()
    assert [candidate.name for candidate in made] == ["seed", "ties"]
    assert len(village.asked) == asked, "what one has trained the others find"
    other.close()
    assert not run.adapters.exists()
    run.publish("ties", str(made[1].digest))
    assert (run.adapters / "ties").is_dir()
