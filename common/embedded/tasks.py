"""The embedded tasks as a table, and the files of examples that are written from it.

A held-in question is for training or for testing by a hash of its key, so no test question is ever trained on, whatever
the sizes and random seeds of the two files.
"""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seedbed.common.embedded import held_in, held_out
from seedbed.common.embedded.questions import Generate, Question
from seedbed.common.errors import ConfigError, DataError, nearest
from seedbed.common.examples import Example

Split = Literal["train", "test"]
_TEST_SHARE = 4
"""One held-in question in so many is for testing."""
_PATIENCE = 10_000
"""Draws in a row without a new question after which the task counts as exhausted."""


@dataclass(frozen=True, slots=True)
class EmbeddedTask:
    """A small task whose questions are generated."""

    name: str
    skill: str
    held_in: bool
    """Whether there is training data for an expert; else the task is only for zero-shot evaluation."""
    description: str
    generate: Generate
    """Draws one question with a random generator."""


_ROWS = (
    EmbeddedTask("addition", "arithmetic", True, "the sum of two numbers", held_in.addition),
    EmbeddedTask("comparison", "number order", True, "the largest or smallest of three numbers", held_in.comparison),
    EmbeddedTask("antonym", "opposites", True, "the opposite of an adjective", held_in.antonym),
    EmbeddedTask("category", "word classes", True, "what kind of thing a noun names", held_in.category),
    EmbeddedTask("sentiment", "sentiment", True, "the verdict of a short review", held_in.sentiment),
    EmbeddedTask("pattern", "pattern", True, "the next symbol of a repeating pattern", held_in.pattern),
    EmbeddedTask("position", "position", True, "the first or last of three things", held_in.position),
    EmbeddedTask("past_tense", "verb forms", True, "the past form of a verb", held_in.past_tense),
    EmbeddedTask("word_problem", "arithmetic", False, "addition told as a story", held_out.word_problem),
    EmbeddedTask("oldest", "number order + reading", False, "who is the oldest or youngest of three", held_out.oldest),
    EmbeddedTask("negated_adjective", "opposites", False, "what a thing is that is not so", held_out.negated_adjective),
    EmbeddedTask("odd_one_out", "word classes", False, "the word of another category", held_out.odd_one_out),
    EmbeddedTask("mood", "sentiment", False, "how someone with an opinion feels", held_out.mood),
    EmbeddedTask("counting_on", "pattern + arithmetic", False, "the next of spaced numbers", held_out.counting_on),
    EmbeddedTask("kind_of_last", "position + word classes", False, "what stands at an end", held_out.kind_of_last),
    EmbeddedTask("back_to_present", "verb forms + reading", False, "from past to present", held_out.back_to_present),
)
TASKS: dict[str, EmbeddedTask] = {task.name: task for task in _ROWS}


def examples(name: str, split: Split, count: int, seed: int) -> list[Example]:
    """Draw examples of a task, all with different prompts, the choices in random order.

    Held-in tasks are split by a hash of the question's key; a held-out task has only a test split.

    Raises:
        ConfigError: if there is no such task, or the split is `train` and the task is held out.
        DataError: if the task does not have so many different questions.
    """
    task = _find(name)
    if split == "train" and not task.held_in:
        raise ConfigError(f"embedded task '{name}' is held out and has no training data", "Use it for evaluation only.")
    rng = random.Random(f"{seed}:{name}:{split}")
    drawn: dict[str, Example] = {}
    idle = 0
    while len(drawn) < count:
        question = task.generate(rng)
        idle += 1
        if question.prompt not in drawn and (not task.held_in or _split_of(question) == split):
            drawn[question.prompt] = _shuffled(question, rng)
            idle = 0
        if idle > _PATIENCE:
            raise DataError(
                f"embedded task '{name}' has only about {len(drawn)} {split} questions, {count} were asked for",
                "Ask for fewer.",
            )
    return list(drawn.values())


def write_task(name: str, directory: Path, train: int, test: int, seed: int) -> None:
    """Write ``NAME.test.jsonl`` and, for a held-in task, ``NAME.train.jsonl``, equal bytes for equal arguments.

    Each line is ``{"instruction", "prompt", "choices", "label"}``; no prompt occurs in both files.

    Raises:
        ConfigError: if there is no such task.
        DataError: if the task does not have so many different questions.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if _find(name).held_in:
        _write(directory / f"{name}.train.jsonl", examples(name, "train", train, seed))
    _write(directory / f"{name}.test.jsonl", examples(name, "test", test, seed))


def _find(name: str) -> EmbeddedTask:
    if name not in TASKS:
        raise ConfigError(f"there is no embedded task '{name}'", nearest(name, TASKS))
    return TASKS[name]


def _split_of(question: Question) -> Split:
    # crc32 rather than hash(): the same in every process and on every machine.
    code = zlib.crc32((question.key or question.prompt).encode())
    return "test" if code % _TEST_SHARE == 0 else "train"


def _shuffled(question: Question, rng: random.Random) -> Example:
    choices = [question.answer, *question.wrong]
    rng.shuffle(choices)
    return Example(question.prompt, tuple(choices), choices.index(question.answer))


def _write(path: Path, rows: Iterable[Example]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        for row in rows:
            line = {
                "instruction": row.instruction,
                "prompt": row.prompt,
                "choices": list(row.choices),
                "label": row.label,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    aside.replace(path)
