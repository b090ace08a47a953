"""Training: the same factors however a step is cut or laid out, the same bits when it is done again, loud when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from seedbed.client import training as loop
from seedbed.client.data import Batch, Tokens, collate, pack
from seedbed.client.lora import attach, extract, layers, load_factors
from seedbed.client.objective import is_same, label_losses
from seedbed.client.spec import TrainSpec
from seedbed.client.training import Trained, choose_engine, learning_rate, train
from seedbed.common import basemodel
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.config import BaseModelConfig, LoraSettings, TrainingSettings
from seedbed.common.embedded import write_task
from seedbed.common.errors import AdapterMismatchError, ConfigError, DataError, TrainingError
from seedbed.common.jobs import DataSource, Job, Node
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import write_adapter

Q = "model.layers.0.self_attn.q_proj"
RAGGED = [Tokens(tuple(range(5, 5 + length)), 1) for length in (3, 6, 9, 12)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSource, ...]:
    directory = tmp_path_factory.mktemp("tasks")
    for task in ("addition", "antonym"):
        write_task(task, directory, train=60, test=4, seed=0)
    return tuple(
        DataSource(task=task, location=str(directory / f"{task}.train.jsonl")) for task in ("addition", "antonym")
    )


@pytest.fixture
def model() -> Any:
    return basemodel.load(BaseModelConfig(), "cpu")[0]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSource, ...]:
    """Completions of one to nine words, so that passes of equally many examples hold unequally many labels."""
    path = tmp_path_factory.mktemp("tasks") / "uneven.jsonl"
    records = [{"prompt": "count", "completion": " ".join(["more"] * number)} for number in range(1, 10)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (DataSource(task="uneven", location=str(path)),)


def spec(data: tuple[DataSource, ...], **changes: Any) -> TrainSpec:
    settings = {"engine": "torch", "steps": 3, "batch_size": 8, "warmup_steps": 1, "log_every": 2}
    settings |= changes.pop("training", {})
    values = {
        "base": BaseModelConfig(),
        "lora": LoraSettings(rank=4),
        "data": data,
        "output": Path("unused"),
        "threads": 1,
    }
    return TrainSpec(training=TrainingSettings.model_validate(settings), **{**values, **changes})


def run(data: tuple[DataSource, ...], **changes: Any) -> Trained:
    return train(spec(data, **changes), lambda _: None)


def distance(one: Adapter, other: Adapter) -> float:
    """Largest difference of any two entries."""
    assert one.keys() == other.keys()
    pairs = [(getattr(one[name], factor), getattr(other[name], factor)) for name in one for factor in "AB"]
    return max(float((left - right).abs().max()) for left, right in pairs)


# --- the schedule of the learning rate ---------------------------------------------------------------------------------


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    training = TrainingSettings(steps=6, warmup_steps=2, learning_rate=4.0)
    assert [learning_rate(step, training) for step in range(6)] == [2.0, 4.0, 4.0, 3.0, 2.0, 1.0]


def test_a_job_shorter_than_its_warm_up_still_reaches_the_peak() -> None:
    training = TrainingSettings(steps=2, warmup_steps=5, learning_rate=4.0)
    assert [learning_rate(step, training) for step in range(2)] == [2.0, 4.0]
    assert learning_rate(0, TrainingSettings(steps=2, warmup_steps=0, learning_rate=4.0)) == 4.0


# --- the objective -----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_negative_log_probability_of_each_label(model: Any) -> None:
    batch = collate([Tokens((5, 6, 7), 1), Tokens((8, 9), 1)], 0)
    with torch.no_grad():
        long = torch.log_softmax(model(torch.tensor([[5, 6]])).logits[0], -1)
        short = torch.log_softmax(model(torch.tensor([[8]])).logits[0], -1)
        losses = label_losses(model, model.get_output_embeddings(), batch)
    expected = -torch.stack([long[0, 6], long[1, 7], short[0, 9]])
    assert torch.allclose(losses, expected, atol=1e-5)


def test_logits_at_labels_alone_give_the_same_loss_as_all_logits(model: Any) -> None:
    batch = collate(RAGGED, 0)
    with torch.no_grad():
        assert torch.allclose(label_losses(model, None, batch), label_losses(model, model.lm_head, batch), atol=1e-5)
    assert not model.lm_head._forward_pre_hooks


def test_packed_examples_give_the_same_losses_and_gradients_as_padded_ones(model: Any) -> None:
    peft_model = attach(model, LoraSettings(rank=2), 0)
    gradients = []
    for batch in (collate(RAGGED, 0), pack(RAGGED, 0, 64), pack(RAGGED, 0, 12)):
        assert is_same(peft_model, model.lm_head, collate(RAGGED, 0), batch)
        peft_model.zero_grad()
        label_losses(peft_model, model.lm_head, batch).sum().backward()
        gradients.append([layer.lora_B["default"].weight.grad.clone() for _, layer in layers(peft_model)])
    for packed in gradients[1:]:
        assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(gradients[0], packed, strict=True))


def test_a_model_that_mixes_packed_examples_is_found_out(model: Any) -> None:
    mixed = pack(RAGGED, 0, 64)
    forgetful = Batch(mixed.input_ids, mixed.labels, attention_mask=torch.ones_like(mixed.input_ids))
    assert not is_same(model, model.lm_head, collate(RAGGED, 0), forgetful)


def test_a_model_that_takes_no_positions_is_given_padded_rows() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(20, 20))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
            return type("Output", (), {"logits": self.weight[input_ids]})

    assert not is_same(Bare(), None, collate(RAGGED, 0), pack(RAGGED, 0, 64))


# --- the trainable LoRA ------------------------------------------------------------------------------------------------


def test_a_fresh_lora_changes_nothing_and_is_drawn_from_its_seed(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    torch.manual_seed(1)
    fresh = attach(model, LoraSettings(rank=4, alpha=8), 7)
    assert torch.equal(fresh(ids).logits, before)
    adapter = extract(fresh)
    assert adapter[Q].scaling == 2.0
    assert adapter[Q].rank == 4
    assert not adapter[Q].B.any()
    bound = adapter[Q].A.shape[1] ** -0.5
    assert 0.9 * bound < float(adapter[Q].A.abs().max()) <= bound
    torch.manual_seed(2)
    again = extract(attach(basemodel.load(BaseModelConfig(), "cpu")[0], LoraSettings(rank=4, alpha=8), 7))
    other = extract(attach(basemodel.load(BaseModelConfig(), "cpu")[0], LoraSettings(rank=4, alpha=8), 8))
    assert distance(adapter, again) == 0
    assert distance(adapter, other) > 0


def test_targets_select_modules_and_a_wrong_one_is_refused(model: Any) -> None:
    adapter = extract(attach(model, LoraSettings(targets=("q_proj", "v_proj")), 0))
    assert {name.rsplit(".", 1)[1] for name in adapter} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match="does not fit the base model"):
        attach(basemodel.load(BaseModelConfig(), "cpu")[0], LoraSettings(targets=("nothing",)), 0)


def test_factors_stay_float32_on_a_bfloat16_model() -> None:
    model, _ = basemodel.load(BaseModelConfig(dtype="bfloat16"), "cpu")
    peft_model = attach(model, LoraSettings(), 0)
    assert {layer.lora_A["default"].weight.dtype for _, layer in layers(peft_model)} == {torch.float32}


def test_factors_that_are_loaded_come_back_bit_by_bit(model: Any) -> None:
    peft_model = attach(model, LoraSettings(rank=4), 0)
    changed = extract(peft_model).map(lambda f: LoraFactors(f.A + 1, f.B + 2, f.scaling))
    load_factors(peft_model, changed)
    assert distance(extract(peft_model), changed) == 0


def test_factors_that_do_not_fit_are_refused_with_both_values(model: Any) -> None:
    peft_model = attach(model, LoraSettings(rank=4, alpha=8), 0)
    own = extract(peft_model)
    narrow = own.map(lambda f: LoraFactors(f.A[:2], f.B[:, :2], f.scaling))
    with pytest.raises(AdapterMismatchError, match=r"expected A \[4, .*has A \[2, "):
        load_factors(peft_model, narrow)
    with pytest.raises(AdapterMismatchError, match=r"scaling 2, but .* scaling 4"):
        load_factors(peft_model, own.map(lambda f: LoraFactors(f.A, f.B, 4.0)))
    with pytest.raises(AdapterMismatchError, match=f"'{Q}' is missing in the adapter"):
        load_factors(peft_model, Adapter({name: factors for name, factors in own.items() if name != Q}))
    assert distance(extract(peft_model), own) == 0


# --- whole jobs --------------------------------------------------------------------------------------------------------


def test_training_makes_the_loss_smaller_and_says_how_it_goes(data: tuple[DataSource, ...]) -> None:
    events: list[dict[str, Any]] = []
    trained = train(spec(data, training={"steps": 12, "log_every": 5}), events.append)
    assert [event["event"] for event in events] == ["start", "step", "step", "step"]
    assert [event.get("step") for event in events] == [None, 5, 10, 12]
    assert events[0]["ranks"] == 1
    assert trained.metrics["loss"] < 0.7 * trained.metrics["first_loss"]
    assert trained.metrics["loss"] == events[-1]["loss"]
    assert trained.metrics["tokens"] == events[-1]["tokens"]


def test_the_same_spec_gives_the_same_bits_and_another_seed_others(data: tuple[DataSource, ...]) -> None:
    lora = LoraSettings(rank=4, dropout=0.1)
    first = run(data, lora=lora)
    assert distance(first.value, run(data, lora=lora).value) == 0
    assert first.metrics == run(data, lora=lora).metrics
    assert distance(first.value, run(data, lora=lora, data_seed=1).value) > 1e-4
    assert distance(first.value, run(data, lora=lora, init_seed=1).value) > 1e-2


@pytest.mark.parametrize("accumulation", [2, 8])
def test_a_step_in_several_passes_is_the_same_step(uneven: tuple[DataSource, ...], accumulation: int) -> None:
    whole, cut = run(uneven), run(uneven, training={"accumulation": accumulation})
    assert cut.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
    assert distance(whole.value, cut.value) < 1e-4


def test_packing_gives_the_same_factors_as_padding(
    data: tuple[DataSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = run(data)
    monkeypatch.setattr(loop, "pack", lambda examples, pad, _max_tokens: collate(examples, pad))
    assert distance(packed.value, run(data).value) < 1e-4


def test_training_goes_on_from_an_adapter(data: tuple[DataSource, ...], tmp_path: Path) -> None:
    seed = run(data)
    identity = BaseIdentity(name="embedded", digest="0" * 64)
    write_adapter(tmp_path / "seed", seed.value, kind="seed", base=identity)
    slow = {"learning_rate": 1e-9}
    assert distance(run(data, start=tmp_path / "seed", training=slow).value, seed.value) < 1e-6
    fresh = run(data, init_seed=5, start=tmp_path / "seed")
    assert fresh.metrics["first_loss"] < seed.metrics["first_loss"]


def test_a_loss_that_is_no_number_is_a_training_error(data: tuple[DataSource, ...]) -> None:
    with pytest.raises(TrainingError, match=r"the loss became (nan|inf) at step \d of 8") as failure:
        run(data, training={"learning_rate": 1e30, "steps": 8, "warmup_steps": 0})
    assert "learning_rate" in failure.value.hint


def test_factors_that_are_no_numbers_after_the_last_step_are_a_training_error() -> None:
    factors = LoraFactors(torch.ones(1, 2), torch.tensor([[1.0], [float("nan")]]), 1.0)
    with pytest.raises(TrainingError, match="'broken' that are not finite"):
        loop._require_finite(Adapter({"broken": factors}))


def test_a_completion_that_does_not_fit_is_refused_before_the_model_is_loaded(
    data: tuple[DataSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basemodel, "load", None)
    with pytest.raises(DataError, match="leaves no room"):
        run(data, training={"max_tokens": 2})


def test_the_engine_is_torch_without_a_gpu_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_engine(TrainingSettings()) == "torch"
    assert choose_engine(TrainingSettings(engine="deepspeed")) == "deepspeed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_engine(TrainingSettings()) == "deepspeed"
    assert choose_engine(TrainingSettings(engine="torch")) == "torch"


def test_more_ranks_than_examples_are_refused(data: tuple[DataSource, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="a batch of 2 examples cannot be cut for 3 ranks with 1 passes each"):
        run(data, training={"engine": "deepspeed", "batch_size": 2})


def test_a_spec_is_made_from_a_job_and_a_participant(data: tuple[DataSource, ...]) -> None:
    node = Node(name="n", base=BaseModelConfig(), store=Path("s"), work=Path("w"), data=data, threads=2)
    job = Job(
        kind="joint",
        name="j",
        base=BaseIdentity(name="embedded", digest="d"),
        tasks=("antonym",),
        prompt="{prompt}?",
        limit=9,
        fraction=0.5,
        parent="p",
        lora=LoraSettings(),
        training=TrainingSettings(),
        data_seed=3,
    )
    made = TrainSpec.of(job, node, Path("out"), Path("start"))
    (source,) = made.data
    assert (source.task, source.prompt, source.limit, source.fraction) == ("antonym", "{prompt}?", 9, 0.5)
    assert (made.parents, made.task, made.recipe, made.threads) == (("p",), "antonym", job.recipe, 2)
    assert TrainSpec.model_validate_json(made.model_dump_json()) == made
    with pytest.raises(DataError, match="'n' has no data of the task 'other'"):
        TrainSpec.of(job.model_copy(update={"tasks": ("other",)}), node, Path("out"))
