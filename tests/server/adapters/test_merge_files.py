"""Directories in, one directory out: PEFT computes with it what a loop over the experts computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    ConfigError,
    NonFiniteError,
    SeedbedError,
    StorageError,
)
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import read_adapter, read_manifest, write_adapter
from seedbed.server.adapters import stream
from seedbed.server.adapters.files import merge_directories
from seedbed.server.adapters.plan import plan_merge

TOKENS = torch.arange(12).reshape(2, 6)
EXPERTS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {"r": 3, "lora_alpha": 3, "target_modules": "all-linear", "rank_pattern": {"q_proj": 1}},
]


def tiny_llama(hidden: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2)).eval()


def save_with_peft(path: Path, seed: int, base: str = "tiny", hidden: int = 16, **options: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(hidden), LoraConfig(init_lora_weights=False, **options))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(path)
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return [save_with_peft(tmp_path / f"expert{i}", i, **options) for i, options in enumerate(EXPERTS)]


def loop_over_experts(directories: list[Path], shares: list[float]) -> torch.Tensor:
    """Logits with ``W0 x + Σ w_i s_i B_i A_i x`` in every layer, from PEFT's files and scalings, in a plain loop."""
    from peft import PeftModel

    model = tiny_llama()
    updates: dict[str, list[tuple[float, torch.Tensor, torch.Tensor]]] = {}
    for directory, share in zip(directories, shares, strict=True):
        loaded = PeftModel.from_pretrained(tiny_llama(), directory)
        for name, layer in loaded.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
                updates.setdefault(name, []).append((share * layer.scaling["default"], A, B))

    def hook(terms: list[tuple[float, torch.Tensor, torch.Tensor]]) -> Any:
        return lambda _layer, args, output: output + sum(c * (args[0] @ A.T) @ B.T for c, A, B in terms)

    for name, terms in updates.items():
        model.get_submodule(name).register_forward_hook(hook(terms))
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def peft_logits(path: Path) -> torch.Tensor:
    from peft import PeftModel

    with torch.no_grad():
        logits: torch.Tensor = PeftModel.from_pretrained(tiny_llama(), path).eval()(TOKENS).logits
    return logits


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
def test_the_average_in_peft_gives_the_mean_of_the_experts_outputs(
    inputs: list[Path], tmp_path: Path, weights: list[float] | None
) -> None:
    merge_directories(inputs, "average", tmp_path / "out", weights=weights)
    expected = loop_over_experts(inputs, [1 / 3] * 3 if weights is None else [0.25, 0.0, 0.75])
    assert (peft_logits(tmp_path / "out") - expected).abs().max() < 1e-5
    assert (peft_logits(inputs[0]) - expected).abs().max() > 1e-2


def test_svd_of_full_rank_gives_the_mean_and_of_a_small_rank_has_that_rank(inputs: list[Path], tmp_path: Path) -> None:
    merge_directories(inputs, "svd", tmp_path / "full", rank=7)
    assert (peft_logits(tmp_path / "full") - loop_over_experts(inputs, [1 / 3] * 3)).abs().max() < 1e-5
    manifest = merge_directories(inputs, "svd", tmp_path / "small", rank=2)
    adapter, _ = read_adapter(tmp_path / "small")
    assert manifest.rank == 2
    assert {factors.rank for factors in adapter.values()} == {2}


def test_a_rank_above_what_one_module_has_is_clipped_there(inputs: list[Path], tmp_path: Path) -> None:
    merge_directories(inputs, "svd", tmp_path / "out", rank=6)
    ranks = {name.rpartition(".")[2]: factors.rank for name, factors in read_adapter(tmp_path / "out")[0].items()}
    assert ranks["q_proj"] == 6  # of 2 + 4 + 1
    assert ranks["up_proj"] == 3  # only the third expert adapts it


def test_factor_mean_merges_adapters_of_one_shape(tmp_path: Path) -> None:
    experts = [save_with_peft(tmp_path / str(i), i, **EXPERTS[0]) for i in range(2)]
    merge_directories(experts, "factor_mean", tmp_path / "out")
    first, second, merged = (read_adapter(path)[0] for path in (*experts, tmp_path / "out"))
    for name, factors in merged.items():
        assert torch.allclose(factors.A, (first[name].A + second[name].A) / 2)
        assert factors.scaling == 4.0


def test_the_result_names_its_parents_and_is_the_same_every_time(inputs: list[Path], tmp_path: Path) -> None:
    one, two = (merge_directories(inputs, "svd", tmp_path / name, rank=2) for name in ("one", "two"))
    assert one.digest == two.digest == read_manifest(tmp_path / "one").digest
    assert one.parents == tuple(read_adapter(path)[1].digest for path in inputs)
    assert (one.kind, one.base.name, one.settings["method"]) == ("merge", "tiny", "svd")
    again = merge_directories([tmp_path / "one", inputs[0]], "average", tmp_path / "three")
    assert again.parents[0] == one.digest


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("avrage", {}, "no merge method"),
        ("average", {"rank": 4}, "does not take a rank"),
        ("svd", {"rank": 8}, "expected a rank from 1 to 7"),
        ("svd", {"rank": 0}, "'rank': Input should be greater than or equal to 1"),
        ("average", {"weights": [1.0, 2.0]}, "expected 3 weights"),
        ("average", {"weights": [1.0, 2.0, -1.0]}, "negative"),
        ("average", {"weights": [0.0, 0.0, 0.0]}, "all weights are zero"),
        ("factor_mean", {}, "module model.layers.0.mlp.down_proj is missing"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(
    inputs: list[Path], tmp_path: Path, method: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SeedbedError, match=sentence):
        merge_directories(inputs, method, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expert0", "expert1", "expert2"]


def test_no_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        merge_directories([], "average", tmp_path / "out")


def test_an_output_that_is_there_is_refused(inputs: list[Path]) -> None:
    before = (inputs[1] / "adapter_config.json").read_bytes()
    with pytest.raises(StorageError, match="already there"):
        merge_directories(inputs, "average", inputs[1])
    assert (inputs[1] / "adapter_config.json").read_bytes() == before


def test_adapters_of_two_base_models_are_refused(inputs: list[Path], tmp_path: Path) -> None:
    other = save_with_peft(tmp_path / "other", 9, base="another", **EXPERTS[0])
    with pytest.raises(AdapterMismatchError, match="expected tiny, got another"):
        merge_directories([*inputs, other], "average", tmp_path / "out")


def test_shapes_that_differ_are_refused_by_module_and_directory(inputs: list[Path], tmp_path: Path) -> None:
    wide = save_with_peft(tmp_path / "wide", 9, hidden=32, **EXPERTS[0])
    with pytest.raises(
        AdapterMismatchError, match=r"q_proj: expected shape \[16, 16\].*expert0, got \[32, 32\] in .*wide"
    ):
        merge_directories([*inputs, wide], "average", tmp_path / "out")


def test_an_expert_with_a_single_nan_is_refused(inputs: list[Path], tmp_path: Path) -> None:
    path = inputs[2] / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[0]
    tensors[key][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(NonFiniteError, match="lora_A holds 1 values"):
        merge_directories(inputs, "average", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_expert_that_is_not_plain_lora_is_refused(inputs: list[Path], tmp_path: Path) -> None:
    config = inputs[0] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(AdapterFormatError, match="DoRA"):
        merge_directories(inputs, "average", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0]])
@pytest.mark.parametrize("target", [None, "float32", "bfloat16"])
def test_the_streamed_average_is_the_average_to_the_bit(
    tmp_path: Path, dtype: torch.dtype, weights: list[float] | None, target: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_PART", 64)  # so that even these small factors come in several parts
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 5), "b": (4, 9)}
    for index, (rank, scaling) in enumerate(((2, 1.0), (3, 1.0), (1, 0.5))):
        modules = {
            name: LoraFactors(
                torch.randn(rank, columns, generator=generator).to(dtype),
                torch.randn(rows, rank, generator=generator).to(dtype),
                scaling,
            )
            for name, (rows, columns) in shapes.items()
            if (name, index) != ("b", 1)
        }
        write_adapter(tmp_path / f"e{index}", Adapter(modules), kind="expert", base=BaseIdentity(name="tiny"))
    inputs = [tmp_path / f"e{index}" for index in range(3)]
    merge_directories(inputs, "average", tmp_path / "out", weights=weights, dtype=target)
    streamed, _ = read_adapter(tmp_path / "out")
    plan = plan_merge(inputs, "average", weights=weights, dtype=target)
    for name, expected in plan.modules(plan.names):
        assert torch.equal(streamed[name].A, expected.A)
        assert torch.equal(streamed[name].B, expected.B)
        assert streamed[name].scaling == pytest.approx(expected.scaling, rel=1e-15)


def test_the_result_is_of_the_kind_of_model_that_its_inputs_are_of(tmp_path: Path) -> None:
    """PEFT's default is a plain module; a class of its own would ask more of the model."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def net() -> torch.nn.Sequential:
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))

    for index in (1, 2):
        model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
        model.save_pretrained(tmp_path / f"plain{index}")
    merge_directories([tmp_path / "plain1", tmp_path / "plain2"], "average", tmp_path / "merged")
    PeftModel.from_pretrained(net(), tmp_path / "merged")
    inputs = [
        save_with_peft(
            tmp_path / f"class{index}", index, r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION"
        )
        for index in (1, 2)
    ]
    merge_directories(inputs, "svd", tmp_path / "classes", rank=2)
    assert json.loads((tmp_path / "classes" / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"


def test_an_output_head_that_peft_saves_with_its_frozen_weight_is_an_adapter_like_any_other(tmp_path: Path) -> None:
    targets = ["lm_head", "q_proj"]
    inputs = [save_with_peft(tmp_path / f"head{index}", index, r=2, target_modules=targets) for index in (1, 2)]
    held = load_file(inputs[0] / "adapter_model.safetensors")
    assert any(key.endswith("lm_head.base_layer.weight") for key in held), "PEFT puts it there"
    merge_directories(inputs, "average", tmp_path / "merged")
    value, _ = read_adapter(tmp_path / "merged")
    expected = [read_adapter(path)[0]["lm_head"].delta() for path in inputs]
    assert torch.allclose(value["lm_head"].delta(), (expected[0] + expected[1]) / 2, atol=1e-6)


def test_modules_that_only_the_seed_has_are_scaled_like_all_of_it(inputs: list[Path], tmp_path: Path) -> None:
    """inputs[2] adapts all linear layers, the first only two: with λ the rest is (1 − λ) of the seed."""
    seed, _ = read_adapter(inputs[2])
    for scale in (0.0, 3.0):
        out = tmp_path / f"scaled{scale}"
        merge_directories(inputs[:1], "average", out, options={"task_scale": scale}, seed=inputs[2])
        value, _ = read_adapter(out)
        assert set(value) == set(seed)
        only = next(name for name in seed if name.endswith("o_proj"))
        assert torch.allclose(value[only].delta(), (1 - scale) * seed[only].delta(), atol=1e-6)
    merge_directories(inputs[:1], "svd", tmp_path / "half", rank=4, options={"include_seed": True}, seed=inputs[2])
    half, _ = read_adapter(tmp_path / "half")
    assert torch.allclose(half[only].delta(), seed[only].delta() / 2, atol=1e-5)


def test_a_result_beyond_its_dtype_is_not_blamed_on_training(tmp_path: Path) -> None:
    values = {"layer": LoraFactors(torch.ones(1, 2).half(), torch.full((2, 1), 3e4).half(), 1.0)}
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        write_adapter(path, Adapter(values), kind="expert", base=BaseIdentity(name="tiny"))
    with pytest.raises(NonFiniteError, match="the result is beyond the numbers of float16") as refused:
        merge_directories(paths, "linear", tmp_path / "far" / "away" / "sum", weights=[9.0, 9.0])
    assert "--dtype float32" in refused.value.hint
    assert not (tmp_path / "far").exists(), "no empty directory is left"


def test_an_expert_of_weight_zero_is_looked_at_all_the_same(inputs: list[Path], tmp_path: Path) -> None:
    path = inputs[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    tensors[first][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(NonFiniteError, match=r"expert1: module .* holds 1 values"):
        merge_directories(inputs, "average", tmp_path / "mean", weights=[1.0, 0.0, 1.0])
