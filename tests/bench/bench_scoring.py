"""Seedbed's scorer against lm-eval's own HFLM: one model in memory, the same items, in one process.

    python tests/bench/bench_scoring.py [--model random|embedded|smollm2] [--items N] [--repeats N] [--json FILE]

`random` has SmolLM2-135M's shape and random weights, so nothing is fetched. HFLM gets its best batch size of several; the
two then run in turns, and the ratio of each turn counts, so that a busy machine hurts both alike.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Pair = tuple[str, str]
WORDS = [
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child"),
    *("world", "school", "state", "family", "student", "group", "country", "work", "hand", "part"),
]
BATCH_SIZES = (4, 16)


@dataclass(frozen=True)
class Setting:
    """Multiple-choice items of one shape."""

    name: str
    choices: int
    context: int
    """Tokens of a context, at least."""
    words: tuple[int, int]
    """Words of a choice, from and to."""
    items: int


@dataclass(frozen=True)
class Row:
    """What one setting gave."""

    setting: str
    requests: int
    context_tokens: float
    choice_tokens: float
    ours_seconds: float
    hflm_seconds: float
    hflm_batch_size: int
    ratio: float
    """Median over the turns of HFLM's time divided by ours."""
    ratio_low: float
    ratio_high: float
    arithmetic: float
    """Multiplications of HFLM divided by ours: tokens through the model's body, and rows through its vocabulary projection."""
    largest_difference: float
    """Of any log-probability."""
    greedy_differences: int


def load(name: str) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    if name != "random":
        from seedbed.common.basemodel import load as load_base
        from seedbed.common.config import BaseModelConfig

        return load_base(BaseModelConfig(model=name), "cpu")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    vocabulary = {word: index for index, word in enumerate(["<end>", "?", ":", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    return LlamaForCausalLM(config).eval(), wrapped


def make_items(setting: Setting, tokenizer: Any, seed: int = 0) -> list[Pair]:
    """Contexts of random words, long enough, each with its choices."""
    rng = random.Random(seed)
    pairs: list[Pair] = []
    for _ in range(setting.items):
        context = ""
        while len(tokenizer.encode(f"{context}:")) < setting.context:
            context += f" {rng.choice(WORDS)}"
        for _ in range(setting.choices):
            words = rng.choices(WORDS, k=rng.randint(*setting.words))
            pairs.append((f"{context}:".strip(), " " + " ".join(words)))
    return pairs


def multiplications(model: Any, run: Any) -> float:
    """Of the weights, in one run: what the body reads times its size, and what the projection reads times its own."""
    head = model.get_output_embeddings().weight.numel()
    body = sum(parameter.numel() for parameter in model.base_model.parameters()) - head  # the embeddings are looked up
    tokens: list[int] = []
    rows: list[int] = []
    handles = [
        model.get_input_embeddings().register_forward_hook(lambda _, args, __: tokens.append(args[0].numel())),
        model.get_output_embeddings().register_forward_hook(lambda _, __, out: rows.append(out[..., 0].numel())),
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return float(sum(tokens) * body + sum(rows) * head)


def timed(function: Any, *arguments: Any) -> tuple[float, list[tuple[float, bool]]]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def compare(setting: Setting, ours: Any, hflm: Any, repeats: int) -> Row:
    """Run both on the same items, in turns."""
    pairs = make_items(setting, ours.tokenizer)
    instances = [SimpleNamespace(args=pair, task_name=setting.name) for pair in pairs]

    def theirs() -> list[tuple[float, bool]]:
        result: list[tuple[float, bool]] = hflm.loglikelihood(instances, disable_tqdm=True)
        return result

    ours.score(pairs[: setting.choices])  # warm
    trials = {}
    for size in (size for size in BATCH_SIZES if size <= len(pairs)):
        hflm.batch_size_per_gpu = size
        trials[size] = timed(theirs)[0]
    hflm.batch_size_per_gpu = min(trials, key=lambda size: trials[size])
    turns = [(timed(ours.score, pairs), timed(theirs)) for _ in range(repeats)]
    ratios = [slow / fast for (fast, _), (slow, _) in turns]
    (_, mine), (_, reference) = turns[0]
    return Row(
        setting=setting.name,
        requests=len(pairs),
        context_tokens=statistics.mean(len(row) for row in ours.encode([context for context, _ in pairs])),
        choice_tokens=statistics.mean(len(row) for row in ours.encode([choice for _, choice in pairs])),
        ours_seconds=statistics.median(fast for (fast, _), _ in turns),
        hflm_seconds=statistics.median(slow for _, (slow, _) in turns),
        hflm_batch_size=hflm.batch_size_per_gpu,
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        arithmetic=multiplications(ours.model, theirs) / multiplications(ours.model, lambda: ours.score(pairs)),
        largest_difference=max(abs(a - b) for (a, _), (b, _) in zip(mine, reference, strict=True)),
        greedy_differences=sum(a != b for (_, a), (_, b) in zip(mine, reference, strict=True)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["random", "embedded", "smollm2"], default="random")
    parser.add_argument("--items", type=int, default=0, help="of each setting")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from lm_eval.models.huggingface import HFLM

    from seedbed.common.scoring import SeedbedLM

    logging.disable(logging.WARNING)
    model, tokenizer = load(options.model)
    ours = SeedbedLM(model, tokenizer)
    hflm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    count = options.items or (200 if options.model == "embedded" else 8)
    settings = (
        Setting("4 choices, context 100+", 4, 100, (1, 6), count),
        Setting("2 choices, context 40", 2, 40, (1, 4), options.items or 2 * count),
    )
    rows = []
    for setting in settings:
        rows.append(compare(setting, ours, hflm, options.repeats))
        row = rows[-1]
        print(
            f"{row.setting}: {row.ratio:.2f}x (from {row.ratio_low:.2f} to {row.ratio_high:.2f}) "
            f"as fast as HFLM at its best batch size {row.hflm_batch_size}; "
            f"{row.ours_seconds:.2f} s against {row.hflm_seconds:.2f} s for {row.requests} choices of "
            f"{row.choice_tokens:.1f} tokens after {row.context_tokens:.0f}; {row.arithmetic:.2f}x as much arithmetic; "
            f"largest difference of a log-probability {row.largest_difference:.1e}",
            flush=True,
        )
    if options.json:
        options.json.write_text(
            json.dumps({"model": options.model, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    sys.exit(main())
