"""What a simulation reads and whom it starts, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from seedbed.common.config import FederationConfig
from seedbed.common.config_file import parse_config
from seedbed.common.errors import ConfigError, DataError
from seedbed.common.jobs import Node
from seedbed.server.inputs import complete, find_inputs
from seedbed.server.rundir import RunDirectory
from seedbed.server.simulation import worker_count, write_nodes


def directory(root: Path, *names: str) -> Path:
    root.mkdir()
    for name in names:
        line = json.dumps({"prompt": "1 plus 1?", "choices": ["2", "3"], "label": 0})
        (root / f"{name}.jsonl").write_text(line + "\n")
    return root


def config(data: Path, **values: object) -> FederationConfig:
    return parse_config({"tasks": {"experts": ["a"], "held_out": ["z"], "data": str(data)}, **values})


def test_every_task_file_is_found_and_hashed(tmp_path: Path) -> None:
    data = directory(tmp_path / "data", "a.train", "a.test", "z.test")
    found = find_inputs(config(data))
    assert set(found.train) == {"a"}
    assert set(found.test) == {"a", "z"}
    assert set(found.hashes) == {str(data / f"{name}.jsonl") for name in ("a.train", "a.test", "z.test")}


def test_a_changed_line_changes_the_hash(tmp_path: Path) -> None:
    data = directory(tmp_path / "data", "a.train", "a.test", "z.test")
    before = find_inputs(config(data))
    line = json.dumps({"prompt": "1 plus 1?", "choices": ["2", "3"], "label": 1})
    (data / "a.train.jsonl").write_text(line + "\n")
    after = find_inputs(config(data))
    assert {name for name in before.hashes if before.hashes[name] != after.hashes[name]} == {
        str(data / "a.train.jsonl")
    }


def test_embedded_tasks_are_generated_the_same_every_time(tmp_path: Path) -> None:
    settings = parse_config({"tasks": {"experts": ["addition"], "held_out": ["mood"]}})
    found = find_inputs(settings)
    assert (found.train, found.test, found.hashes) == ({}, {}, {})
    one, two = (complete(found, settings, tmp_path / name) for name in ("one", "two"))
    assert Path(one.train["addition"]).read_bytes() == Path(two.train["addition"]).read_bytes()
    assert set(one.train) == {"addition"}


def test_files_that_are_named_beside_embedded_tasks_are_hashed_too(tmp_path: Path) -> None:
    sample = directory(tmp_path / "public", "sample") / "sample.jsonl"
    text = general(tmp_path / "text.jsonl", 3)
    tasks = {"experts": ["addition"], "general": str(text), "general_test": 1}
    settings = parse_config({"tasks": tasks, "seed": {"mode": "public", "data": str(sample)}})
    found = find_inputs(settings)
    assert set(found.hashes) == {str(sample), str(text)}, "a run is not resumed with others"
    whole = complete(found, settings, tmp_path / "made")
    assert str(sample) in whole.train.values()
    assert whole.general is not None
    assert (whole.general.location, whole.general.train) == (str(text), 2)


def test_an_embedded_task_without_training_data_makes_no_expert() -> None:
    with pytest.raises(ConfigError, match="mood"):
        find_inputs(parse_config({"tasks": {"experts": ["mood"]}}))


def test_only_the_node_with_all_data_gets_everybodys(tmp_path: Path) -> None:
    data = directory(tmp_path / "data", "a.train", "a.test", "b.train", "b.test")
    settings = parse_config({"tasks": {"experts": ["a", "b"], "data": str(data)}})
    found = find_inputs(settings)
    run = RunDirectory.open(tmp_path / "run", settings, found.hashes, resume=False)
    assert write_nodes(run, found, pooled=True, general=False, threads=1) == 3
    nodes = [Node.model_validate(yaml.safe_load((run.root / f"nodes/{n}.yaml").read_text())) for n in range(3)]
    told = {node.name: ([source.task for source in node.data], node.pooled) for node in nodes}
    assert told == {"all-data": (["a", "b"], True), "a": (["a"], False), "b": (["b"], False)}
    run.close()


def test_workers_are_as_many_as_asked_and_never_more_than_jobs() -> None:
    values = {"tasks": {"experts": ["a"]}}
    assert worker_count(parse_config({**values, "run": {"workers": 5}}), jobs=9) == 5
    assert worker_count(parse_config(values), jobs=1) == 1


def general(path: Path, count: int) -> Path:
    path.write_text("".join(f'{{"text": "text {index}"}}\n' for index in range(count)))
    return path


def test_the_last_general_texts_only_measure(tmp_path: Path) -> None:
    data = directory(tmp_path / "data", "a.train", "a.test")
    general(data / "general_text.jsonl", 5)
    found = find_inputs(parse_config({"tasks": {"experts": ["a"], "data": str(data), "general_test": 2}}))
    assert found.general is not None
    assert found.general.train == 3
    assert found.general.test_texts() == ["text 3", "text 4"]
    assert any("general_text" in name for name in found.hashes), "a run is not resumed with other text"
    with pytest.raises(DataError, match="none is left to train on"):
        find_inputs(parse_config({"tasks": {"experts": ["a"], "data": str(data), "general_test": 5}}))


def test_routing_tuning_without_general_text_is_refused_except_on_the_embedded_model(tmp_path: Path) -> None:
    data = directory(tmp_path / "data", "a.train", "a.test")
    values = {"tasks": {"experts": ["a"], "data": str(data)}, "combine": {"candidates": ["base", "tuned"]}}
    with pytest.raises(DataError, match="routing tuning needs general text") as refusal:
        find_inputs(parse_config({**values, "base": {"model": "smollm2"}}))
    assert "tasks.general" in refusal.value.hint
    embedded = parse_config(values)
    found = find_inputs(embedded)
    assert found.general is None
    assert complete(found, embedded, tmp_path / "made").general is not None


def test_participants_get_general_text_to_train_on_and_never_that_which_measures(tmp_path: Path) -> None:
    data = directory(tmp_path / "data", "a.train", "a.test")
    text = general(tmp_path / "elsewhere.jsonl", 7)
    settings = parse_config({"tasks": {"experts": ["a"], "data": str(data), "general": str(text), "general_test": 3}})
    found = find_inputs(settings)
    run = RunDirectory.open(tmp_path / "run", settings, found.hashes, resume=False)
    write_nodes(run, found, pooled=False, general=True, threads=1)
    (node,) = [Node.model_validate(yaml.safe_load((run.root / "nodes/0.yaml").read_text()))]
    assert [(source.task, source.limit) for source in node.data] == [("a", None), ("general", 4)]
    run.close()


@pytest.mark.parametrize(
    ("values", "setting"),
    [
        ({"tasks": {"experts": ["addition"], "general": "no-such-file"}}, "tasks.general"),
        (
            {
                "tasks": {"experts": ["addition"]},
                "combine": {"routing": {"mode": "public", "data": "no-such-file"}},
            },
            "combine.routing.data",
        ),
        ({"tasks": {"experts": ["addition"]}, "seed": {"mode": "public", "data": "no-such-file"}}, "seed.data"),
    ],
)
def test_a_file_that_is_missing_is_found_out_before_a_run_begins(values: dict[str, Any], setting: str) -> None:
    with pytest.raises(DataError, match=setting):
        find_inputs(parse_config(values))
