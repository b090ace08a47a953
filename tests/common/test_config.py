"""A federation file is understood completely or refused with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from seedbed.common.config_file import dump_config, load_config, parse_config, preset_names
from seedbed.common.errors import ConfigError

MINIMAL: dict[str, Any] = {"tasks": {"experts": ["a"]}}


def refusal(values: dict[str, Any], *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, overrides)
    return caught.value


def test_presets_are_valid_and_named() -> None:
    assert preset_names() == ["embedded", "llama-3-8b", "smollm2"]
    for name in preset_names():
        assert load_config(name).tasks.experts


def test_a_dumped_configuration_reads_back_equal() -> None:
    config = load_config("smollm2", ["training.steps=7", "tasks.data=/somewhere"])
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert config.training.steps == 7


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("trainning", "training"), ("tasks.expert", "experts"), ("training.deepspeed.zero_stages", "zero_stage")],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, nearest: str) -> None:
    error = refusal(MINIMAL, f"{key}=1")
    assert f"unknown key '{key}'" in error.message
    assert nearest in error.hint


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.steps=0", "training.steps"),
        ("training.steps=many", "training.steps"),
        ("seed.fraction=1.5", "seed.fraction"),
        ("stages.quorum=0", "stages.quorum"),
        ("training.accumulation=3", "batch_size 8 is not a multiple of accumulation 3"),
        ("seed.mode=public", "needs seed.data"),
        ("seed.mode=given", "needs seed.adapter"),
        ("seed.mode=none", "candidate 'seed' needs a seed"),
        ("tasks.held_out=[a]", "both an expert's and held out"),
        ("tasks.experts=[a, a]", "named twice"),
        ("tasks.experts=[]", "at least one expert task"),
        ("tasks.prompt=hello", "must contain {prompt}"),
        ("combine.candidates=[base, base]", "twice"),
        ("combine.candidates=[{name: x}]", "either a method or a router"),
        ("combine.candidates=[{name: x, method: ties, top_k: 2}]", "belong to a router"),
        ("combine.candidates=[{name: x, router: arrow, options: {rank: 2}}]", "belong to a merge method"),
        ("combine.routing.mode=public", "combine.routing.data"),
        ("routing_tuning={task_weight: 0, kl_weight: 0, norm_weight: 0}", "nothing to train for"),
        ("training.deepspeed.offload_parameters=true", "zero_stage 3"),
        ("name=../evil", "name"),
        ("run.workers=-1", "config: run.workers: Input"),
        ("run.workers=[1]", "config: run.workers: Input"),
        ("combine.candidates=[base, {method: ties}]", "config: combine.candidates.1.name: Field required"),
        ("training", "key.path=value"),
        ("training.steps.more=1", "training.steps"),
        ("training.steps={", "valid YAML"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_its_place(override: str, sentence: str) -> None:
    assert sentence in refusal(MINIMAL, override).message


def test_a_missing_file_and_a_broken_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no preset and no file") as caught:
        load_config("embeded")
    assert "embedded" in caught.value.hint
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: x\ntasks: [")
    with pytest.raises(ConfigError, match="line 2"):
        load_config(str(broken))
    broken.write_text("- a\n")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(str(broken))
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(broken))
