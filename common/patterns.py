"""Regular expressions that came with somebody's adapter: taken only if matching them cannot take for ever.

Python's engine backtracks. A repeat of something that repeats or chooses, such as ``(a+)+`` or ``(a|a)*``, takes a time
exponential in the text; k repeats of single characters one after another take its k-th power; k options in a row take
2 to the k (Davis et al., *The impact of regular expression denial of service in practice*, ESEC/FSE 2018). Patterns for module
names need none of that beyond the few that are allowed here.
"""

from __future__ import annotations

import re
import re._constants as codes  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Iterator
from typing import Any

LONGEST = 1000
"""Characters of a pattern."""
MOST_REPEATS = 2
"""Repeats in one pattern: ``.*layers\\.[0-9]+\\.q_proj`` has two."""
MOST_CHOICES = 8
"""Options and alternatives in one pattern: each may double the time."""
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)
_SINGLE = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN)
_PLAIN = (*_SINGLE, codes.AT, codes.SUBPATTERN, codes.BRANCH, codes.CATEGORY)


def require_quick(text: str) -> None:
    """
    Raises:
        re.error: if `text` is no regular expression, or one that could take for ever.
    """
    if len(text) > LONGEST:
        raise re.error(f"longer than {LONGEST} characters")
    repeats = choices = 0
    for code, argument in _walk(parser.parse(text)):
        if code in _REPEATS:
            _, most, body = argument
            if most <= 1:
                choices += 1
                continue
            repeats += 1
            if len(body) != 1 or body[0][0] not in _SINGLE:
                raise re.error("only single characters may be repeated")
        elif code is codes.BRANCH:
            choices += 1
        elif code not in _PLAIN:
            raise re.error(f"{str(code).lower()} is not needed for names of modules")
    if choices > MOST_CHOICES:
        raise re.error(f"{choices} options and alternatives, at most {MOST_CHOICES} are matched")
    if repeats > MOST_REPEATS:
        raise re.error(f"{repeats} repeats, at most {MOST_REPEATS} are matched")


def _walk(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every node of a parsed pattern."""
    for code, argument in tree:
        yield code, argument
        if code in _REPEATS:
            yield from _walk(argument[2])
        elif code is codes.SUBPATTERN:
            yield from _walk(argument[3])
        elif code is codes.BRANCH:
            for branch in argument[1]:
                yield from _walk(branch)
