"""From examples to padded batches of tokens, the same ones whenever the data and the random seed are the same.

What the loss sees: the completion and a closing end-of-text token where there is a prompt, every token where there is
only text. The closing token teaches the model where an answer ends; without it a tuned model rambles in generation.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from seedbed.common.datafiles import read_examples
from seedbed.common.errors import DataError
from seedbed.common.examples import Example
from seedbed.common.jobs import DataSource

IGNORED = -100
"""Label of a token that the loss does not see, as in transformers."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One example as token ids, of which those from `start` on are to be predicted."""

    ids: tuple[int, ...]
    start: int

    @property
    def targets(self) -> int:
        """Number of tokens in the loss."""
        return len(self.ids) - self.start


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens with, for each, the token that should follow it, or `IGNORED`.

    Examples stand each in a row of its own (`collate`: an `attention_mask`, no `position_ids`) or several in one row
    (`pack`: `position_ids` that begin anew with every example, no `attention_mask`).
    """

    input_ids: Int[Tensor, "rows tokens"]
    labels: Int[Tensor, "rows tokens"]
    attention_mask: Int[Tensor, "rows tokens"] | None = None
    position_ids: Int[Tensor, "rows tokens"] | None = None

    def to(self, device: torch.device) -> Batch:
        mask, positions = (None if x is None else x.to(device) for x in (self.attention_mask, self.position_ids))
        return Batch(self.input_ids.to(device), self.labels.to(device), mask, positions)


def select(source: DataSource) -> list[Example]:
    """Read a source and keep its share: the first `limit` examples, and of those a random `fraction`, at least one.

    A smaller fraction with the same seed is a subset of a larger one.

    Raises:
        DataError: if the source cannot be read.
    """
    examples = read_examples(source.location)[: source.limit]
    if source.fraction >= 1:
        return examples
    order = list(range(len(examples)))
    random.Random(f"fraction:{source.sample_seed}:{source.task}").shuffle(order)
    kept = sorted(order[: max(1, round(source.fraction * len(examples)))])
    return [examples[index] for index in kept]


def digest_of(source: DataSource) -> str:
    """SHA-256 of what a source contributes to training: its examples, prompt template, fraction and limit."""
    total = hashlib.sha256(
        json.dumps([source.task, source.prompt, source.fraction, source.sample_seed, source.limit]).encode()
    )
    for example in read_examples(source.location):
        total.update(json.dumps([example.instruction, example.prompt, example.choices, example.label]).encode())
    return total.hexdigest()


def schedule(sizes: Sequence[int], count: int, seed: int) -> list[tuple[int, int]]:
    """Decide which example fills each of `count` places: ``(task, index)`` pairs.

    Every task gets an equal share of the places, whatever its size: round after round, all tasks in a random order.
    Within a task the examples come in epochs, each a new shuffle.

    Args:
        sizes: number of examples of each task.
    """
    rng = random.Random(f"schedule:{seed}")
    streams: list[list[int]] = [[] for _ in sizes]
    places: list[tuple[int, int]] = []
    while len(places) < count:
        for task in rng.sample(range(len(sizes)), len(sizes)):
            if not streams[task]:
                streams[task] = rng.sample(range(sizes[task]), sizes[task])
            places.append((task, streams[task].pop()))
    return places[:count]


def encode(example: Example, tokenizer: Any, template: str, max_tokens: int) -> Tokens:
    """Tokenise prompt and completion together and find where the completion begins, as lm-eval does.

    A prompt that is too long loses its beginning; a text that is too long loses its end.

    Raises:
        DataError: if the completion alone, with one token before it, is longer than `max_tokens`.
    """
    context = example.context(template)
    if not context:
        return _encode_text(example.completion, tokenizer, max_tokens)
    bare = context.rstrip()  # tokenizers attach white space to the next word
    whole = bare + context[len(bare) :] + example.continuation(example.completion)
    before = len(tokenizer(bare)["input_ids"])
    ids = [*tokenizer(whole)["input_ids"], *_end(tokenizer)]
    excess = max(0, len(ids) - max_tokens)
    if excess >= before:
        raise DataError(
            f"the completion {example.completion[:40]!r} has {len(ids) - before} tokens, which leaves no room for a "
            f"prompt in training.max_tokens = {max_tokens}",
            f"Raise training.max_tokens to {len(ids)} or more.",
        )
    return Tokens(tuple(ids[excess:]), before - excess)


def _encode_text(text: str, tokenizer: Any, max_tokens: int) -> Tokens:
    """Text after a beginning-of-text token (or, where there is none, an end-of-text token): all of it is predicted."""
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *_end(tokenizer)]
    opening = [] if prefix is None or ids[0] == prefix else [prefix]
    return Tokens(tuple([*opening, *ids][:max_tokens]), 1)


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def collate(examples: Sequence[Tokens], pad: int) -> Batch:
    """One example a row, padded on the right to the longest of them."""
    ids, labels, _ = _fill([[example] for example in examples], pad)
    lengths = torch.tensor([[len(example.ids) - 1] for example in examples])
    return Batch(ids, labels, attention_mask=(torch.arange(ids.shape[1]) < lengths).long())


def pack(examples: Sequence[Tokens], pad: int, max_tokens: int) -> Batch:
    """Examples one after another in rows of at most `max_tokens`, in the same order as in `collate`.

    What is computed is the same, without the padding: transformers sees in the positions that the examples of a row are
    separate, and keeps them from attending to each other. The bound on a row bounds the cost of attention.
    """
    rows: list[list[Tokens]] = []
    room = 0
    for example in examples:
        length = len(example.ids) - 1
        if length > room:
            rows.append([])
            room = max(max_tokens, length)
        rows[-1].append(example)
        room -= length
    ids, labels, positions = _fill(rows, pad)
    return Batch(ids, labels, position_ids=positions)


def _fill(rows: Sequence[Sequence[Tokens]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input tokens, what follows them, and their positions; the last token of an example has nothing to predict."""
    width = max(sum(len(example.ids) - 1 for example in row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    positions = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        begin = 0
        for example in row:
            end = begin + len(example.ids) - 1
            ids[index, begin:end] = torch.tensor(example.ids[:-1])
            labels[index, begin + example.start - 1 : end] = torch.tensor(example.ids[example.start :])
            positions[index, begin:end] = torch.arange(end - begin)
            begin = end
        positions[index, begin:] = torch.arange(width - begin)
    return ids, labels, positions


def split(rows: Sequence[Tokens], parts: int) -> list[list[Tokens]]:
    """Cut the examples of one optimizer step into `parts` of nearly equal number, examples of like length together.

    The loss of a step does not depend on the cut, padding does.
    """
    ordered = sorted(rows, key=lambda row: len(row.ids))
    bounds = [len(ordered) * part // parts for part in range(parts + 1)]
    return [ordered[begin:end] for begin, end in itertools.pairwise(bounds)]


class Steps(Sequence[list[Tokens]]):
    """The examples of every optimizer step of a job, as tokens.

    Only examples that are drawn are tokenised, all of them before training starts, so that a bad one is found early.

    Raises:
        DataError: if a source cannot be read or an example does not fit.
    """

    def __init__(
        self, sources: Sequence[DataSource], tokenizer: Any, *, steps: int, batch_size: int, max_tokens: int, seed: int
    ) -> None:
        if not sources:
            raise DataError("the job has no data", "Name at least one task with training examples.")
        tasks = [select(source) for source in sources]
        places = schedule([len(task) for task in tasks], steps * batch_size, seed)
        encoded = {
            place: encode(tasks[place[0]][place[1]], tokenizer, sources[place[0]].prompt, max_tokens)
            for place in dict.fromkeys(places)
        }
        self.examples = len(encoded)
        """Number of different examples that are trained on."""
        self._rows = [encoded[place] for place in places]
        self._size = batch_size

    @property
    def digest(self) -> str:
        """SHA-256 of every token of every step, in order: what the training sees of its data."""
        total = hashlib.sha256(str(self._size).encode())
        for row in self._rows:
            total.update(repr((row.start, row.ids)).encode())
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self._rows) // self._size

    def __getitem__(self, step: Any) -> Any:
        if not 0 <= step < len(self):
            raise IndexError(step)
        return self._rows[step * self._size : (step + 1) * self._size]
