"""DeepSpeed settings and configurations that deploy/ ships are read by our loader, and accepted by DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from shipped import DEPLOY

from seedbed.client.engine import deepspeed_config
from seedbed.common.config_file import load_config, parse_config

SNIPPETS = sorted((DEPLOY / "deepspeed").glob("*.yaml"))


def snippet(name: str) -> Any:
    values = yaml.safe_load((DEPLOY / f"deepspeed/{name}.yaml").read_text(encoding="utf-8"))
    return parse_config({**values, "tasks": {"experts": ["addition"]}}, source=name)


@pytest.mark.parametrize("path", SNIPPETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("tuned", [False, True])
def test_a_snippet_becomes_a_configuration_that_deepspeed_accepts(path: Path, tuned: bool) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = snippet(path.stem)
    given = deepspeed_config(config.training, ranks=1, tuned=tuned)
    accepted = DeepSpeedConfig(given)
    assert accepted.zero_config.stage == config.training.deepspeed.zero_stage
    assert accepted.gradient_accumulation_steps == config.training.accumulation * (2 if tuned else 1)


def test_every_snippet_is_what_its_name_says() -> None:
    assert [snippet(name).training.deepspeed.zero_stage for name in ("zero-2", "zero-3", "zero-3-offload")] == [2, 3, 3]
    assert snippet("zero-3-offload").training.deepspeed.offload_parameters
    assert snippet("several-nodes").training.deepspeed.hostfile is not None
    assert snippet("qlora").base.quantization == "nf4"


def test_batches_divide_over_two_four_and_eight_gpus() -> None:
    for path in SNIPPETS:
        training = snippet(path.stem).training
        for ranks in (2, 4, 8):
            if training.batch_size >= training.accumulation * ranks:
                assert training.batch_size % (training.accumulation * ranks) == 0, path.stem


@pytest.mark.parametrize("path", [DEPLOY / "compose/demo-federation.yaml", DEPLOY / "kubernetes/federation.yaml"])
def test_a_shipped_federation_is_one(path: Path) -> None:
    assert load_config(str(path)).tasks.experts == ("addition", "antonym")
