"""A folded model computes, alone, what the base model computes with the adapter on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.embedded import MODEL_DIR
from seedbed.common.errors import AdapterMismatchError, ModelError, SeedbedError, StorageError
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import read_manifest, write_adapter
from seedbed.server.adapters.files import merge_directories
from seedbed.server.adapters.fold import fold
from seedbed.server.adapters.plan import plan_merge

TOKENS = torch.arange(3, 27).reshape(2, 12)
Q, DOWN, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj", "lm_head"
SHAPES = {Q: (128, 128), DOWN: (128, 352), HEAD: (1536, 128)}


def expert(path: Path, seed: int, modules: tuple[str, ...] = (Q, DOWN), **shapes: Any) -> Path:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in modules:
        rows, columns = {**SHAPES, **shapes}[name]
        A, B = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
        found[name] = LoraFactors(A / 10, B / 10, 2.0)
    write_adapter(path, Adapter(found), kind="expert", base=BaseIdentity(name=""))
    return path


@pytest.fixture
def experts(tmp_path: Path) -> list[Path]:
    return [expert(tmp_path / f"e{index}", index) for index in range(2)]


def folded(inputs: list[Path], out: Path, model: str = "embedded", method: str = "average", **options: Any) -> Path:
    fold(plan_merge(inputs, method, dtype="float32", exact=True, **options), model, out)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval().double()(TOKENS).logits  # in float64, only the weights are rounded
    return found


def with_adapter(adapter: Path, base: Path | str = MODEL_DIR) -> torch.Tensor:
    """Logits of the base model with the adapter, by PEFT."""
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def test_the_folded_model_computes_what_base_and_adapter_compute(experts: list[Path], tmp_path: Path) -> None:
    merge_directories(experts, "average", tmp_path / "adapter")
    out = folded(experts, tmp_path / "model")
    expected, base = with_adapter(tmp_path / "adapter"), logits(AutoModelForCausalLM.from_pretrained(MODEL_DIR))
    assert (logits(AutoModelForCausalLM.from_pretrained(out)) - expected).abs().max() < 1e-5
    assert (base - expected).abs().max() > 1e-2


def test_it_is_a_whole_model_with_tokenizer_and_settings_for_generation(experts: list[Path], tmp_path: Path) -> None:
    out = folded(experts, tmp_path / "model")
    one, other = (AutoTokenizer.from_pretrained(path) for path in (out, MODEL_DIR))
    assert one("the cat sat").input_ids == other("the cat sat").input_ids
    assert GenerationConfig.from_pretrained(out).to_dict() == GenerationConfig.from_pretrained(MODEL_DIR).to_dict()
    record = json.loads((out / "seedbed_fold.json").read_text())
    assert record["parents"] == [read_manifest(path).digest for path in experts]
    assert record["settings"]["method"] == "average"


def test_tensors_that_no_adapter_touches_stay_bit_by_bit(experts: list[Path], tmp_path: Path) -> None:
    out = folded(experts, tmp_path / "model")
    before, after = (load_file(Path(path) / "model.safetensors") for path in (MODEL_DIR, out))
    assert set(before) == set(after)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"{Q}.weight", f"{DOWN}.weight"}


def test_a_dense_merge_is_folded_whole_unless_a_rank_is_asked_for(experts: list[Path], tmp_path: Path) -> None:
    before = load_file(Path(MODEL_DIR) / "model.safetensors")[f"{Q}.weight"]
    ranks = {}
    for name, options in {"whole": {}, "cut": {"rank": 4}}.items():
        out = folded(experts, tmp_path / name, method="ties", options={"density": 0.5}, **options)
        update = load_file(out / "model.safetensors")[f"{Q}.weight"] - before
        ranks[name] = int(torch.linalg.matrix_rank(update, rtol=1e-3))
    assert ranks["whole"] > 100
    assert ranks["cut"] == 4
    svd = folded(experts, tmp_path / "svd", method="svd")  # whose purpose is the cut
    assert torch.linalg.matrix_rank(load_file(svd / "model.safetensors")[f"{Q}.weight"] - before, rtol=1e-3) == 4


def test_an_output_head_that_shares_the_embeddings_gets_a_weight_of_its_own(tmp_path: Path) -> None:
    adapter = expert(tmp_path / "e", 0, (Q, HEAD))
    out = folded([adapter], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    before = load_file(Path(MODEL_DIR) / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert not torch.equal(model.get_output_embeddings().weight, before)
    assert (logits(model) - with_adapter(adapter)).abs().max() < 1e-5


def test_a_model_in_several_files_is_folded_file_by_file(tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(MODEL_DIR).save_pretrained(base, max_shard_size="1MB")
    adapter = expert(tmp_path / "e", 0, (Q, DOWN, HEAD))
    out = folded([adapter], tmp_path / "model", str(base))
    names = {path.name for path in base.glob("*.safetensors")}
    assert len(names) > 2
    assert {path.name for path in out.glob("*.safetensors")} == names
    index, old = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (out, base))
    assert set(index["weight_map"]) == set(old["weight_map"]) | {"lm_head.weight"}
    assert "lm_head.weight" in load_file(out / index["weight_map"]["lm_head.weight"])
    assert index["metadata"]["total_size"] == old["metadata"]["total_size"] + 4 * 1536 * 128
    assert (logits(AutoModelForCausalLM.from_pretrained(out)) - with_adapter(adapter, base)).abs().max() < 1e-5


def test_the_dtype_of_the_base_is_kept_and_each_weight_is_rounded_once(tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(MODEL_DIR).bfloat16().save_pretrained(base)
    inputs = [expert(tmp_path / "e", 0)]
    out = folded(inputs, tmp_path / "model", str(base))
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    merge_directories(inputs, "average", tmp_path / "adapter")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{Q}.lora_{letter}.weight"] for letter in "AB")
    expected = (before[f"{Q}.weight"].float() + 2.0 * B @ A).bfloat16()
    assert after[f"{Q}.weight"].dtype == torch.bfloat16
    assert (after[f"{Q}.weight"] != expected).float().mean() < 1e-3  # ties of rounding, by the order of a sum


def test_layers_that_lie_transposed_are_folded_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path / "base")
    name = "transformer.h.1.attn.c_attn"
    adapter = expert(tmp_path / "e", 0, (name,), **{name: (48, 16)})
    config = json.loads((adapter / "adapter_config.json").read_text())
    out = folded([adapter], tmp_path / "model", str(tmp_path / "base"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": True}))
    got = logits(AutoModelForCausalLM.from_pretrained(out))
    assert (got - with_adapter(adapter, tmp_path / "base")).abs().max() < 1e-5
    assert (got - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))).abs().max() > 1e-3


def test_files_whose_names_lack_the_models_first_part_are_found(tmp_path: Path) -> None:
    """As in the first GPT-2 files: ``h.0…`` for what the model calls ``transformer.h.0…``."""
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(path).items()}, path, {"format": "pt"})
    name = "transformer.h.0.mlp.c_fc"
    adapter = expert(tmp_path / "e", 0, (name,), **{name: (64, 16)})
    out = folded([adapter], tmp_path / "model", str(tmp_path / "base"))
    before, after = load_file(path), load_file(out / "model.safetensors")
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"h.0.mlp.c_fc.weight"}


def refusal(inputs: list[Path], out: Path, model: str = "embedded") -> SeedbedError:
    with pytest.raises(SeedbedError) as caught:
        folded(inputs, out, model)
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".tmp")]
    return caught.value


def test_what_does_not_fit_is_refused_and_nothing_is_written(experts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "model"
    unknown = refusal([expert(tmp_path / "a", 0, ("model.layers.9.self_attn.q_proj",),
                              **{"model.layers.9.self_attn.q_proj": (128, 128)})], out)  # fmt: skip
    assert isinstance(unknown, AdapterMismatchError)
    assert "no module 'model.layers.9.self_attn.q_proj'" in unknown.message
    wrong = refusal([expert(tmp_path / "b", 0, (Q,), **{Q: (64, 128)})], out)
    assert "[128, 128], the adapter expects [64, 128]" in wrong.message
    norm = "model.layers.0.input_layernorm"
    assert "not a linear layer" in refusal([expert(tmp_path / "c", 0, (norm,), **{norm: (128, 1)})], out).message
    assert isinstance(refusal(experts, out, str(tmp_path / "e0")), ModelError)  # an adapter is no model
    assert not out.exists()
    out.mkdir()
    assert isinstance(refusal(experts, out), StorageError)


def test_adapters_of_another_base_are_refused_by_its_hash(tmp_path: Path) -> None:
    update = Adapter({Q: LoraFactors(torch.ones(1, 128), torch.ones(128, 1), 1.0)})
    write_adapter(tmp_path / "e", update, kind="expert", base=BaseIdentity(name="embedded", digest="2" * 64))
    assert "another base model" in refusal([tmp_path / "e"], tmp_path / "model").message


def test_a_quantized_base_is_refused(experts: list[Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(MODEL_DIR).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "quantized" in refusal(experts, tmp_path / "model", str(base)).message


def test_a_weight_that_overflows_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(MODEL_DIR).half().save_pretrained(base)
    update = Adapter({Q: LoraFactors(torch.full((1, 128), 1e3), torch.full((128, 1), 1e3), 1.0)})
    write_adapter(tmp_path / "e", update, kind="expert", base=BaseIdentity(name=""))
    assert "not finite in F16" in refusal([tmp_path / "e"], tmp_path / "model", str(base)).message
