"""Seedbed reads what PEFT wrote, PEFT computes what Seedbed wrote, and what is wrong is refused with a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.attach import AdapterSlot
from seedbed.common.checks import check_update
from seedbed.common.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterMismatchError,
    NonFiniteError,
    StorageError,
)
from seedbed.common.manifest import BaseIdentity, Manifest
from seedbed.common.peft_config import make_peft_config, parse_peft_config
from seedbed.common.storage import read_adapter, read_manifest, write_adapter

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = BaseIdentity(name="tiny", digest="b" * 64)
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
TOKENS = torch.arange(12).reshape(2, 6)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2)).eval()


def peft_directory(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    """Let PEFT write an adapter whose factors are all random, and return the logits that PEFT has with it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(init_lora_weights=False, **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(path)
    with torch.no_grad():
        logits: torch.Tensor = model.float()(TOKENS).logits
    return logits


def our_logits(adapter: Adapter) -> torch.Tensor:
    model = tiny_llama()
    AdapterSlot(model).put(adapter)
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def peft_logits(path: Path) -> torch.Tensor:
    from peft import PeftModel

    with torch.no_grad():
        logits: torch.Tensor = PeftModel.from_pretrained(tiny_llama(), path).eval()(TOKENS).logits
    return logits


def small_adapter() -> Adapter:
    """Two modules of different ranks and scalings, one of a scaling that no float has exactly."""
    torch.manual_seed(1)
    return Adapter(
        {
            Q: LoraFactors(torch.randn(2, 16), torch.randn(16, 2), 1.5),
            V: LoraFactors(torch.randn(3, 16), torch.randn(16, 3), 0.1),
        }
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"model\.layers\.1\..*down_proj": 6},
        "alpha_pattern": {"^model.layers.0.mlp.up_proj": 32, "self_attn.[kv]_proj": 2},
    },
    "rslora with patterns": {
        "r": 2,
        "use_rslora": True,
        "target_modules": ["k_proj", "gate_proj"],
        "rank_pattern": {"layers.0.self_attn.k_proj": 5},
        "alpha_pattern": {"gate_proj": 3},
    },
    "one layer": {"r": 3, "target_modules": ["o_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_what_peft_wrote_computes_the_same_here_and_when_written_again(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = peft_directory(tmp_path / "peft", **options)
    adapter, manifest = read_adapter(tmp_path / "peft")
    assert manifest.kind == "external"
    assert torch.allclose(our_logits(adapter), expected, atol=1e-5)
    write_adapter(tmp_path / "ours", adapter, kind="expert", base=BASE)
    assert torch.allclose(peft_logits(tmp_path / "ours"), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = peft_directory(tmp_path / "peft", dtype, **OPTIONS["plain"])
    adapter, manifest = read_adapter(tmp_path / "peft")
    assert {factors.A.dtype for factors in adapter.values()} == {dtype}
    assert manifest.dtype == str(dtype).removeprefix("torch.")
    write_adapter(tmp_path / "ours", adapter, kind="expert", base=BASE)
    assert torch.allclose(peft_logits(tmp_path / "ours"), expected, atol=1e-5)


def test_mixed_ranks_and_scalings_survive_the_way_through_peft(tmp_path: Path) -> None:
    adapter = small_adapter()
    write_adapter(tmp_path / "a", adapter, kind="expert", base=BASE)
    assert torch.allclose(peft_logits(tmp_path / "a"), our_logits(adapter), atol=1e-5)
    again, _ = read_adapter(tmp_path / "a")
    assert {name: (f.rank, f.scaling) for name, f in again.items()} == {Q: (2, 1.5), V: (3, pytest.approx(0.1))}


def test_a_module_whose_name_ends_as_anothers_keeps_its_own_rank() -> None:
    one, two = (LoraFactors(torch.ones(rank, 4), torch.ones(4, rank), 1.0) for rank in (1, 2))
    adapter = Adapter({"proj": two, "a.proj": one, "b.proj": one})
    config = parse_peft_config(make_peft_config(adapter, "base"), "test")
    assert {name: config.rank_of(name) for name in adapter} == {"proj": 2, "a.proj": 1, "b.proj": 1}


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_adapter(tmp_path / name, small_adapter(), kind="expert", base=BASE, metrics={"loss": 0.5})
    for file in (TENSORS, CONFIG, "seedbed.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_manifest_comes_back_and_names_its_parents(tmp_path: Path) -> None:
    manifest = write_adapter(
        tmp_path / "a", small_adapter(), kind="merge", base=BASE, parents=("1" * 64,), task="t", settings={"x": 1}
    )
    _, again = read_adapter(tmp_path / "a")
    assert again == manifest == read_manifest(tmp_path / "a")
    assert (again.rank, again.modules, again.dtype, again.parents) == (3, 2, "float32", ("1" * 64,))


def test_keys_with_an_adapters_name_or_without_the_prefix_are_read(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", small_adapter(), kind="expert", base=BASE)
    tensors = load_file(tmp_path / "a" / TENSORS)
    renamed = {
        key.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for key, tensor in tensors.items()
    }
    save_file(renamed, tmp_path / "a" / TENSORS)
    (tmp_path / "a/seedbed.json").unlink()
    adapter, _ = read_adapter(tmp_path / "a")
    assert torch.equal(adapter[Q].A, small_adapter()[Q].A)


def test_what_is_read_does_not_depend_on_the_file(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", small_adapter(), kind="expert", base=BASE)
    adapter, _ = read_adapter(tmp_path / "a")
    (tmp_path / "a" / TENSORS).write_bytes(b"")
    assert torch.equal(adapter[Q].A, small_adapter()[Q].A)


def test_an_output_that_is_there_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match="already there"):
        write_adapter(tmp_path / "a", small_adapter(), kind="expert", base=BASE)
    assert not list((tmp_path / "a").iterdir())


def test_values_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    bad = Adapter({Q: LoraFactors(torch.full((1, 2), torch.nan), torch.ones(2, 1), 1.0)})
    with pytest.raises(NonFiniteError, match=rf"module {Q}: lora_A holds 2 values"):
        write_adapter(tmp_path / "a", bad, kind="expert", base=BASE)
    assert not list(tmp_path.iterdir())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """An adapter as another program would have left it: without a manifest."""
    write_adapter(tmp_path / "a", small_adapter(), kind="expert", base=BASE)
    (tmp_path / "a/seedbed.json").unlink()
    return tmp_path / "a"


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors by their last names (q_A …), or remove them with None."""
    tensors = load_file(directory / TENSORS)
    names = {f"{module}_{letter}": f"base_model.model.{name}.lora_{letter}.weight"
             for module, name in (("q", Q), ("v", V)) for letter in "AB"}  # fmt: skip
    for short, tensor in changes.items():
        key = names.get(short, short)
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, directory / TENSORS)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "expected bias none, got all"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"peft_type": "IA3"}, "expected peft_type LORA, got IA3"),
        ({"trainable_token_indices": [1]}, "token embeddings"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "many"}, "lora_alpha is 'many'"),
        ({"rank_pattern": {"(": 2}}, "is not matched: missing \\)"),
        ({"rank_pattern": {f"x{number}.*": 2 for number in range(20_001)}}, "20001 patterns with repeats"),
        ({"rank_pattern": {"q_proj": 5}}, rf"module {Q} has rank 2, expected 5"),
    ],
)
def test_configurations_that_are_not_plain_lora_are_refused(
    written: Path, values: dict[str, Any], sentence: str
) -> None:
    edit_config(written, **values)
    with pytest.raises(AdapterFormatError, match=sentence):
        read_adapter(written)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"q_B": None}, f"module {Q} has no lora_B"),
        ({"v_A": None}, f"module {V} has no lora_A"),
        ({"q_B": torch.ones(16, 3)}, rf"module {Q}: .*got \[2, 16\] and \[16, 3\]"),
        ({"q_A": torch.ones(2, 16, 1, 1)}, rf"module {Q}: expected lora_A \[r, in\]"),
        ({"q_A": torch.ones(2, 16, dtype=torch.int8)}, "has dtype I8"),
        ({"base_model.model.lm_head.weight": torch.ones(2, 2)}, "lm_head.weight is not a LoRA factor"),
        ({"base_model.model.x.lora_embedding_A": torch.ones(2, 2)}, "lora_embedding_A is not a LoRA factor"),
    ],
)
def test_tensors_that_are_no_pairs_of_factors_are_refused(
    written: Path, changes: dict[str, Any], sentence: str
) -> None:
    edit_tensors(written, **changes)
    with pytest.raises(AdapterFormatError, match=sentence):
        read_adapter(written)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_single_value_that_is_not_finite_is_refused(written: Path, value: float) -> None:
    tensor = torch.ones(16, 3)
    tensor[7, 1] = value
    edit_tensors(written, v_B=tensor)
    with pytest.raises(NonFiniteError, match=f"module {V}: lora_B holds 1 values"):
        read_adapter(written)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: (2**62).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"\xff" * 60 + data[68:],
        lambda data: (2).to_bytes(8, "little") + b"{}",
        lambda data: (2).to_bytes(8, "little") + b"[]",
    ],
    ids=["empty", "5 bytes", "header cut", "1 byte short", "1 byte long", "huge header", "garbage", "none", "list"],
)
def test_damaged_tensor_files_are_refused(written: Path, damage: Any) -> None:
    path = written / TENSORS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AdapterFormatError):
        read_adapter(written)


def test_a_truncated_tensor_file_says_what_was_expected_and_got(written: Path) -> None:
    path = written / TENSORS
    path.write_bytes(path.read_bytes()[:-4])
    # (2 + 3) · (16 + 16) numbers of 4 bytes
    with pytest.raises(AdapterFormatError, match="expected 640 bytes of tensors, got 636"):
        read_adapter(written)


def test_offsets_that_overlap_or_lie_outside_are_refused(written: Path) -> None:
    path = written / TENSORS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    header[first]["data_offsets"] = [0, len(data) - 8 - length]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(AdapterFormatError):
        read_adapter(written)


def test_every_truncation_is_refused(written: Path) -> None:
    path = written / TENSORS
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(AdapterFormatError):
            read_adapter(written)


def test_pickles_are_never_read(written: Path) -> None:
    (written / TENSORS).rename(written / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="pickle") as refusal:
        read_adapter(written)
    assert "safe_serialization" in refusal.value.hint


def test_missing_things_are_named(written: Path) -> None:
    with pytest.raises(AdapterFormatError, match="does not exist"):
        read_adapter(written / "nowhere")
    with pytest.raises(AdapterFormatError, match="is not a directory"):
        read_adapter(written / CONFIG)
    (written / CONFIG).unlink()
    with pytest.raises(AdapterFormatError, match="has no adapter_config"):
        read_adapter(written)
    (written / TENSORS).unlink()
    with pytest.raises(AdapterFormatError, match="has no adapter_model"):
        read_adapter(written)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_configuration_that_is_no_json_mapping_is_refused(written: Path, text: str) -> None:
    (written / CONFIG).write_text(text)
    with pytest.raises(AdapterFormatError, match=CONFIG):
        read_adapter(written)


def test_a_file_larger_than_the_quota_is_refused_unread(written: Path) -> None:
    with pytest.raises(AdapterFormatError, match="at most 100 bytes"):
        read_adapter(written, max_bytes=100)


@pytest.mark.parametrize("file", [TENSORS, CONFIG])
def test_files_that_the_manifest_does_not_vouch_for_are_refused(tmp_path: Path, file: str) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        adapter = Adapter({Q: LoraFactors(torch.full((1, 2), value), torch.ones(2, 1), value)})
        write_adapter(tmp_path / name, adapter, kind="expert", base=BASE)
    shutil.copy(tmp_path / "b" / file, tmp_path / "a" / file)
    with pytest.raises(AdapterMismatchError, match="sha256"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2}', "null"])
def test_a_manifest_that_is_none_is_refused(written: Path, text: str) -> None:
    (written / "seedbed.json").write_text(text)
    with pytest.raises(AdapterFormatError, match="not a manifest"):
        read_adapter(written)


def test_another_base_model_is_refused_showing_both(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", small_adapter(), kind="expert", base=BASE)
    with pytest.raises(AdapterMismatchError, match=r"expected tiny \(cccccccccccc\), got tiny \(bbbbbbbbbbbb\)"):
        read_adapter(tmp_path / "a", base=BaseIdentity(name="tiny", digest="c" * 64))
    read_adapter(tmp_path / "a", base=BaseIdentity(name="another name", digest=BASE.digest))


def test_where_a_digest_is_unknown_the_last_part_of_the_name_decides(written: Path) -> None:
    edit_config(written, base_model_name_or_path="/models/Llama-7B/")
    read_adapter(written, base=BaseIdentity(name="some-org/llama-7b", digest="d" * 64))
    with pytest.raises(AdapterMismatchError, match="expected llama-13b, got /models/Llama-7B/"):
        read_adapter(written, base=BaseIdentity(name="llama-13b"))


def test_an_adapter_of_another_rank_than_expected_is_refused(tmp_path: Path) -> None:
    expect = write_adapter(tmp_path / "a", small_adapter(), kind="seed", base=BASE)
    read_adapter(tmp_path / "a", expect=expect)
    with pytest.raises(AdapterMismatchError, match="expected rank 8, got 3"):
        read_adapter(tmp_path / "a", expect=expect.model_copy(update={"rank": 8}))


# --- updates ----------------------------------------------------------------------------------------------------------


def manifest_of(**values: Any) -> Manifest:
    fields = {"kind": "expert", "base": BASE, "tensors_sha256": "", "config_sha256": "", "dtype": "float32"}
    return Manifest(**(fields | {"rank": 3, "modules": 2} | values))


def changed(name: str, factors: LoraFactors) -> Adapter:
    return Adapter({**small_adapter(), name: factors})


def test_an_update_that_fits_is_accepted() -> None:
    check_update(small_adapter(), manifest_of(), base=BASE, reference=small_adapter(), norm_bound=1e3)
    check_update(small_adapter(), manifest_of(parents=("p",)), base=BASE, reference=manifest_of(), parent="p")


NAN = torch.full((2, 16), torch.nan)
UPDATES: dict[str, tuple[Adapter, str]] = {
    "missing module": (Adapter({Q: small_adapter()[Q]}), f"misses module {V}: expected 2 modules, got 1"),
    "extra module": (changed("x", small_adapter()[Q]), "unexpected module x"),
    "other shape": (
        changed(Q, LoraFactors(torch.ones(2, 8), torch.ones(16, 2), 1.5)),
        rf"module {Q}: expected shape \[16, 16\], got \[16, 8\]",
    ),
    "broadcastable shape": (changed(Q, LoraFactors(torch.ones(2, 1), torch.ones(16, 2), 1.5)), r"got \[16, 1\]"),
    "other rank": (changed(Q, LoraFactors(torch.ones(1, 16), torch.ones(16, 1), 1.5)), "expected rank 2, got 1"),
    "other dtype": (changed(Q, small_adapter()[Q].to(dtype=torch.float16)), "dtype torch.float32, got torch.float16"),
    "not finite": (changed(Q, LoraFactors(NAN, torch.ones(16, 2), 1.5)), f"module {Q}: lora_A holds 32 values"),
    "too large": (changed(Q, LoraFactors(torch.ones(2, 16), 1e6 * torch.ones(16, 2), 1.5)), "1000 or less"),
}


@pytest.mark.parametrize(("update", "sentence"), UPDATES.values(), ids=UPDATES.keys())
def test_an_update_that_does_not_fit_is_refused(update: Adapter, sentence: str) -> None:
    with pytest.raises(AdapterError, match=sentence):
        check_update(update, manifest_of(), base=BASE, reference=small_adapter(), norm_bound=1e3)


def test_an_update_of_another_lineage_is_refused() -> None:
    with pytest.raises(AdapterMismatchError, match="expected p, got q"):
        check_update(small_adapter(), manifest_of(parents=("q",)), base=BASE, parent="p")
