"""What a generated question is, and the drawing of wrong answers that all tasks share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its right answer and its wrong ones, not yet in any order."""

    prompt: str
    answer: str
    wrong: tuple[str, ...]
    key: str = ""
    """What decides whether the question is for training or for testing; the prompt where empty."""


Generate = Callable[[random.Random], Question]


def near_numbers(rng: random.Random, right: int, count: int, reach: int = 10) -> tuple[str, ...]:
    """`count` distinct wrong numbers at most `reach` away from the right one, none below zero."""
    near = [right + step for step in range(-reach, reach + 1) if step and right + step >= 0]
    return tuple(str(number) for number in rng.sample(near, count))


def others(rng: random.Random, pool: Iterable[str], count: int, *avoid: str) -> tuple[str, ...]:
    """`count` distinct members of `pool` outside `avoid`."""
    return tuple(rng.sample([word for word in pool if word not in avoid], count))
