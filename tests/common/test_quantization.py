"""A base model in 4 bits: what it costs, that it trains, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from seedbed.client import launch
from seedbed.client.spec import TrainSpec
from seedbed.common import basemodel
from seedbed.common.config import BaseModelConfig, DeepSpeedSettings, LoraSettings, TrainingSettings
from seedbed.common.config_file import parse_config
from seedbed.common.errors import ConfigError, ModelError
from seedbed.common.jobs import DataSource
from seedbed.common.storage import read_adapter

NF4 = BaseModelConfig(quantization="nf4")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra `qlora` is not installed"
)


def size(model: torch.nn.Module, part: str) -> int:
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if part in name)


@needs_bitsandbytes
def test_frozen_linear_layers_take_an_eighth_of_float32_and_the_rest_stays() -> None:
    whole, _ = basemodel.load(BaseModelConfig(), "cpu")
    small, _ = basemodel.load(NF4, "cpu")
    assert size(small, "_proj") * 8 == size(whole, "_proj")
    assert size(small, "embed_tokens") == size(whole, "embed_tokens")


@needs_bitsandbytes
def test_a_quantized_model_evaluates_and_then_still_has_gradients() -> None:
    model, tokenizer = basemodel.load(NF4, "cpu")
    ids = tokenizer("What is 2 plus 3?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    again = model(inputs_embeds=embedded).logits
    again.sum().backward()
    assert torch.allclose(before, again.detach(), atol=1e-4)
    assert embedded.grad is not None
    assert embedded.grad.isfinite().all()
    assert embedded.grad.any()


@needs_bitsandbytes
@pytest.mark.parametrize(
    "training",
    [
        TrainingSettings(engine="torch", steps=8, log_every=1),
        TrainingSettings(
            engine="deepspeed", steps=8, log_every=1, deepspeed=DeepSpeedSettings(zero_stage=2, processes=2)
        ),
    ],
    ids=["torch", "deepspeed with two ranks"],
)
def test_a_lora_over_four_bits_learns(training: TrainingSettings, tmp_path: Path) -> None:
    data = tmp_path / "t.jsonl"
    data.write_text(
        "\n".join(f'{{"prompt": "What is {n} plus 1?", "completion": " {n + 1}"}}' for n in range(16)), encoding="utf-8"
    )
    source = DataSource(task="t", location=str(data))
    spec = TrainSpec(
        base=NF4, lora=LoraSettings(), training=training, data=(source,), output=tmp_path / "out", threads=1
    )
    outcome = launch.run(spec, log=tmp_path / "log")
    assert outcome.metrics["loss"] < outcome.metrics["first_loss"] - 1
    assert all(factors.A.dtype == torch.float32 for factors in read_adapter(outcome.directory)[0].values())


def test_without_bitsandbytes_the_next_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs bitsandbytes") as refused:
        basemodel._quantized(NF4, torch.device("cpu"))
    assert "seedbed[qlora]" in refused.value.hint


def test_four_bits_are_not_cut_into_slices() -> None:
    settings = {"tasks": {"experts": ["addition"]}, "base": {"quantization": "nf4"}}
    assert parse_config(settings).base.quantization == "nf4"
    with pytest.raises(ConfigError, match="not cut into slices"):
        parse_config(settings, ["training.deepspeed.zero_stage=3"])
