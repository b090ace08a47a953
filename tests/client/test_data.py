"""Examples become batches: the right tokens are in the loss, nothing of a completion is lost, order is fixed by a seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerFast

from seedbed.client.data import (
    IGNORED,
    Steps,
    Tokens,
    collate,
    digest_of,
    encode,
    pack,
    schedule,
    select,
    split,
)
from seedbed.common.errors import DataError
from seedbed.common.examples import Example
from seedbed.common.jobs import DataSource

WORDS = ["<pad>", "</s>", "<s>", "Q:", "A:", "one", "two", "three", "four", "five"]
PAD, EOS, BOS, Q, A, ONE, TWO, THREE, FOUR, FIVE = range(len(WORDS))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a word."""
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")


TEMPLATE = "Q: {prompt}\nA:"
QUESTION = Example("one two three", ("four", "five"), label=1)


def source(path: Path, *texts: str, **fields: Any) -> DataSource:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataSource(task=path.stem, location=str(path), **fields)


def test_the_loss_sees_the_right_choice_and_the_end_of_text(tokenizer: Any) -> None:
    assert encode(QUESTION, tokenizer, TEMPLATE, 99) == Tokens((Q, ONE, TWO, THREE, A, FIVE, EOS), start=5)
    batch = collate([encode(QUESTION, tokenizer, TEMPLATE, 99)], PAD)
    assert batch.input_ids.tolist() == [[Q, ONE, TWO, THREE, A, FIVE]]
    assert batch.labels.tolist() == [[IGNORED] * 4 + [FIVE, EOS]]


def test_a_prompt_that_ends_in_spaces_gives_the_same_tokens(tokenizer: Any) -> None:
    assert encode(QUESTION, tokenizer, TEMPLATE + "  ", 99) == encode(QUESTION, tokenizer, TEMPLATE, 99)


def test_a_long_example_loses_the_beginning_of_its_prompt(tokenizer: Any) -> None:
    assert encode(QUESTION, tokenizer, TEMPLATE, 4) == Tokens((THREE, A, FIVE, EOS), start=2)
    assert encode(QUESTION, tokenizer, TEMPLATE, 3) == Tokens((A, FIVE, EOS), start=1)


def test_a_completion_is_never_cut(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="has 2 tokens, which leaves no room") as refusal:
        encode(QUESTION, tokenizer, TEMPLATE, 2)
    assert refusal.value.hint.endswith("to 7 or more.")


def test_all_of_a_text_is_in_the_loss_after_an_opening_token(tokenizer: Any) -> None:
    text = Example("", ("one two",))
    assert encode(text, tokenizer, TEMPLATE, 99) == Tokens((EOS, ONE, TWO, EOS), start=1)
    assert encode(text, tokenizer, TEMPLATE, 3) == Tokens((EOS, ONE, TWO), start=1)
    tokenizer.bos_token = "<s>"
    try:
        assert encode(text, tokenizer, TEMPLATE, 99) == Tokens((BOS, ONE, TWO, EOS), start=1)
    finally:
        tokenizer.bos_token = None


def test_rows_are_padded_to_the_longest_of_the_batch() -> None:
    batch = collate([Tokens((5, 6), 1), Tokens((7, 8, 9, 5), 3)], PAD)
    assert batch.input_ids.tolist() == [[5, PAD, PAD], [7, 8, 9]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[6, IGNORED, IGNORED], [IGNORED, IGNORED, 5]]


def test_packed_rows_hold_the_same_examples_in_the_same_order() -> None:
    examples = [Tokens((5, 6), 1), Tokens((7, 8, 9), 1), Tokens((5, 7, 9, 5), 3)]
    batch = pack(examples, PAD, max_tokens=4)
    assert batch.input_ids.tolist() == [[5, 7, 8], [5, 7, 9]]
    assert batch.labels.tolist() == [[6, 8, 9], [IGNORED, IGNORED, 5]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 0, 1], [0, 1, 2]]
    padded = collate(examples, PAD)
    assert torch.equal(batch.labels[batch.labels != IGNORED], padded.labels[padded.labels != IGNORED])


def test_the_padding_of_a_packed_row_is_an_example_of_its_own() -> None:
    batch = pack([Tokens((5, 6, 7), 1), Tokens((5, 6, 7, 8), 1)], PAD, max_tokens=3)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 0], [0, 1, 2]]


def test_a_step_is_cut_into_parts_of_like_length() -> None:
    rows = [Tokens(tuple(range(length)), 1) for length in (9, 2, 8, 3)]
    assert [[len(row.ids) for row in part] for part in split(rows, 2)] == [[2, 3], [8, 9]]
    assert [len(part) for part in split(rows, 3)] == [1, 1, 2]


def test_an_epoch_shows_every_example_once_and_the_next_is_shuffled_anew() -> None:
    places = schedule([10], 20, seed=3)
    first, second = [index for _, index in places[:10]], [index for _, index in places[10:]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert places == schedule([10], 20, seed=3)
    assert places != schedule([10], 20, seed=4)


def test_tasks_share_the_places_equally_whatever_their_size() -> None:
    places = schedule([2, 100, 5], 30, seed=0)
    assert Counter(task for task, _ in places) == {0: 10, 1: 10, 2: 10}
    assert all({task for task, _ in places[begin : begin + 3]} == {0, 1, 2} for begin in range(0, 30, 3))
    assert Counter(index for task, index in places if task == 0) == {0: 5, 1: 5}


def test_a_fraction_is_drawn_with_the_seed_and_nested_and_never_empty(tmp_path: Path) -> None:
    whole = source(tmp_path / "t.jsonl", *(f"text {number}" for number in range(20)))
    assert len(select(whole)) == 20

    def share(fraction: float, seed: int = 0) -> list[str]:
        return [
            example.completion
            for example in select(whole.model_copy(update={"fraction": fraction, "sample_seed": seed}))
        ]

    assert len(share(0.1)) == 2
    assert len(share(0.5)) == 10
    assert set(share(0.1)) < set(share(0.5))
    assert share(0.5) == share(0.5)
    assert share(0.5) != share(0.5, seed=1)
    assert len(share(0.001)) == 1


def test_a_limit_keeps_the_first_examples_before_the_fraction_is_drawn(tmp_path: Path) -> None:
    limited = source(tmp_path / "t.jsonl", "a", "b", "c", "d", limit=2)
    assert [example.completion for example in select(limited)] == ["a", "b"]
    assert len(select(limited.model_copy(update={"fraction": 0.5}))) == 1


def test_the_digest_of_a_source_follows_its_contents_not_its_place(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    here = source(tmp_path / "t.jsonl", "a", "b")
    assert digest_of(here) == digest_of(source(tmp_path / "elsewhere" / "t.jsonl", "a", "b"))
    assert digest_of(here) != digest_of(here.model_copy(update={"fraction": 0.5}))
    assert digest_of(here) != digest_of(source(tmp_path / "t.jsonl", "a", "c"))


def test_steps_are_the_same_for_the_same_seed(tokenizer: Any, tmp_path: Path) -> None:
    data = [source(tmp_path / "t.jsonl", "one", "two", "three", "four", "five")]

    def steps(seed: int) -> list[list[Tokens]]:
        return list(Steps(data, tokenizer, steps=3, batch_size=2, max_tokens=9, seed=seed))

    assert [len(step) for step in steps(0)] == [2, 2, 2]
    assert steps(0) == steps(0)
    assert steps(0) != steps(1)
    assert Steps(data, tokenizer, steps=1, batch_size=2, max_tokens=9, seed=0).examples == 2


def test_a_job_without_data_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="has no data"):
        Steps([], tokenizer, steps=1, batch_size=1, max_tokens=9, seed=0)
