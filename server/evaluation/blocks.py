"""What report pages are built of: a document of sections, figures, tables and family trees. All text is escaped here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape as _escape

from seedbed.server.evaluation.style import CSS
from seedbed.server.evaluation.tables import DIGEST, Generation, Grid


def escape(text: str) -> str:
    """Text as HTML; a number keeps its % sign on its line."""
    return _escape(text).replace(" %", "&nbsp;%")


def document(name: str, head: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page.

    Args:
        name: for the window's title.
        head: see `header`.
        sections: id, title and content as HTML; those without content are left out.
    """
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: Seedbed report</title><style>{CSS}</style></head>\n"
        f'<body><header>{head}</header><nav aria-label="Sections">{links}</nav>\n'
        f"<main>{body}</main></body></html>\n"
    )


def header(kind: str, name: str, answer: str, notes: Sequence[str]) -> str:
    """The answer's first sentence large, the rest of it below by its lines, then whatever a reader must know."""
    first, rest = opening_of(answer)
    notices = "".join(f'<p class="notice">{escape(note)}</p>' for note in notes)
    opening = f'<p class="answer">{escape(first)}</p>'
    more = "".join(f'<p class="more">{escape(line)}</p>' for line in rest.split("\n") if line)
    return f'<p class="kind">{escape(kind)}</p><h1>{escape(name)}</h1>{opening}{more}{notices}'


def opening_of(answer: str) -> tuple[str, str]:
    """The first sentence, and the rest."""
    first, *rest = re.split(r"(?<=\.)\s", answer, maxsplit=1)
    return first, "".join(rest)


def figure(svg: str, caption: str = "", *, wide: bool = False) -> str:
    """A plot with what is said below it; a wide one scrolls sideways on a phone."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    kind = ' class="wide" tabindex="0"' if wide else ""
    return f"<figure><div{kind}>{svg}</div>{below}</figure>"


def optional(grid: Grid | None) -> str:
    return table(grid) if grid is not None else ""


def table(grid: Grid, *, caption: bool = True) -> str:
    """A grid with its note; it scrolls sideways on its own."""
    # A region that can be focused, so that a keyboard can scroll it too.
    name = escape(grid.caption)
    title = f"<caption>{escape(grid.caption)}</caption>" if caption else ""
    heads = "".join(f'<th scope="col">{escape(header)}</th>' for header in grid.headers)
    rows = "".join(_row(grid, index, row) for index, row in enumerate(grid.rows))
    note = f'<p class="note">{escape(grid.note)}</p>' if grid.note else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table>{title}'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _row(grid: Grid, index: int, row: Sequence[str]) -> str:
    kind = ' class="total"' if row[0] in ("mean", "all") else ""
    cells = "".join(
        f"<td><strong>{escape(cell)}</strong></td>" if (index, place) in grid.strong else f"<td>{escape(cell)}</td>"
        for place, cell in enumerate(row[1:], start=1)
    )
    return f'<tr{kind}><th scope="row">{escape(row[0])}</th>{cells}</tr>'


def tree(generations: Sequence[Generation]) -> str:
    """Generations as nested lists."""
    items = []
    for generation in generations:
        nodes = " ".join(
            f'<span class="node" title="{escape(node.kind)} {escape(node.digest)}">{escape(node.name)} '
            f"<code>{escape(node.digest[:DIGEST])}</code></span>"
            for node in generation.nodes
        )
        below = tree(generation.children) if generation.children else ""
        items.append(f"<li>{nodes}{below}</li>")
    return f"<ul>{''.join(items)}</ul>"
