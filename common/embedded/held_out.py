"""The eight zero-shot tasks: the skills of the trained ones in other wordings, or two at once. No expert sees them."""

from __future__ import annotations

import random

from seedbed.common.embedded import words
from seedbed.common.embedded.questions import Question, near_numbers, others


def word_problem(rng: random.Random) -> Question:
    """Addition told as a story."""
    a, b = rng.randint(1, 25), rng.randint(1, 25)
    person, giver = rng.sample(words.PEOPLE, 2)
    things, who = rng.choice(words.COUNTED), words.pronoun(person)
    prompt = f"{person} has {a} {things}. {giver} brings {b} more. How many {things} does {who} have now?"
    return Question(prompt, str(a + b), near_numbers(rng, a + b, 3))


def oldest(rng: random.Random) -> Question:
    """Comparison of numbers, answered with the name that goes with one of them."""
    names, ages = rng.sample(words.PEOPLE, 3), rng.sample(range(1, 100), 3)
    word, extreme = rng.choice((("oldest", max(ages)), ("youngest", min(ages))))
    right = names[ages.index(extreme)]
    told = [f"{name} is {age}" for name, age in zip(names, ages, strict=True)]
    prompt = f"{told[0]}, {told[1]} and {told[2]} years old. Who is the {word}?"
    return Question(prompt, right, tuple(name for name in names if name != right))


def negated_adjective(rng: random.Random) -> Question:
    """What something is like when it is not like an adjective: opposites behind a negation."""
    word = rng.choice(words.ADJECTIVES)
    noun = rng.choice((*words.CATEGORY_OF, *words.PLACES))
    foreign = [other for other in words.ADJECTIVES if words.GROUP_OF[other] != words.GROUP_OF[word]]
    wrong = (word, *others(rng, foreign, 2))
    return Question(f"The {noun} is not {word} at all. Then how is the {noun}?", words.OPPOSITE_OF[word], wrong)


def odd_one_out(rng: random.Random) -> Question:
    """The one word of four that is of another category."""
    kind, strange = rng.sample(tuple(words.CATEGORIES), 2)
    usual, odd = rng.sample(words.CATEGORIES[kind], 3), rng.choice(words.CATEGORIES[strange])
    listed = [*usual, odd]
    rng.shuffle(listed)
    return Question(f"{', '.join(listed)}. Which word does not belong to the others?", odd, tuple(usual))


def mood(rng: random.Random) -> Question:
    """Sentiment, asked as the feeling of whoever gives the opinion."""
    opinions, right = rng.choice(((words.PRAISE, "happy"), (words.BLAME, "sad")))
    person = rng.choice(words.PEOPLE)
    prompt = f'{person} says: "The {rng.choice(words.REVIEWED)} was {rng.choice(opinions)}!" How does {person} feel?'
    return Question(prompt, right, ("sad",) if right == "happy" else ("happy",))


def counting_on(rng: random.Random) -> Question:
    """A pattern of numbers that rise by the same step: pattern and addition."""
    start, step = rng.randint(1, 40), rng.randint(1, 9)
    shown = [start + step * index for index in range(4)]
    right = start + step * 4
    prompt = f"Numbers: {', '.join(map(str, shown))}. Which one follows?"
    return Question(prompt, str(right), near_numbers(rng, right, 3))


def kind_of_last(rng: random.Random) -> Question:
    """What kind of thing stands at an end of a list: position and category."""
    kinds = rng.sample(tuple(words.CATEGORIES), 3)
    things = [rng.choice(words.CATEGORIES[kind]) for kind in kinds]
    word, right = rng.choice((("first", kinds[0]), ("last", kinds[-1])))
    prompt = f"{things[0]}, {things[1]} and {things[2]}. Of what kind is the {word} thing?"
    return Question(prompt, right, tuple(kind for kind in kinds if kind != right))


def back_to_present(rng: random.Random) -> Question:
    """Who did what, turned from past to present: verb forms and reading."""
    (_, present, past, _), (_, other_present, other_past, _) = rng.sample(words.VERBS, 2)
    person, other = rng.sample(words.PEOPLE, 2)
    told = [f"{person} {past}", f"{other} {other_past}"]
    rng.shuffle(told)
    prompt = f"Yesterday {told[0]} and {told[1]}. What does {person} do every day?"
    return Question(prompt, present, (other_present, past, other_past))
