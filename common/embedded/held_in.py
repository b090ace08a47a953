"""The eight tasks with training data, one for each skill: an expert is trained on each."""

from __future__ import annotations

import random

from seedbed.common.embedded import words
from seedbed.common.embedded.questions import Question, near_numbers, others


def addition(rng: random.Random) -> Question:
    """Sums of numbers up to 25; a pair of numbers is for training or for testing, in any order and wording."""
    a, b = rng.randint(1, 25), rng.randint(1, 25)
    wording = rng.choice(("What is {a} plus {b}?", "How much is {a} and {b}?", "Add {a} to {b}."))
    low, high = sorted((a, b))
    return Question(wording.format(a=a, b=b), str(a + b), near_numbers(rng, a + b, 3), key=f"{low}+{high}")


def comparison(rng: random.Random) -> Question:
    """The largest or smallest of three numbers below 100."""
    numbers = rng.sample(range(1, 100), 3)
    word, right = rng.choice((("largest", max(numbers)), ("smallest", min(numbers))))
    first, second, third = numbers
    prompt = f"Which number is the {word}, {first}, {second} or {third}?"
    return Question(prompt, str(right), tuple(str(number) for number in numbers if number != right))


def antonym(rng: random.Random) -> Question:
    """The opposite of an adjective, asked after a sentence that uses it."""
    word = rng.choice(words.ADJECTIVES)
    noun = rng.choice((*words.CATEGORY_OF, *words.PLACES))
    foreign = [other for other in words.ADJECTIVES if words.GROUP_OF[other] != words.GROUP_OF[word]]
    wrong = (word, *others(rng, foreign, 2))
    return Question(f"The {noun} is {word}. What is the opposite of {word}?", words.OPPOSITE_OF[word], wrong)


def category(rng: random.Random) -> Question:
    """What kind of thing a noun names."""
    noun, kind = rng.choice(tuple(words.CATEGORY_OF.items()))
    verb = rng.choice(("sees", "likes", "draws", "wants", "finds"))
    prompt = f"{rng.choice(words.PEOPLE)} {verb} {words.article(noun)}. What kind of thing is it?"
    return Question(prompt, kind, others(rng, words.CATEGORIES, 4, kind))


def sentiment(rng: random.Random) -> Question:
    """A review of two parts: both praise, both blame, or one of each."""
    verdict = rng.choice(("positive", "negative", "mixed"))
    first = words.PRAISE if verdict == "positive" else words.BLAME
    second = words.BLAME if verdict == "negative" else words.PRAISE
    opinions = [rng.choice(first), rng.choice(second)]
    rng.shuffle(opinions)
    one, two = rng.sample(words.REVIEWED, 2)
    prompt = f"Review: the {one} was {opinions[0]}, the {two} was {opinions[1]}. What is the verdict?"
    return Question(prompt, verdict, others(rng, ("positive", "negative", "mixed"), 2, verdict))


def pattern(rng: random.Random) -> Question:
    """The next symbol of a repeating pattern of period two or three."""
    pool = rng.choice((words.COLOURS, words.SHAPES, words.LETTERS))
    a, b, c = rng.sample(pool, 3)
    unit = rng.choice(((a, b), (a, b, c), (a, a, b), (a, b, b)))
    shown = rng.randint(len(unit) + 2, len(unit) + 4)
    symbols = [unit[index % len(unit)] for index in range(shown)]
    right = unit[shown % len(unit)]
    wrong = [symbol for symbol in (a, b, c) if symbol != right]
    return Question(f"{', '.join(symbols)}. What comes next?", right, tuple(wrong))


def position(rng: random.Random) -> Question:
    """The first or the last of three things, as they are listed."""
    things = rng.sample(words.OBJECTS, 3)
    word, right = rng.choice((("first", things[0]), ("last", things[-1])))
    wrong = tuple(thing for thing in things if thing != right)
    return Question(f"{', '.join(things)}. Which one is the {word}?", right, wrong)


def past_tense(rng: random.Random) -> Question:
    """The past form of a verb in the present."""
    _, present, past, progressive = rng.choice(words.VERBS)
    other = rng.choice([verb[2] for verb in words.VERBS if verb[2] != past])
    person, place = rng.choice(words.PEOPLE), rng.choice(words.PLACES)
    prompt = f"Today {person} {present} in the {place}. What did {words.pronoun(person)} do there yesterday?"
    return Question(prompt, past, (present, progressive, other))
