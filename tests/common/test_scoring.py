"""The scorer against lm-eval's own HFLM on the same model, and against PEFT for adapters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from seedbed.common import scoring
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError, DataError
from seedbed.common.scoring import SeedbedLM

TEXT = "the quick brown fox jumps over the lazy dog; who is it? nobody, he said: 12 and 34 make 46. " * 6
TOLERANCE = 1e-4
MODEL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    # Larger than usual, so that contexts matter and a wrong mask shows.
    "initializer_range": 0.3,
}


def make_tokenizer(*, bos: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>", "<start>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    names = {"eos_token": "<end>", "pad_token": "<end>"}
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])
        names["bos_token"] = "<start>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**MODEL)).eval()


def pairs(count: int, *, longest: int, seed: int = 0) -> list[tuple[str, str]]:
    """Items of two to five choices of uneven length, some of them prefixes of others, contexts of uneven length."""
    rng = random.Random(seed)
    words = TEXT.split()
    found = []
    for _ in range(count):
        context = "Q: " + " ".join(rng.choices(words, k=rng.randint(1, longest))) + "\nA:"
        first = " ".join(rng.choices(words, k=2))
        choices = [first, f"{first} {rng.choice(words)}", *(rng.choice(words) for _ in range(rng.randint(0, 3)))]
        found += [(context, f" {choice}") for choice in choices]
    return found


def instances(requests: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [SimpleNamespace(args=arguments, task_name="task") for arguments in requests]


def hflm(model: Any, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


def assert_same(model: Any, tokenizer: Any, requests: list[tuple[str, str]], **options: Any) -> SeedbedLM:
    lm = SeedbedLM(model, tokenizer, **options)
    ours = lm.loglikelihood(instances(requests))
    theirs = hflm(model, tokenizer).loglikelihood(instances(requests), disable_tqdm=True)
    np.testing.assert_allclose([value for value, _ in ours], [value for value, _ in theirs], rtol=0, atol=TOLERANCE)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    return lm


def test_multiple_choice_equals_hflm(model: Any, tokenizer: Any) -> None:
    lm = assert_same(model, tokenizer, pairs(12, longest=8))
    assert lm._can_branch(), "a Llama takes a tree mask"


@pytest.mark.parametrize("batch_tokens", [1, 70, 400])
def test_the_token_budget_changes_no_number(model: Any, tokenizer: Any, batch_tokens: int) -> None:
    assert_same(model, tokenizer, pairs(6, longest=8), batch_tokens=batch_tokens)


def test_contexts_beyond_the_models_length_lose_their_beginning_as_in_hflm(model: Any, tokenizer: Any) -> None:
    requests = pairs(6, longest=150)
    lm = assert_same(model, tokenizer, requests)
    assert max(len(row) for row in lm.encode([context for context, _ in requests])) > lm.max_length


@pytest.mark.parametrize("bos", [False, True])
def test_odd_texts_are_encoded_as_in_hflm(model: Any, bos: bool) -> None:
    requests = [
        ("", "no context"),
        ("", " no context, but a space"),
        ("the context ends in a space ", "fox"),
        ("two spaces  ", " dog"),
        ("a line break\n", "fox"),
        ("glued", "together"),
        ("<start>the lazy", " dog"),
        ("<end>", " dog"),
        ("repeated", " dog"),
        ("repeated", " dog"),
        ("ünïcödé 猫", " 犬 dog"),
    ]
    assert_same(model, make_tokenizer(bos=bos), requests)


def test_the_greedy_flag_is_true_for_what_the_model_would_write(model: Any, tokenizer: Any) -> None:
    context = "the quick brown"
    tokens = tokenizer.encode(context)
    best = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
    lm = SeedbedLM(model, tokenizer)
    from seedbed.common.packing import Request

    _, greedy = lm._score_requests([Request((*tokens, best), 1), Request((*tokens, (best + 1) % 320), 1)])
    assert greedy.tolist() == [True, False]


def test_probabilities_of_all_single_tokens_sum_to_one(model: Any, tokenizer: Any) -> None:
    from seedbed.common.packing import Request

    sums, greedy = SeedbedLM(model, tokenizer)._score_requests([Request((5, 6, token), 1) for token in range(320)])
    assert np.exp(sums).sum() == pytest.approx(1.0, abs=1e-5)
    assert greedy.sum() == 1


def test_a_model_that_cannot_branch_still_equals_hflm(tokenizer: Any) -> None:
    # ALiBi puts distances of columns, not of positions, into attention: a tree would come out wrong, and is not used.
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    bloom = BloomForCausalLM(config).eval()
    lm = assert_same(bloom, tokenizer, pairs(5, longest=8))
    assert not lm._can_branch()


def test_learned_positions_and_soft_capped_logits_equal_hflm(tokenizer: Any) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.3)
    )
    assert_same(gpt2.eval(), tokenizer, pairs(5, longest=8))
    config = Gemma2Config(**MODEL, head_dim=8, final_logit_softcapping=2.0, sliding_window=16, query_pre_attn_scalar=8)
    assert_same(Gemma2ForCausalLM(config).eval(), tokenizer, pairs(8, longest=12))


def test_a_sliding_window_narrower_than_the_text_equals_hflm(tokenizer: Any) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    mistral = MistralForCausalLM(MistralConfig(**MODEL, sliding_window=8)).eval()
    assert_same(mistral, tokenizer, pairs(8, longest=10))


def test_rolling_log_likelihoods_equal_hflm_also_over_several_windows(model: Any, tokenizer: Any) -> None:
    texts = [(TEXT,), ("short",), (TEXT[40:300],), ("the lazy dog",)]
    ours = SeedbedLM(model, tokenizer).loglikelihood_rolling(instances(texts))
    theirs = hflm(model, tokenizer).loglikelihood_rolling(instances(texts), disable_tqdm=True)
    assert len(tokenizer.encode(TEXT)) > MODEL["max_position_embeddings"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=10 * TOLERANCE)


def test_generation_equals_hflm_and_stops_at_the_stop_sequence(model: Any, tokenizer: Any) -> None:
    free = {"until": ["\x00"], "max_gen_toks": 12}
    requests: list[tuple[str, dict[str, Any]]] = [("the quick", free), ("who is it? nobody", free), ("12 and", free)]
    lm = SeedbedLM(model, tokenizer)
    written = lm.generate_until(instances(requests))
    assert written == hflm(model, tokenizer).generate_until(instances(requests), disable_tqdm=True)
    stop = written[0][3:5]
    stopped = lm.generate_until(instances([("the quick", {"until": [stop], "max_gen_toks": 12})]))
    assert stopped == [written[0].split(stop)[0]]


def adapter_for(model: Any, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for place, (name, module) in enumerate(model.named_modules()):
        if name.endswith(("q_proj", "down_proj")):
            out, inside = module.weight.shape
            rank = 1 + place % 3
            A, B = (torch.randn(size, generator=generator) for size in ((rank, inside), (out, rank)))
            modules[name] = LoraFactors(A, B, 0.5)
    return Adapter(modules)


def test_an_adapter_scores_as_if_its_update_were_in_the_weights(model: Any, tokenizer: Any) -> None:
    import copy

    adapter = adapter_for(model)
    merged = copy.deepcopy(model)
    for name, factors in adapter.items():
        merged.get_submodule(name).weight.data += factors.delta()
    requests = pairs(6, longest=8)
    lm = SeedbedLM(model, tokenizer)
    base = lm.score(requests)
    lm.set_adapter(adapter)
    adapted = lm.score(requests)
    expected = SeedbedLM(merged, tokenizer).score(requests)
    np.testing.assert_allclose([v for v, _ in adapted], [v for v, _ in expected], rtol=1e-4, atol=1e-3)
    assert max(abs(a - b) for (a, _), (b, _) in zip(adapted, base, strict=True)) > 0.1
    lm.set_adapter(None)
    assert lm.score(requests) == base, "the base model itself was never touched"


def test_an_adapter_of_another_model_is_refused(model: Any, tokenizer: Any) -> None:
    wrong = Adapter({"model.layers.7.self_attn.q_proj": LoraFactors(torch.ones(1, 32), torch.ones(32, 1), 1.0)})
    with pytest.raises(AdapterMismatchError, match=r"model\.layers\.7\.self_attn\.q_proj"):
        SeedbedLM(model, tokenizer).set_adapter(wrong)


def test_bfloat16_scores_stay_near_float32(model: Any, tokenizer: Any) -> None:
    import copy

    requests = pairs(4, longest=8)
    exact = SeedbedLM(model, tokenizer).score(requests)
    rough = SeedbedLM(copy.deepcopy(model).to(torch.bfloat16), tokenizer).score(requests)
    np.testing.assert_allclose([v for v, _ in rough], [v for v, _ in exact], rtol=0.1, atol=0.5)


def test_a_choice_without_a_token_is_refused_with_its_context(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="after 'the fox'"):
        SeedbedLM(model, tokenizer).score([("the fox", "")])


def test_a_choice_longer_than_the_model_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="the model reads 96"):
        SeedbedLM(model, tokenizer).score([("the fox", f" {TEXT}")])


def test_progress_ends_at_the_number_of_requests(model: Any, tokenizer: Any) -> None:
    told: list[tuple[int, int]] = []
    requests = pairs(6, longest=8)
    SeedbedLM(model, tokenizer, batch_tokens=64, progress=lambda done, total: told.append((done, total))).score(
        requests
    )
    assert told[-1] == (len(requests), len(requests))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(told) > 1


def test_no_requests_give_no_numbers(model: Any, tokenizer: Any) -> None:
    lm = SeedbedLM(model, tokenizer)
    assert lm.loglikelihood([]) == []
    assert lm.loglikelihood_rolling([]) == []
    assert lm.generate_until([]) == []


def test_a_forward_pass_stays_within_its_budget(model: Any, tokenizer: Any) -> None:
    sizes = []
    lm = SeedbedLM(model, tokenizer, batch_tokens=200)
    lm._can_branch()
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    try:
        lm.score(pairs(20, longest=10))
    finally:
        handle.remove()
    assert max(sizes) <= 200
    assert len(sizes) > 1


def test_only_scored_positions_reach_the_vocabulary(model: Any, tokenizer: Any) -> None:
    from seedbed.common.packing import Request

    lm = SeedbedLM(model, tokenizer)
    lm._can_branch()
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    try:
        # Two choices of two tokens after ten: one shared position, and one of each choice's own.
        lm._score_requests([Request((*range(10), 20, 21), 2), Request((*range(10), 30, 31), 2)])
    finally:
        handle.remove()
    assert shapes == [(1, 3, 320)]


def test_a_text_of_many_tokens_goes_through_the_vocabulary_in_parts_and_through_the_model_once(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SeedbedLM(model, tokenizer).loglikelihood_rolling(instances([(TEXT,)]))
    monkeypatch.setattr(scoring, "LOGITS", 10 * MODEL["vocab_size"])
    lm = SeedbedLM(model, tokenizer)
    lm._can_branch()
    rows: list[int] = []
    bodies: list[int] = []
    handles = [
        model.lm_head.register_forward_hook(lambda _, __, output: rows.append(output.shape[1])),
        model.model.layers[0].register_forward_hook(lambda *_: bodies.append(1)),
    ]
    try:
        parts = lm.loglikelihood_rolling(instances([(TEXT,)]))
    finally:
        for handle in handles:
            handle.remove()
    assert parts == pytest.approx(whole, abs=1e-4)
    assert max(rows) == 10
    windows = -(-len(tokenizer.encode(TEXT)) // MODEL["max_position_embeddings"])
    assert len(bodies) == windows < len(rows)
    assert "forward" not in vars(model.model), "the model is as it was"
