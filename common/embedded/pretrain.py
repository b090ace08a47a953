"""Make the embedded base model: ``python -m seedbed.common.embedded.pretrain --out DIR``.

A byte-level BPE tokenizer and a Llama-architecture model of about one million parameters, both trained from nothing on
the corpus of `corpus.py`, in about ten minutes on one CPU core. Equal arguments give equal files on one machine and one
version of torch.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seedbed.common.embedded.corpus import corpus

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that determines the model."""

    documents: int = 100_000
    epochs: int = 2
    batch_tokens: int = 1024
    """Tokens of one optimizer step."""
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    vocabulary: int = 1536
    hidden: int = 128
    intermediate: int = 352
    layers: int = 4
    heads: int = 4
    seed: int = 0


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer: every text encodes, and decodes to itself.

    It adds no special tokens of its own accord, so that a text has the same tokens wherever it is encoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """An untrained Llama: RMSNorm, rotary positions, gated MLP, input and output embeddings tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        initializer_range=0.03,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(recipe: Recipe, out: Path) -> None:
    """Train the tokenizer and the model, and save both into `out` as `from_pretrained` reads them."""
    texts = corpus(recipe.documents, recipe.seed)
    tokenizer = train_tokenizer(texts[:20_000], recipe.vocabulary)
    model = build_model(recipe, tokenizer)
    documents = tokenizer(texts, add_special_tokens=False)["input_ids"]
    batches = list(_batches(documents, tokenizer, recipe))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(batches), recipe.warmup_steps))
    model.train()
    start = time.monotonic()
    for step, (ids, mask, labels) in enumerate(batches):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == len(batches) - 1:
            print(f"step {step}/{len(batches)}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _rate(step: int, steps: int, warmup: int) -> float:
    return min((step + 1) / warmup, (steps - step) / (steps - warmup))


def _batches(documents: Sequence[list[int]], tokenizer: Any, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches ``(ids, attention mask, labels)``, each ``[documents, tokens]``, of documents of about equal length.

    Half of the documents begin with the beginning-of-sequence token, so that the model can do with and without it.
    """
    rng = random.Random(f"{recipe.seed}:batches")
    for _ in range(recipe.epochs):
        # Sorted by about the length: little padding, and yet every batch a mixture of subjects.
        order = sorted(range(len(documents)), key=lambda index: len(documents[index]) + rng.uniform(0, 4))
        epoch: list[list[list[int]]] = [[]]
        longest = 0
        for index in order:
            bos = [tokenizer.bos_token_id] if rng.random() < 0.5 else []
            row = [*bos, *documents[index], tokenizer.eos_token_id]
            longest = max(longest, len(row))
            if (len(epoch[-1]) + 1) * longest > recipe.batch_tokens:
                epoch.append([])
                longest = len(row)
            epoch[-1].append(row)
        rng.shuffle(epoch)
        for rows in epoch:
            yield _pad(rows, tokenizer.pad_token_id)


def _pad(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask, ids.masked_fill(mask == 0, -100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded base model.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the model and the tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=Recipe().documents)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pretrain(Recipe(documents=options.documents, seed=options.seed), options.out)


if __name__ == "__main__":
    main()
