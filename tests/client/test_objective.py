"""Routing tuning: each term by hand, silence off the task, and the same result however a step is cut."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from seedbed.client.data import Tokens, collate, encode
from seedbed.client.lora import attach, extract, layers
from seedbed.client.objective import Objective, Pass, Totals, divergence
from seedbed.client.spec import TrainSpec
from seedbed.client.trainee import LoraTrainee, RoutedTrainee
from seedbed.client.training import Trained, train
from seedbed.common import basemodel
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.config import BaseModelConfig, LoraSettings, RoutingTuningSettings, TrainingSettings
from seedbed.common.embedded import write_task
from seedbed.common.embedded.corpus import general_text
from seedbed.common.errors import ConfigError
from seedbed.common.examples import Example
from seedbed.common.jobs import DataSource
from seedbed.common.routing import RoutedModel

TEXTS = [Tokens((5, 6, 7), 1), Tokens((8, 9, 10, 11, 12), 1)]
TUNING = RoutingTuningSettings(kl_weight=1.0, norm_weight=0.1)


@pytest.fixture
def trainee() -> LoraTrainee:
    model, _ = basemodel.load(BaseModelConfig(), "cpu")
    return LoraTrainee(attach(model, LoraSettings(rank=2, alpha=6), 0))


def loud(trainee: LoraTrainee) -> LoraTrainee:
    """An adapter that is no longer zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in layers(trainee.model):
            B = layer.lora_B["default"].weight
            B.copy_(0.02 * torch.randn(B.shape, generator=generator))
    return trainee


def general(
    trainee: LoraTrainee, tuning: RoutingTuningSettings = TUNING, texts: Sequence[Tokens] = TEXTS
) -> dict[str, torch.Tensor]:
    totals = Totals(task=1, general=sum(text.targets for text in texts))
    return Objective(trainee, tuning).terms(trainee.model, Pass(collate(texts, 0), general=True), totals)


# --- the terms ---------------------------------------------------------------------------------------------------------


def test_the_divergence_goes_from_the_base_to_the_adapted_model() -> None:
    base, adapted = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(base, adapted).item() == pytest.approx(expected, abs=1e-6)
    assert divergence(adapted, base).item() != pytest.approx(expected, abs=1e-3)


def test_a_fresh_adapter_is_silent(trainee: LoraTrainee) -> None:
    terms = general(trainee)
    assert terms["kl"].item() == pytest.approx(0, abs=1e-6)
    assert terms["norm"].item() == 0


def test_the_divergence_is_that_of_the_two_models_on_every_token(trainee: LoraTrainee) -> None:
    loud(trainee)
    expected = 0.0
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([text.ids[:-1]])
            q = trainee.model(ids).logits[0].log_softmax(-1)
            with trainee.model.disable_adapter():
                p = trainee.model(ids).logits[0].log_softmax(-1)
            expected += float((p.exp() * (p - q)).sum()) / 6
    assert general(trainee)["kl"].item() == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-4


def test_the_norm_is_the_mean_size_of_the_updates_over_tokens_and_modules(trainee: LoraTrainee) -> None:
    loud(trainee)
    adapter, seen = extract(trainee.model), []
    handles = []
    for name, layer in layers(trainee.model):

        def keep(_layer: Any, inputs: Any, _output: Any, name: str = name) -> None:
            update = inputs[0][0] @ adapter[name].delta().T  # dense, with the scaling of 3
            seen.append(float(update.norm(dim=-1).sum()))

        handles.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        for text in TEXTS:
            trainee.model(torch.tensor([text.ids[:-1]]))
    for handle in handles:
        handle.remove()
    modules = len(adapter)
    assert general(trainee)["norm"].item() == pytest.approx(sum(seen) / modules / 6, rel=1e-4)


def test_only_the_factors_learn_from_general_text_and_the_adapter_stays_switched_on(trainee: LoraTrainee) -> None:
    terms = general(loud(trainee))
    sum(terms.values()).backward()  # type: ignore[union-attr]
    touched = {name for name, parameter in trainee.model.named_parameters() if parameter.grad is not None}
    assert touched
    assert all("lora_" in name for name in touched)
    assert trainee.model.training
    assert not any(layer.disable_adapters for _, layer in layers(trainee.model))


@pytest.mark.parametrize(("weights", "terms"), [({"kl_weight": 0}, {"norm"}), ({"norm_weight": 0}, {"kl"})])
def test_a_term_of_weight_zero_is_not_even_computed(
    trainee: LoraTrainee, weights: dict[str, float], terms: set[str]
) -> None:
    assert set(general(trainee, TUNING.model_copy(update=weights))) == terms


def test_without_both_terms_no_general_text_is_read(trainee: LoraTrainee) -> None:
    assert not Objective(trainee, RoutingTuningSettings(kl_weight=0, norm_weight=0)).tuned
    assert Objective(trainee, TUNING).tuned


def test_the_total_is_the_weighted_sum(trainee: LoraTrainee) -> None:
    objective = Objective(trainee, RoutingTuningSettings(task_weight=2, kl_weight=10, norm_weight=100))
    parts = {"task": torch.tensor(1.0), "kl": torch.tensor(1.0), "norm": torch.tensor(1.0)}
    assert objective.total(parts).item() == 112


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train for"):
        RoutingTuningSettings(task_weight=0, kl_weight=0, norm_weight=0)


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSource, DataSource]:
    directory = tmp_path_factory.mktemp("tasks")
    write_task("past_tense", directory, train=200, test=4, seed=0)
    texts = directory / "general.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in general_text(60, 0)))
    task = DataSource(task="past_tense", location=str(directory / "past_tense.train.jsonl"))
    return task, DataSource(task="general", location=str(texts))


def run(
    sources: tuple[DataSource, DataSource], tuning: RoutingTuningSettings | None, **training: Any
) -> tuple[Trained, list[dict[str, Any]]]:
    task, texts = sources
    settings = {"engine": "torch", "steps": 30, "batch_size": 8, "learning_rate": 4e-3, "max_tokens": 64, **training}
    spec = TrainSpec(
        base=BaseModelConfig(),
        lora=LoraSettings(rank=4),
        training=TrainingSettings.model_validate(settings),
        data=(task,),
        tuning=tuning,
        general=texts if tuning is not None else None,
        output=Path("unused"),
        threads=1,
    )
    events: list[dict[str, Any]] = []
    return train(spec, events.append), events


def silence(adapter: Adapter) -> dict[str, float]:
    """Divergence and norm of a trained adapter on texts that training has not seen."""
    model, tokenizer = basemodel.load(BaseModelConfig(), "cpu")
    trainee = LoraTrainee(attach(model, LoraSettings(rank=4), 0))
    with torch.no_grad():
        for name, layer in layers(trainee.model):
            layer.lora_A["default"].weight.copy_(adapter[name].A)
            layer.lora_B["default"].weight.copy_(adapter[name].B)
        texts = [encode(Example("", (text,)), tokenizer, "{prompt}", 64) for text in general_text(10, 1)]
        return {name: float(value) for name, value in general(trainee, texts=texts).items()}


def test_a_tuned_expert_learns_its_task_and_stays_silent_elsewhere(sources: tuple[DataSource, DataSource]) -> None:
    plain, _ = run(sources, None)
    tuned, events = run(sources, TUNING)
    assert isinstance(plain.value, Adapter)
    assert isinstance(tuned.value, Adapter)
    assert silence(tuned.value)["norm"] < 0.5 * silence(plain.value)["norm"]
    assert silence(tuned.value)["kl"] < 0.5 * silence(plain.value)["kl"]
    assert tuned.metrics["task"] < 0.7 * events[1]["task"], "it learns its task"
    assert {"loss", "task", "kl", "norm"} <= set(events[-1])


def test_a_tuned_step_is_the_same_however_it_is_cut(sources: tuple[DataSource, DataSource]) -> None:
    whole, _ = run(sources, TUNING, steps=3)
    cut, _ = run(sources, TUNING, steps=3, accumulation=4)
    assert isinstance(whole.value, Adapter)
    assert isinstance(cut.value, Adapter)
    for name, factors in whole.value.items():
        assert torch.allclose(factors.B, cut.value[name].B, atol=1e-4)
    assert whole.metrics["loss"] == pytest.approx(cut.metrics["loss"], abs=1e-4)


def test_general_text_that_cannot_be_cut_is_refused(sources: tuple[DataSource, DataSource]) -> None:
    with pytest.raises(ConfigError, match="a batch of 2 examples cannot be cut") as refusal:
        run(sources, TUNING.model_copy(update={"general_batch": 2}), accumulation=4)
    assert "routing_tuning.general_batch" in refusal.value.hint


def test_routing_tuning_of_something_that_is_no_lora_is_refused_in_a_sentence(trainee: LoraTrainee) -> None:
    with pytest.raises(ConfigError, match="trains no router"):
        trainee.auxiliary()
    gate = RoutedTrainee(RoutedModel.gated(trainee.model.unload(), loud_adapter()), ("a",), whole=False, balanced=False)
    with pytest.raises(ConfigError, match="trains no LoRA"):
        Objective(gate, TUNING).terms(gate.model, Pass(collate(TEXTS, 0), general=True), Totals(task=1, general=6))


def loud_adapter() -> Adapter:
    name = "model.layers.0.self_attn.q_proj"
    model, _ = basemodel.load(BaseModelConfig(), "cpu")
    size = dict(model.named_modules())[name].in_features
    return Adapter({name: LoraFactors(torch.ones(1, size), torch.ones(size, 1), 1.0)})
