"""The synthetic text that the embedded base model is pretrained on.

Two parts. General text: small stories of people, places and things. Skill text: what the tasks need to know, told in
sentences and in questions of *other wordings* than any task's, a share of the questions answered wrongly. So the base
has met the words and facts, knows a question when it sees one, and is far from perfect at every task.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from seedbed.common.embedded import words
from seedbed.common.embedded.questions import near_numbers, others

Write = Callable[[random.Random], str]

_GENERAL_SHARE = 0.2
_ASKED_SHARE = 0.35
"""Share of the skill texts that are questions."""
_WRONG_SHARE = 0.3
"""Share of the questions that are answered wrongly."""
_KNOWN_PAIRS = sorted({tuple(sorted(pair)) for pair in words.OPPOSITE_OF.items()})[::2]
_FORMS = ("Q: {question}\nA: {answer}", "Question: {question}\nAnswer: {answer}", "{question} {answer}.")


def general_text(n: int, seed: int) -> list[str]:
    """`n` short texts without questions, of the kind that makes up a fifth of the pretraining corpus."""
    rng = random.Random(f"{seed}:general")
    return [_story(rng) for _ in range(n)]


def corpus(n: int, seed: int) -> list[str]:
    """`n` documents, general and skill texts mixed; equal for equal arguments."""
    rng = random.Random(f"{seed}:corpus")
    return [_document(rng) for _ in range(n)]


def _document(rng: random.Random) -> str:
    if rng.random() < _GENERAL_SHARE:
        return _story(rng)
    told, asked = rng.choice(_SKILLS)
    return _ask(rng, asked) if rng.random() < _ASKED_SHARE else told(rng)


def _ask(rng: random.Random, asked: Callable[[random.Random], tuple[str, str, str]]) -> str:
    question, right, wrong = asked(rng)
    answer = wrong if rng.random() < _WRONG_SHARE else right
    return rng.choice(_FORMS).format(question=question, answer=answer)


def _story(rng: random.Random) -> str:
    person, friend = rng.sample(words.PEOPLE, 2)
    who, noun, verb = words.pronoun(person), rng.choice(tuple(words.CATEGORY_OF)), rng.choice(words.VERBS)
    place, other_place = rng.sample(words.PLACES, 2)
    openings = (
        f"{person} lives in a {rng.choice(words.ADJECTIVES)} house near the {place}.",
        f"On {rng.choice(words.DAYS)} {person} goes to the {place} with {friend}.",
        f"{person} has {words.article(noun)} and a {rng.choice(words.COLOURS)} {rng.choice(words.HOLDERS)}.",
        f"Last {rng.choice(words.DAYS)} {person} {verb[2]} in the {place}.",
    )
    endings = (
        f"There {who} sees {words.article(rng.choice(tuple(words.CATEGORY_OF)))} and {words.article(noun)}.",
        f"Then {who} {verb[1]} with {friend} in the {other_place}.",
        f"{friend} gives {person} a {rng.choice(words.OBJECTS)} and {rng.randint(2, 60)} {rng.choice(words.COUNTED)}.",
        f"It is {rng.choice(words.ADJECTIVES)} there, and {friend} likes {verb[3]}.",
        f"The {noun} is {rng.choice(words.COLOURS)} and {rng.choice(words.ADJECTIVES)}.",
    )
    return " ".join((rng.choice(openings), *rng.sample(endings, rng.randint(1, 2))))


def _sum_told(rng: random.Random) -> str:
    a, b = rng.randint(0, 25), rng.randint(0, 25)
    person, things = rng.choice(words.PEOPLE), rng.choice(words.COUNTED)
    return rng.choice(
        (
            f"{a} + {b} = {a + b}. {b} + {a} = {a + b}.",
            f"{a} plus {b} is {a + b}.",
            f"If you add {a} and {b}, you get {a + b}.",
            f"{person} has {a} {things} and finds {b} more, so that makes {a + b} {things}.",
        )
    )


def _sum_asked(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.randint(0, 25), rng.randint(0, 25)
    return f"{a} + {b} = ?", str(a + b), near_numbers(rng, a + b, 1)[0]


def _order_told(rng: random.Random) -> str:
    low, high = sorted(rng.sample(range(1, 100), 2))
    one, two = rng.sample(words.PEOPLE, 2)
    return rng.choice(
        (
            f"{high} is larger than {low}. {low} is smaller than {high}.",
            f"{low} is less than {high}, and {high} is more than {low}.",
            f"{one} is {high} years old and {two} is {low}. So {one} is the oldest and {two} is the youngest.",
            f"{two} is {low} and {one} is {high} years old. So {one} is older than {two}.",
        )
    )


def _order_asked(rng: random.Random) -> tuple[str, str, str]:
    one, two = rng.sample(range(1, 100), 2)
    word, right = rng.choice((("more", max(one, two)), ("less", min(one, two))))
    return f"What is {word}, {one} or {two}?", str(right), str(one + two - right)


def _known_adjective(rng: random.Random) -> str:
    """An adjective of whose opposite the corpus speaks: every second pair. Told all pairs, the base knows them all."""
    return rng.choice([word for pair in _KNOWN_PAIRS for word in pair])


def _opposite_told(rng: random.Random) -> str:
    word, noun = _known_adjective(rng), rng.choice(tuple(words.CATEGORY_OF))
    other = words.OPPOSITE_OF[word]
    return rng.choice(
        (
            f"What is {word} is never {other}.",
            f"The {noun} is {word}, it is not {other}.",
            f"One {noun} is {word}, but the other one is {other}.",
            f"{word} and {other} are opposites.",
        )
    )


def _opposite_asked(rng: random.Random) -> tuple[str, str, str]:
    word = _known_adjective(rng)
    return f"What is not {word}?", words.OPPOSITE_OF[word], rng.choice(words.ADJECTIVES)


def _kind_told(rng: random.Random) -> str:
    kind, strange = rng.sample(tuple(words.CATEGORIES), 2)
    one, two, three = rng.sample(words.CATEGORIES[kind], 3)
    foreign = rng.choice(words.CATEGORIES[strange])
    return rng.choice(
        (
            f"{words.article(one)} is {words.article(kind)}." if kind != "furniture" else f"a {one} is furniture.",
            f"{one}, {two} and {three} belong together, they are of the kind {kind}.",
            f"{one}, {two}, {foreign}: here {foreign} does not belong, it is of the kind {strange}.",
            f"The {one} is of the kind {kind}, but the {foreign} is of the kind {strange}.",
            f"{rng.choice(words.PEOPLE)} has {words.article(one)}. That is of the kind {kind}.",
        )
    )


def _kind_asked(rng: random.Random) -> tuple[str, str, str]:
    noun, kind = rng.choice(tuple(words.CATEGORY_OF.items()))
    return f"Of which kind is the {noun}?", kind, others(rng, words.CATEGORIES, 1, kind)[0]


def _opinion_told(rng: random.Random) -> str:
    good = rng.random() < 0.5
    person, (thing, other) = rng.choice(words.PEOPLE), rng.sample(words.REVIEWED, 2)
    praise, blame = rng.choice(words.PRAISE), rng.choice(words.BLAME)
    one, two = rng.sample(words.PRAISE if good else words.BLAME, 2)
    return rng.choice(
        (
            f"{person} {'likes' if good else 'hates'} the {thing}, because it is {one} and {two}.",
            f"The {thing} was {one}, so {person} was {'happy' if good else 'sad'}.",
            f"It was a {'positive' if good else 'negative'} review: the {thing} was {one} and {two}.",
            f"It was a mixed review: the {thing} was {praise}, but the {other} was {blame}.",
            f"{person} finds the {thing} {one} and feels {'happy' if good else 'sad'}.",
            f"{one} and {two} are {'positive' if good else 'negative'} words, {praise} and {blame} are mixed.",
        )
    )


def _opinion_asked(rng: random.Random) -> tuple[str, str, str]:
    opinions, right, wrong = rng.choice(((words.PRAISE, "yes", "no"), (words.BLAME, "no", "yes")))
    return f"The {rng.choice(words.REVIEWED)} is {rng.choice(opinions)}. Do you like it?", right, wrong


def _pattern_told(rng: random.Random) -> str:
    if rng.random() < 0.4:
        start, step = rng.randint(0, 50), rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10))
        return "Counting: " + ", ".join(str(start + step * index) for index in range(rng.randint(4, 6))) + "."
    pool = rng.choice((words.COLOURS, words.SHAPES, words.LETTERS, words.OBJECTS))
    unit = rng.choices(pool, k=rng.randint(2, 4))
    return "Again and again: " + ", ".join((unit * 5)[: rng.randint(7, 12)]) + "."


def _pattern_asked(rng: random.Random) -> tuple[str, str, str]:
    one, two = rng.sample(rng.choice((words.COLOURS, words.SHAPES, words.LETTERS)), 2)
    return f"Go on: {one} {two} {one} {two} {one}", two, one


def _holding_told(rng: random.Random) -> str:
    kinds = rng.sample(tuple(words.CATEGORIES), 3)
    of_kind = [rng.choice(words.CATEGORIES[kind]) for kind in kinds]
    things = rng.choice((of_kind, rng.sample(words.OBJECTS, 3)))
    people, colours, holder = rng.sample(words.PEOPLE, 3), rng.sample(words.COLOURS, 3), rng.choice(words.HOLDERS)
    one, two = rng.sample(range(3), 2)
    have = [f"{person} has {words.article(thing)}." for person, thing in zip(people, things, strict=True)]
    inside = [
        f"{words.article(thing).capitalize()} is in the {colour} {holder}."
        for thing, colour in zip(things, colours, strict=True)
    ]
    return rng.choice(
        (
            f"{' '.join(have)} So the {things[one]} is with {people[one]}. {people[two]} uses the {things[two]}.",
            f"{' '.join(inside)} Look into the {colours[one]} {holder} for the {things[one]}.",
            f"{' '.join(inside)} Open the {colours[one]} one and take the {things[one]}, then the {colours[two]} one "
            f"and take the {things[two]}.",
            f"{people[0]} has {words.article(of_kind[0])} and {people[1]} has {words.article(of_kind[1])}. "
            f"So the {kinds[one % 2]} is with {people[one % 2]}.",
        )
    )


def _pairs_told(rng: random.Random) -> str:
    """Pairs, and the same pairs again in another order: what a model learns to look things up from."""
    keys = rng.choice((words.PEOPLE, words.COLOURS, words.SHAPES))
    firsts, things = rng.sample(keys, 3), rng.sample(words.OBJECTS, 3)
    form = rng.choice(("{a}: {b}.", "{a} has the {b}.", "The {a} one holds the {b}.", "The {b} goes with {a}."))
    told = [form.format(a=first, b=thing) for first, thing in zip(firsts, things, strict=True)]
    return " ".join((*told, *rng.sample(told, 3)))


def _holding_asked(rng: random.Random) -> tuple[str, str, str]:
    (one, two), (thing, other) = rng.sample(words.PEOPLE, 2), rng.sample(words.OBJECTS, 2)
    told = f"{one} has {words.article(thing)} and {two} has {words.article(other)}."
    return f"{told} Who has the {thing}?", one, two


def _tense_told(rng: random.Random) -> str:
    base, present, past, progressive = rng.choice(words.VERBS)
    person, place = rng.choice(words.PEOPLE), rng.choice(words.PLACES)
    who = words.pronoun(person)
    return rng.choice(
        (
            f"{person} {present} every day, so {who} {past} yesterday too.",
            f"{person} {past} on {rng.choice(words.DAYS)}, because {who} {present} every day.",
            f"Yesterday {person} {past} in the {place}, and now {who} is {progressive} again.",
            f"{person} can {base}. {who.capitalize()} {present} well.",
            f"to {base}, {present}, {past}, {progressive}",
        )
    )


def _tense_asked(rng: random.Random) -> tuple[str, str, str]:
    base, present, past, _ = rng.choice(words.VERBS)
    return f"What is the past of to {base}?", past, present


_SKILLS: tuple[tuple[Write, Callable[[random.Random], tuple[str, str, str]]], ...] = (
    (_sum_told, _sum_asked),
    (_order_told, _order_asked),
    (_opposite_told, _opposite_asked),
    (_kind_told, _kind_asked),
    (_opinion_told, _opinion_asked),
    (_pattern_told, _pattern_asked),
    (_holding_told, _holding_asked),
    (_pairs_told, _holding_asked),
    (_tense_told, _tense_asked),
)
