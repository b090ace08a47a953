"""The style sheet of the report: system fonts, no external resources, light and dark."""

CSS = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1d2420; --soft: #5b665f; --line: #d9dfda; --panel: #f1f5f1;
  --accent: #1d6b45; --first: #1d6b45; --second: #b3560f; --warn: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181a; --ink: #e6ebe7; --soft: #9dabA2; --line: #353f3a;
  --panel: #1c2322; --accent: #7bd3a3; --first: #6fcf9b; --second: #f0a15c; --warn: #3a2e17; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 66rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
header { padding-top: 1rem; }
h1 { font-size: clamp(1.6rem, 5vw, 2.2rem); line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 1rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.kind { margin: 0; color: var(--soft); font-size: .9rem; }
.answer { margin: 0; padding: 1rem 1.2rem; background: var(--panel); border-left: 4px solid var(--accent);
  border-radius: 0 .5rem .5rem 0; font-size: clamp(1.1rem, 3.2vw, 1.35rem); line-height: 1.4; font-weight: 600; }
.more { margin: 1rem 0 0; max-width: 48rem; }
.notice { margin: 1rem 0 0; padding: .6rem 1rem; background: var(--warn); border-radius: .5rem; }
.note, figcaption { color: var(--soft); font-size: .875rem; max-width: 48rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .4rem 1.1rem; margin: 1.5rem 0 0; font-size: .9rem; }
a { color: var(--accent); text-underline-offset: .2em; }
figure { margin: 1rem 0; }
.plot { display: block; width: 100%; height: auto; }
.plot * { stroke-linejoin: round; stroke-linecap: butt; }
.wide { overflow-x: auto; }
.wide .plot { min-width: 36rem; }
.scroll { overflow-x: auto; margin: 1.25rem 0 .25rem; border: 1px solid var(--line); border-radius: .5rem; }
.scroll:focus-visible, .wide:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .7rem .75rem .3rem; position: sticky; left: 0; }
th, td { padding: .42rem .75rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 500; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); font-weight: 500; }
tbody tr:hover > * { background: var(--panel); }
.total > * { border-top: 2px solid var(--soft); font-weight: 600; }
td strong { color: var(--accent); }
.tree { overflow-x: auto; }
.tree ul { list-style: none; margin: 0; padding-left: 1.4rem; border-left: 1px solid var(--line); }
.tree > ul { padding-left: 0; border: 0; }
.tree li { margin: .5rem 0; }
.node { display: inline-block; margin: .15rem .3rem .15rem 0; padding: .15rem .55rem; background: var(--panel);
  border: 1px solid var(--line); border-radius: 1rem; font-size: .85rem; }
code { font: .85em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: var(--soft); }
pre { overflow-x: auto; padding: .8rem 1rem; background: var(--panel); border-radius: .5rem; }
pre code { color: inherit; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; }
details thead th { text-align: left; }
details td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 600px) { th { white-space: normal; } tbody th { min-width: 6.5rem; max-width: 10rem; } }
@media print { nav { display: none; } .scroll, .wide { overflow: visible; } details > * { display: block; } }
"""
