"""The embedded tasks ask fair questions, and the embedded model leaves something to learn."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seedbed.common.config_file import load_config
from seedbed.common.embedded import MODEL_DIR, TASKS, corpus, examples, pretrain, words, write_task
from seedbed.common.errors import ConfigError, DataError
from seedbed.common.examples import Example

HELD_IN = [name for name, task in TASKS.items() if task.held_in]
HELD_OUT = [name for name, task in TASKS.items() if not task.held_in]
TEMPLATE = load_config("embedded").tasks.prompt


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def listed(text: str) -> list[str]:
    return text.split(". ")[0].split(", ")


def sum_of_numbers(prompt: str) -> str:
    return str(sum(numbers(prompt)))


def extreme_number(prompt: str) -> str:
    return str(max(numbers(prompt)) if "largest" in prompt else min(numbers(prompt)))


def extreme_person(prompt: str) -> str:
    ages = {int(age): name for name, age in re.findall(r"(\w+) is (\d+)", prompt)}
    return ages[max(ages) if "oldest" in prompt else min(ages)]


def opposite(prompt: str) -> str:
    word = re.search(r"opposite of (\w+)|is not (\w+)", prompt)
    assert word
    return words.OPPOSITE_OF[word[1] or word[2]]


def kind_of_thing(prompt: str) -> str:
    noun = re.search(r"an? (\w+)\. What", prompt)
    assert noun
    return words.CATEGORY_OF[noun[1]]


def odd_word(prompt: str) -> str:
    kinds = Counter(words.CATEGORY_OF[word] for word in listed(prompt))
    assert sorted(kinds.values()) == [1, 3]
    return next(word for word in listed(prompt) if kinds[words.CATEGORY_OF[word]] == 1)


def verdict(prompt: str) -> str:
    good = {word in words.PRAISE for word in re.findall(r"was (\w+)", prompt)}
    return "mixed" if len(good) == 2 else "positive" if good.pop() else "negative"


def feeling(prompt: str) -> str:
    opinion = re.search(r"was (\w+)!", prompt)
    assert opinion
    assert (opinion[1] in words.PRAISE) != (opinion[1] in words.BLAME)
    return "happy" if opinion[1] in words.PRAISE else "sad"


def next_symbol(prompt: str) -> str:
    symbols = listed(prompt)
    period = next(p for p in range(1, len(symbols)) if all(x == y for x, y in zip(symbols, symbols[p:], strict=False)))
    assert 2 <= period <= 3
    return symbols[-period]


def next_number(prompt: str) -> str:
    shown = numbers(prompt)
    steps = {after - before for before, after in itertools.pairwise(shown)}
    assert len(steps) == 1
    return str(shown[-1] + steps.pop())


def thing_at_an_end(prompt: str) -> str:
    return listed(prompt)[0 if "first" in prompt else -1]


def kind_at_an_end(prompt: str) -> str:
    things = re.split(r", | and ", prompt.split(". ")[0])
    return words.CATEGORY_OF[things[0 if "first" in prompt else -1]]


def past_form(prompt: str) -> str:
    verb = re.search(r"Today \w+ (\w+)", prompt)
    assert verb
    return next(past for _, present, past, _ in words.VERBS if present == verb[1])


def present_form(prompt: str) -> str:
    did = dict(re.findall(r"(\w+) (\w+)(?: and|\.)", prompt.removeprefix("Yesterday ")))
    asked = re.search(r"does (\w+) do", prompt)
    assert asked
    return next(present for _, present, past, _ in words.VERBS if past == did[asked[1]])


SOLVERS: dict[str, Callable[[str], str]] = {
    "addition": sum_of_numbers,
    "comparison": extreme_number,
    "antonym": opposite,
    "category": kind_of_thing,
    "sentiment": verdict,
    "pattern": next_symbol,
    "position": thing_at_an_end,
    "past_tense": past_form,
    "word_problem": sum_of_numbers,
    "oldest": extreme_person,
    "negated_adjective": opposite,
    "odd_one_out": odd_word,
    "mood": feeling,
    "counting_on": next_number,
    "kind_of_last": kind_at_an_end,
    "back_to_present": present_form,
}


def test_there_are_eight_tasks_to_train_on_and_eight_that_no_expert_sees() -> None:
    assert (len(HELD_IN), len(HELD_OUT)) == (8, 8)


@pytest.mark.parametrize("name", TASKS)
def test_every_question_has_the_answer_that_an_independent_solver_finds(name: str) -> None:
    for example in examples(name, "test", 250, seed=3):
        assert example.completion == SOLVERS[name](example.prompt), example


@pytest.mark.parametrize("name", TASKS)
def test_choices_are_two_to_five_different_texts(name: str) -> None:
    for example in examples(name, "test", 250, seed=3):
        assert 2 <= len(example.choices) <= 5
        assert len(set(example.choices)) == len(example.choices)
        assert all(choice == choice.strip() != "" for choice in example.choices)


@pytest.mark.parametrize("name", TASKS)
def test_the_right_answer_stands_at_every_place_about_as_often(name: str) -> None:
    drawn = examples(name, "test", 250, seed=5)
    places = Counter(example.label for example in drawn)
    fair = 250 / len(drawn[0].choices)
    assert set(places) == set(range(len(drawn[0].choices)))
    # Four standard deviations of a fair draw.
    assert all(abs(count - fair) < 4 * fair**0.5 for count in places.values()), places


@pytest.mark.parametrize("name", HELD_IN)
def test_no_test_question_is_trained_on_whatever_the_seeds(name: str) -> None:
    trained = {example.prompt for example in examples(name, "train", 600, seed=1)}
    for seed in (1, 2):
        asked = {example.prompt for example in examples(name, "test", 200, seed=seed)}
        assert len(asked) == 200
        assert not asked & trained


def test_a_sum_of_the_test_is_not_trained_on_in_another_order_or_wording() -> None:
    trained = {tuple(sorted(numbers(example.prompt))) for example in examples("addition", "train", 800, seed=1)}
    asked = {tuple(sorted(numbers(example.prompt))) for example in examples("addition", "test", 200, seed=1)}
    assert not asked & trained


@pytest.mark.parametrize(("table", "size"), [(words.CATEGORY_OF, 80), (words.OPPOSITE_OF, 72)])
def test_no_word_is_in_two_categories_and_no_adjective_has_two_opposites(table: dict[str, str], size: int) -> None:
    assert len(table) == size


@pytest.mark.parametrize("name", ["antonym", "negated_adjective"])
def test_no_wrong_answer_is_nearly_the_opposite_too(name: str) -> None:
    for example in examples(name, "test", 250, seed=3):
        right = example.completion
        wrong = [choice for choice in example.choices if choice not in (right, words.OPPOSITE_OF[right])]
        assert len(wrong) == 2
        assert all(words.GROUP_OF[choice] != words.GROUP_OF[right] for choice in wrong)


def test_files_are_equal_for_equal_seeds_and_differ_for_others(tmp_path: Path) -> None:
    for directory, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_task("position", tmp_path / directory, train=20, test=10, seed=seed)
    for name in ("position.train.jsonl", "position.test.jsonl"):
        first, second, third = ((tmp_path / directory / name).read_bytes() for directory in "abc")
        assert first == second != third


def test_written_lines_hold_an_instruction_a_prompt_choices_and_a_label(tmp_path: Path) -> None:
    write_task("addition", tmp_path, train=20, test=10, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["addition.test.jsonl", "addition.train.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "addition.train.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    for line in lines:
        assert set(line) == {"instruction", "prompt", "choices", "label"}
        assert line["choices"][line["label"]] == sum_of_numbers(line["prompt"])


def test_a_held_out_task_has_no_training_data(tmp_path: Path) -> None:
    write_task("mood", tmp_path, train=20, test=10, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mood.test.jsonl"]
    with pytest.raises(ConfigError, match="'mood' is held out"):
        examples("mood", "train", 10, seed=0)


def test_an_unknown_task_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        write_task("additon", tmp_path, train=1, test=1, seed=0)
    assert "addition" in refusal.value.hint


def test_more_questions_than_a_task_has_are_refused_with_the_number_there_is() -> None:
    with pytest.raises(DataError, match="'addition' has only about"):
        examples("addition", "test", 100_000, seed=0)


def test_the_preset_names_all_embedded_tasks_and_asks_for_no_more_than_there_is() -> None:
    config = load_config("embedded")
    assert list(config.tasks.experts) == HELD_IN
    assert list(config.tasks.held_out) == HELD_OUT
    for name in HELD_IN:
        assert len(examples(name, "train", config.tasks.train_limit or 0, seed=0)) == config.tasks.train_limit


def test_the_corpus_repeats_itself_for_a_seed_and_asks_no_question_of_a_task() -> None:
    texts = corpus.corpus(4000, seed=1)
    assert texts == corpus.corpus(4000, seed=1)
    assert texts != corpus.corpus(4000, seed=2)
    asked = [example.prompt for name in TASKS for example in examples(name, "test", 100, seed=0)]
    endings = {prompt.split(". ")[-1] for prompt in asked}
    assert not any(ending in text for ending in endings for text in texts)


def test_general_text_is_short_declarative_and_repeatable() -> None:
    texts = corpus.general_text(200, seed=4)
    assert texts == corpus.general_text(200, seed=4)
    assert len(set(texts)) > 190
    assert all(text.endswith(".") and "?" not in text and len(text) < 300 for text in texts)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()


def test_the_model_is_small_and_its_weights_are_float32(model: Any) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) <= 6_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "text",
    [
        "Q: What is 7 plus 5?\nA: 12",
        "",
        "  two  spaces ",
        "naïve café, 北京, Привет, שלום",
        "👩‍👩‍👧 🦙\t\x00\r\n",
        "don't , stop .",
    ],
)
def test_every_text_comes_back_from_its_tokens(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_random_unicode_comes_back_from_its_tokens(tokenizer: Any) -> None:
    rng = random.Random(0)
    alphabet = [chr(code) for code in range(0x11000) if not 0xD800 <= code < 0xE000]
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=30))
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_there_but_are_never_added_unasked(tokenizer: Any, model: Any) -> None:
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3
    assert None not in special
    assert not special & set(tokenizer("Anna sees a dog.")["input_ids"])
    assert len(tokenizer) == model.config.vocab_size


def test_every_prompt_fits_into_the_presets_length(tokenizer: Any) -> None:
    limit = load_config("embedded").training.max_tokens
    for name in TASKS:
        for example in examples(name, "test", 100, seed=0):
            text = example.context(TEMPLATE) + max((f" {choice}" for choice in example.choices), key=len)
            # One token is left for an end of sequence.
            assert len(tokenizer(text)["input_ids"]) < limit


@pytest.fixture(scope="module")
def accuracies(model: Any, tokenizer: Any) -> dict[str, float]:
    return {name: accuracy(model, tokenizer, examples(name, "test", 100, seed=0)) for name in TASKS}


def accuracy(model: Any, tokenizer: Any, asked: list[Example]) -> float:
    return sum(best_choice(model, tokenizer, example) == example.label for example in asked) / len(asked)


@torch.no_grad()
def best_choice(model: Any, tokenizer: Any, example: Example) -> int:
    start = len(tokenizer(example.context(TEMPLATE))["input_ids"])
    rows = [tokenizer(example.context(TEMPLATE) + f" {choice}")["input_ids"] for choice in example.choices]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    log_p = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    totals = [log_p[index, start - 1 : len(row) - 1].sum().item() for index, row in enumerate(rows)]
    return totals.index(max(totals))


def test_the_base_knows_something_of_several_tasks(accuracies: dict[str, float]) -> None:
    chance = {name: 1 / len(examples(name, "test", 1, seed=0)[0].choices) for name in TASKS}
    # Two standard deviations of guessing, 100 questions.
    better = [
        name for name in TASKS if accuracies[name] > chance[name] + 2 * (chance[name] * (1 - chance[name]) / 100) ** 0.5
    ]
    assert len(better) >= 4, accuracies


def test_the_base_leaves_something_to_learn_on_every_task(accuracies: dict[str, float]) -> None:
    assert max(accuracies.values()) <= 0.9, accuracies
    assert 0.3 <= sum(accuracies.values()) / 16 <= 0.65, accuracies


def test_pretraining_again_gives_the_same_model_that_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = pretrain.Recipe(
        documents=300, epochs=1, vocabulary=400, hidden=16, intermediate=32, layers=1, heads=2, warmup_steps=2
    )
    for directory in ("a", "b"):
        pretrain.pretrain(recipe, tmp_path / directory)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / directory) for directory in "ab")
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a")) == 400
