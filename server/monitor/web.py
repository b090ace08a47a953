"""The page that the coordinator's gateway serves.

It is one file without external resources; it asks for `status.json` beside it. Whoever serves it sends `CSP` as its
Content-Security-Policy: nothing but the page's own script and style may run, and nothing but its own origin is asked.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache

from seedbed.server.evaluation.style import CSS
from seedbed.server.monitor.script import SCRIPT

STYLE = (
    CSS
    + """
progress { width: 100%; height: .7rem; accent-color: var(--accent); margin-top: 1rem; }
[hidden] { display: none !important; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0 0; }
.facts div { background: var(--panel); border-radius: .5rem; padding: .5rem .75rem; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 0 1.25rem; }
.plot .line { fill: none; stroke: var(--first); stroke-width: 2; }
.plot .dot { fill: var(--first); }
.plot .axis { stroke: var(--line); }
.plot text { fill: currentColor; font-size: 12px; font-family: inherit; }
th.name, td.name { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
th.text, td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 16rem; }
th.word, td.word { text-align: left; }
#notes th { white-space: normal; overflow-wrap: anywhere; max-width: none; font-weight: 400; }
tr[data-state="running"] td:nth-child(2) { color: var(--accent); font-weight: 600; }
tr[data-state="quarantined"] td, tr[data-state="refused"] td, tr[data-state="gone"] td { color: var(--second); }
"""
)

_FACTS = (
    ("participants", "Participants here"),
    ("training", "Jobs training"),
    ("waiting", "Jobs waiting"),
    ("done", "Jobs done"),
    ("unused", "Results not used"),
    ("arrived", "Adapters arrived"),
    ("contributed", "Contributed"),
    ("received", "Received"),
    ("sent", "Sent"),
    ("running", "Running for"),
)
_TABLES = (
    ("nodes", "Participants", ("Name", "State|word", "Job|name", "Done", "Seen", "Tasks|name", "Devices|name")),
    (
        *("jobs", "Jobs"),
        ("Job", "State|word", "Participant|name", "Steps", "Loss", "Tokens/s", "Time", "Attempts", "Reason|text"),
    ),
    ("arrivals", "Arrivals", ("Adapter", "Participant|name", "Digest|word", "Size", "Norm", "Cosine", "When")),
    (
        *("contributions", "Contributions"),
        ("Name", "Task|name", "Participant|name", "Digest|word", "State|word", "When"),
    ),
    ("notes", "Notes", ("Note", "When")),
)
"""Id, title, and headers, each with the kind of its column where it is not a number."""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


CSP = (
    f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Value of the Content-Security-Policy header that belongs to `page`."""


@cache
def page() -> str:
    """The page as HTML; it holds nothing of any run and asks `status.json` for it."""
    facts = "".join(f'<div><dt>{label}</dt><dd id="{key}"></dd></div>' for key, label in _FACTS)
    tables = "".join(_table(*one) for one in _TABLES)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="robots" content="noindex"><link rel="icon" href="data:,">'
        f"<title>Seedbed</title><style>{STYLE}</style></head>\n"
        '<body><header><p class="kind">Seedbed federation</p><h1 id="name">…</h1>'
        '<p class="answer" id="answer" role="status">Asking the coordinator.</p>'
        '<progress id="bar" aria-label="Progress of the stage" hidden></progress>'
        '<p class="notice" id="reason" role="alert" hidden></p><p class="notice" id="notice" role="status" hidden></p>'
        '<noscript><p class="notice">This page needs its script; the numbers are in <a href="status.json">status.json</a>.'
        f'</p></noscript></header>\n<main><dl class="facts">{facts}</dl>'
        '<section><h2>Loss curves</h2><p class="note" id="none">No training has reported yet.</p>'
        '<div class="group" hidden><div class="curves" id="now"></div></div>'
        '<div class="group" hidden><details><summary>Ended last</summary><div class="curves" id="before"></div></details></div>'
        f"</section>{tables}</main>\n<script>{SCRIPT}</script></body></html>\n"
    )


def _table(key: str, title: str, headers: tuple[str, ...]) -> str:
    heads = "".join(_head(*header.partition("|")[::2]) for header in headers)
    return (
        f'<section hidden><h2>{title}</h2><div class="scroll" role="region" tabindex="0" aria-label="{title}">'
        f'<table id="{key}"><thead><tr>{heads}</tr></thead><tbody></tbody></table></div></section>'
    )


def _head(header: str, kind: str) -> str:
    return f'<th scope="col" class="{kind}">{header}</th>'
