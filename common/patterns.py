"""Regular expressions that came with somebody's adapter: taken only if matching them cannot take for ever.

Python's engine backtracks. A repeat of something that repeats or chooses, such as ``(a+)+`` or ``(a|a)*``, takes a time
exponential in the text; k repeats of single characters one after another take its k-th power; options and alternatives in a row
take the product of their numbers (Davis et al., *The impact of regular expression denial of service in practice*, ESEC/FSE
2018). Patterns for module names need none of that beyond the little that is allowed here.
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
MOST_WAYS = (256, 256, 8)
"""Ways to choose among all options and alternatives of a pattern, by the number of its repeats: the time grows with them."""
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)
_SINGLE = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN)
_PLAIN = (*_SINGLE, codes.AT, codes.SUBPATTERN, codes.BRANCH, codes.CATEGORY)


def require_quick(text: str) -> bool:
    """
    Returns:
        whether the pattern is plain: it neither repeats nor chooses, so that matching it costs next to nothing.

    Raises:
        re.error: if `text` is no regular expression, or one that could take for ever.
    """
    if len(text) > LONGEST:
        raise re.error(f"it is longer than {LONGEST} characters")
    repeats, ways = 0, 1
    for code, argument in _walk(parser.parse(text)):
        if code in _REPEATS:
            _, most, body = argument
            if most <= 1:
                ways *= 2
                continue
            repeats += 1
            if len(body) != 1 or body[0][0] not in _SINGLE:
                raise re.error("it repeats more than a single character, which could take for ever")
        elif code is codes.BRANCH:
            ways *= len(argument[1])
        elif code not in _PLAIN:
            raise re.error(f"it has {str(code).lower()}, which names of modules do not need")
    if repeats > MOST_REPEATS:
        raise re.error(f"it has {repeats} repeats, and more than {MOST_REPEATS} could take for ever")
    if ways > MOST_WAYS[repeats]:
        raise re.error(
            f"it has {ways:,} ways to choose among its alternatives, and at most {MOST_WAYS[repeats]} are tried"
        )
    return repeats == 0 and ways == 1


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
