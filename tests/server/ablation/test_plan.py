"""Plans of ablations: what cells they come to, and what is refused in which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from seedbed.common.config_file import load_config, parse_config
from seedbed.common.errors import ConfigError, ResumeError
from seedbed.server.ablation.cells import Variant, base_config, expand, groups
from seedbed.server.ablation.forecast import forecast
from seedbed.server.ablation.parts import canonical, leaves, removal
from seedbed.server.ablation.plan import keep_plan, load_plan, parse_plan, plan_names, refuse_change
from seedbed.server.ablation.values import Plan

ITERATIVE = "{name: folded, method: iterative, of: tuned, options: {retention: 0.8, rank: 4}}"


def plan(*rows: Mapping[str, Any], full: str = "average", changes: Sequence[str] = (), **values: Any) -> Plan:
    return parse_plan(
        {"name": "p", "config": "embedded", "full": full, "rows": list(rows), "set": list(changes), **values}
    )


def cells(*rows: Mapping[str, Any], **values: Any) -> dict[str, Variant]:
    return {variant.cell.name: variant for variant in expand(plan(*rows, **values))}


def folded(*rows: Mapping[str, Any]) -> dict[str, Variant]:
    return cells(*rows, full="folded", changes=[f"combine.candidates=[base, experts, {ITERATIVE}]"])


# -- what plans come to -----------------------------------------------------------------------------------------------


def test_removing_a_part_sets_what_stands_for_nothing() -> None:
    found = cells({"part": "seed_expert", "action": "remove"})
    assert list(found) == ["full", "seed.mode=none"]
    assert found["full"].config.seed.mode == "federated"
    assert found["seed.mode=none"].config.seed.mode == "none"


def test_several_parts_of_a_row_are_removed_together() -> None:
    found = folded({"part": ["kl_loss", "norm_loss"], "action": "remove"})
    tuning = found["routing_tuning.kl_weight=0.0,routing_tuning.norm_weight=0.0"].config.routing_tuning
    assert (tuning.kl_weight, tuning.norm_weight) == (0, 0)


@pytest.mark.parametrize(
    ("part", "left"),
    [
        ("seed.mode", "none"),
        ("routing_tuning.kl_weight", 0),
        ("lora.rslora", False),
        ("seed.learning_rate", None),
        ("tasks.train_limit", None),
        ("order", None),
    ],
)
def test_what_is_left_when_a_part_is_removed(part: str, left: object) -> None:
    assert removal(part) == left


def test_every_value_of_a_replacement_is_a_cell_with_its_number() -> None:
    found = cells({"part": "seed_fraction", "action": "replace", "with": [0.05, 0.3]})
    assert [(name, variant.cell.number, variant.config.seed.fraction) for name, variant in found.items()][1:] == [
        ("seed.fraction=0.05", 0.05, 0.05),
        ("seed.fraction=0.3", 0.3, 0.3),
    ]


def test_a_number_of_experts_takes_the_first_ones() -> None:
    found = cells({"part": "experts", "action": "replace", "with": [2, ["antonym", "pattern"]]})
    assert found["tasks.experts=2"].config.tasks.experts == ("addition", "comparison")
    assert found["tasks.experts=2"].cell.number == 2
    assert found["tasks.experts=antonym+pattern"].config.tasks.experts == ("antonym", "pattern")
    assert found["tasks.experts=antonym+pattern"].cell.number is None


def test_the_seeds_tasks_are_the_first_or_the_last_ones() -> None:
    found = cells({"part": "seed_tasks", "action": "replace", "with": [2, -1]})
    assert found["seed.tasks=first 2"].config.seed.tasks == ("addition", "comparison")
    assert found["seed.tasks=last 1"].config.seed.tasks == ("past_tense",)
    assert found["seed.tasks=last 1"].cell.number is None


def test_a_shipped_plan_can_be_asked_of_another_configuration() -> None:
    for name in plan_names():
        variants = expand(load_plan(name, config="smollm2"))
        assert {variant.config.base.model for variant in variants} == {"smollm2"}
        assert len(variants) == len(expand(load_plan(name)))


def test_another_candidate_is_a_name_or_a_mapping() -> None:
    louder = {"name": "louder", "method": "average", "options": {"task_scale": 2.0}}
    found = cells({"part": "routing", "action": "replace", "with": ["arrow", louder, "average_tuned"]})
    assert [variant.candidate.role for variant in found.values()] == ["merge", "mixture", "merge", "merge"]
    assert found["candidate=louder"].config.combine.names == ("louder",)
    assert found["candidate=average_tuned"].candidate.of == "tuned", "a name of the configuration is that candidate"


def test_an_option_of_the_full_candidate_is_changed_and_the_others_stay() -> None:
    found = folded({"part": "svd_retention", "action": "replace", "with": [0.6]})
    options = found["options.retention=0.6"].candidate.options
    assert options is not None
    assert (options.model_dump()["retention"], options.model_dump()["rank"]) == (0.6, 4)


def test_another_merge_rule_keeps_the_options_that_it_has_too() -> None:
    found = folded({"part": "merge_rule", "action": "replace", "with": ["svd", "average"]})
    svd, average = (found[f"method={name}"].candidate for name in ("svd", "average"))
    assert svd.options is not None
    assert svd.options.model_dump()["rank"] == 4
    assert (average.method and average.method.name, average.of) == ("average", "tuned")


def test_values_of_several_parts_come_as_mappings_or_lists() -> None:
    row = {"part": ["merge_rule", "of"], "action": "replace"}
    pairs = [{"of": "experts", "merge_rule": "ties"}, ["svd", "tuned"]]
    found = folded({**row, "with": pairs})
    assert [(v.candidate.method and v.candidate.method.name, v.candidate.of) for v in list(found.values())[1:]] == [
        ("ties", "experts"),
        ("svd", "tuned"),
    ]


def test_the_full_method_under_another_name_is_marked() -> None:
    found = folded({"part": "svd_retention", "action": "replace", "with": [0.8, 1.0]})
    assert [variant.cell.is_full for variant in found.values()] == [False, True, False]


def test_rows_that_both_pass_through_the_full_method_have_each_its_point() -> None:
    low = {"label": "low", "part": "seed_fraction", "action": "replace", "with": [0.05, 0.1]}
    high = {"label": "high", "part": "seed_fraction", "action": "replace", "with": [0.1, 0.3]}
    names = ["seed.fraction=0.05", "seed.fraction=0.1 (low)", "seed.fraction=0.1 (high)", "seed.fraction=0.3"]
    assert list(cells(low, high)) == ["full", *names]
    assert set(cells(high, low)) == {"full", *names}
    assert [variant.cell.is_full for variant in cells(low, high).values()] == [False, False, True, True, False]
    with pytest.raises(ConfigError, match=r"'seed.fraction=0.1' in row 'low' is the same as"):
        cells({**low, "with": [0.1, 0.1]})


def test_a_number_that_yaml_reads_as_text_is_a_point_of_a_curve() -> None:
    found = cells({"part": "training.learning_rate", "action": "replace", "with": ["2e-3", "1e-4"]})
    assert [(one.cell.number, one.config.training.learning_rate) for one in found.values()][1:] == [
        (0.002, 0.002),
        (0.0001, 0.0001),
    ]


def test_a_cells_changes_alone_make_its_configuration_again() -> None:
    rows = [
        {"part": "experts", "action": "replace", "with": [2]},
        {"part": "task_scale", "action": "replace", "with": [2.0]},
        {"part": "seed_expert", "action": "remove"},
        {"part": "seed_tasks", "action": "replace", "with": [["addition", "antonym"]]},
    ]
    for variant in expand(plan(*rows))[1:]:
        assert load_config("embedded", variant.cell.changes) == variant.config


def test_cells_that_differ_in_their_candidate_share_a_configuration_whatever_the_order_of_rows() -> None:
    rows = [
        {"part": "routing", "action": "replace", "with": ["uniform", "arrow"]},
        {"part": "seed_expert", "action": "remove"},
        {"part": "task_scale", "action": "replace", "with": [2.0]},
    ]
    one, two = (groups(expand(plan(*order))) for order in (rows, rows[::-1]))
    assert {frozenset(v.cell.name for v in group.variants) for group in one} == {
        frozenset(v.cell.name for v in group.variants) for group in two
    }
    assert sorted(len(group.variants) for group in one) == [1, 4]


# -- refusals ---------------------------------------------------------------------------------------------------------

ROW = {"part": "seed.mode", "action": "remove"}
WRONG: list[tuple[Any, str, str]] = [
    ({"part": "routing_tuning.kl_wieght", "action": "remove"}, "no part 'routing_tuning.kl_wieght'", "kl_weight"),
    ({"part": "kl_weight", "action": "remove"}, "there is no part 'kl_weight'", "routing_tuning.kl_weight"),
    ({"part": "seed", "action": "remove"}, "section of several parts", "seed.mode"),
    ({"part": "run.random_seed", "action": "replace", "with": [1]}, "cannot be ablated", "another part"),
    ({"part": "tasks.held_out", "action": "replace", "with": [[]]}, "same zero-shot tasks", "another part"),
    ({"part": "training.steps", "action": "remove"}, "cannot be removed", "Replace"),
    ({"part": "routing", "action": "remove"}, "cannot be removed", "uniform"),
    ({"part": "seed.mode", "action": "delete"}, "expected 'remove' or 'replace'", ""),
    ({"part": "seed.mode", "action": "remove", "with": [1]}, "does not go with", "replace"),
    ({"part": "seed.fraction", "action": "replace"}, "'with' is not a list", ""),
    ({"part": "seed.fraction", "action": "replace", "with": [7]}, "seed.fraction", ""),
    ({"part": "seed.fraction", "action": "replace", "with": ["a lot"]}, "seed.fraction", ""),
    ({"part": "experts", "action": "replace", "with": [9]}, "there are 8 experts", ""),
    ({"part": "options.retention", "action": "replace", "with": [1]}, "has no option 'retention'", ""),
    ({"part": "top_k", "action": "replace", "with": [2]}, "belong to a router", ""),
    ({"part": "candidate", "action": "replace", "with": ["arow"]}, "no candidate 'arow'", "arrow"),
    ({"part": "candidate", "action": "replace", "with": ["tuned"]}, "own tasks only", "experts"),
    ({"part": "merge_rule", "action": "replace", "with": ["tie"]}, "no merge method 'tie'", "ties"),
    ({**ROW, "metrics": ["acuracy"]}, "there is no metric 'acuracy'", "zero_shot_accuracy"),
    ({**ROW, "metric": ["zero_shot_accuracy"]}, "unknown key 'metric'", "metrics"),
    ({"part": ["seed.mode", "seed_expert"], "action": "remove"}, "twice", ""),
    ({"part": ["seed.mode", "of"], "action": "replace", "with": [{"of": "tuned"}]}, "one value for each", ""),
    ({"part": "order", "action": "remove"}, "not there to be removed", "out"),
]


@pytest.mark.parametrize(("row", "sentence", "step"), WRONG, ids=[sentence for _, sentence, _ in WRONG])
def test_a_row_that_makes_no_sense_is_refused_with_a_sentence_and_a_next_step(
    row: dict[str, Any], sentence: str, step: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        expand(plan(row))
    assert sentence in refused.value.message
    assert step in refused.value.hint
    assert "row" in refused.value.message, "it says which row"


@pytest.mark.parametrize(
    ("values", "sentence", "step"),
    [
        ({"full": "averge"}, "full is 'averge', which is no candidate", "average"),
        ({"full": "base"}, "combines nothing", "merge or a router"),
        ({"config": "embeded"}, "no preset and no file named 'embeded'", "embedded"),
        ({"rowz": []}, "unknown key 'rowz'", "rows"),
        ({"rows": []}, "'rows' is missing", "rows"),
        ({"rows": [ROW, ROW]}, "two rows are called 'seed.mode'", "label"),
        ({"set": {"a": 1}}, "'set' is not a list of key.path=value", "training.steps"),
        ({"rows": [ROW, {**ROW, "label": "again"}]}, "is the same as", "Leave one"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(values: dict[str, Any], sentence: str, step: str) -> None:
    whole = {"name": "p", "config": "embedded", "full": "average", "rows": [ROW], **values}
    with pytest.raises(ConfigError) as refused:
        expand(parse_plan(whole))
    assert sentence in refused.value.message
    assert step in refused.value.hint


def test_a_part_of_the_full_method_cannot_be_cut_from_under_its_own_options() -> None:
    changes = ["combine.candidates=[experts, {name: louder, method: average, options: {task_scale: 2.0}}]"]
    with pytest.raises(ConfigError, match=r"row 'seed.mode': .*needs the seed, but seed.mode is 'none'"):
        expand(plan(ROW, full="louder", changes=changes))


def test_every_setting_of_the_configuration_is_a_part_or_says_why_not() -> None:
    refused = {path for path in leaves() if _refusal(path)}
    assert all("cannot be ablated: " in _refusal(path) for path in refused)
    assert {"run.random_seed", "tasks.held_out", "base.model"} <= refused
    assert not refused & {"lora.rank", "training.steps", "seed.mode", "routing_tuning.general_batch"}


def _refusal(path: str) -> str:
    try:
        return "" if canonical(path) == path else "another path"
    except ConfigError as error:
        return error.message


def test_another_full_method_is_not_resumed_and_what_changed_is_said() -> None:
    pair = {"part": ["of", "kl_loss"], "action": "replace", "with": [{"of": "tuned", "kl_loss": 0}]}
    whole = plan(ROW, pair)
    refuse_change(Plan.model_validate_json(whole.model_dump_json()), whole, "runs/p")
    before = plan(ROW)
    for now, sentence in (
        (plan(ROW, full="ties"), "full was 'average' and is 'ties'"),
        (plan(ROW, changes=["training.steps=5"]), "then training.steps=5 was not set"),
        (plan(ROW, name="q"), "name was 'p' and is 'q'"),
    ):
        with pytest.raises(ResumeError, match=sentence):
            refuse_change(before, now, "runs/p")


def test_rows_may_come_and_go_between_two_runs() -> None:
    before = plan(ROW)
    refuse_change(before, plan(ROW, {"part": "order", "action": "replace", "with": [1]}), "runs/p")
    refuse_change(before, plan({**ROW, "metrics": ["task_performance"]}), "runs/p")


def test_a_forecast_counts_nothing_of_a_directory_that_another_plan_made(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"event": "accepted", "key": "k", "digest": "d", "seconds": 9.0}\n')
    keep_plan(tmp_path, plan(ROW))
    same, other = (forecast(plan(ROW, name=name), [0], tmp_path) for name in ("p", "q"))
    assert (same.measured, same.other) == (True, "")
    assert not other.measured
    assert "name was 'p' and is 'q'" in other.other


def test_a_forecast_counts_merges_and_routers_by_kind() -> None:
    found = forecast(plan(ROW, {"part": "routing", "action": "replace", "with": ["uniform", "ties"]}), [0, 1])
    # For each random seed: one mean of the seed's first adapters, average with and without a seed, ties, and a router.
    assert [(row.kind, row.distinct, row.cached) for row in found.combined] == [
        ("mean of the seed", 2, 0),
        ("merge", 6, 0),
        ("router", 2, 0),
    ]


def test_a_file_may_name_a_configuration_that_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"tasks": {"experts": ["addition"]}, "name": "beside"}))
    values = {"name": "p", "config": "mine.yaml", "full": "average", "rows": [ROW]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    assert base_config(load_plan(str(tmp_path / "plan.yaml"))).name == "beside"


# -- shipped plans ----------------------------------------------------------------------------------------------------


def test_the_shipped_plans_are_these() -> None:
    assert plan_names() == ["controls", "i-lora", "seeded-lora", "seeded-lora-smollm2"]
    with pytest.raises(ConfigError) as refused:
        load_plan("seeded_lora")
    assert refused.value.hint == "Did you mean 'seeded-lora'?"


SHIPPED = {
    # trainings that three random seeds need: seed rounds, experts, tuned experts, joint, molora, gates, router rounds
    "seeded-lora": {"seed": 24, "expert": 72, "joint": 3, "molora": 3, "gate": 24, "router": 48},
    "i-lora": {"seed": 24, "expert": 24, "tuned expert": 72},
    "controls": {"seed": 120, "expert": 222},
    "seeded-lora-smollm2": {"seed": 24, "expert": 72, "joint": 3},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_plan_needs_only_so_many_trainings(name: str) -> None:
    found = forecast(load_plan(name), range(3))
    assert {row.kind: row.distinct for row in found.trainings} == SHIPPED[name]
    assert found.distinct * 2 < found.alone, "cells share most of what they need"


@pytest.mark.parametrize("name", ["seeded-lora", "i-lora", "controls"])
def test_a_shipped_plan_of_the_embedded_model_needs_half_an_hour(name: str) -> None:
    found = forecast(load_plan(name), range(3))
    assert found.seconds is not None
    assert found.seconds * found.workers < 2 * 1800


def test_the_cross_table_has_every_merge_rule_with_plain_and_with_tuned_experts() -> None:
    variants = [v for v in expand(load_plan("i-lora")) if v.cell.row.startswith("merge rule") or v.cell.name == "full"]
    rules = {(v.candidate.method.name, v.candidate.of) for v in variants if v.candidate.method is not None}
    names = ("iterative", "average", "cat", "svd", "ties", "dare_linear", "magnitude_prune", "linear")
    assert rules == {(name, of) for name in names for of in ("experts", "tuned")}


def test_the_tasks_of_the_seed_are_halves_of_all_tasks() -> None:
    one, two = (v.config.seed.tasks for v in expand(load_plan("controls")) if v.config.seed.tasks is not None)
    assert one is not None
    assert two is not None
    assert (*one, *two) == base_config(load_plan("controls")).tasks.experts


def test_other_base_models_have_no_rule_of_thumb() -> None:
    settings = parse_config({"tasks": {"experts": ["addition", "antonym"]}})
    assert settings.base.model == "embedded"
    changes = ["base.model=/nowhere/at/all"]
    found = forecast(plan(ROW, changes=changes), range(1))
    assert found.seconds is None
