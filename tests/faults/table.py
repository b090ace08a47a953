"""The fault matrix: every fault on real federations, one after the other, and the table of what became of them.

    python tests/faults/table.py [--only PATTERN] [--share target|kind|none] [--json FILE] [--resume FILE] [--show]

Results are kept in a JSON file after every federation, so that an interrupted run goes on with `--resume FILE`, which does
again what failed. With `--share target` (the default) one federation has the faults of one kind on one target, in all
stages; with `kind` those of all targets, one after the other; with `none` each has a federation for itself. What fails in
company is done again alone.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import clock
from faults import ALL, HOW, KINDS, POSSIBLE, STAGES, TARGETS, Cell
from journey import Journey, Outcome, in_order, undisturbed
from rich.console import Console
from rich.table import Table

_LOOKS = {"survived": "green", "resumed": "cyan", "refused": "yellow", "failed": "bold red"}
_TRIES = 4
_GROUPS: dict[str, Callable[[Cell], object]] = {
    "target": lambda cell: (KINDS.index(cell.kind), TARGETS.index(cell.target)),
    "kind": lambda cell: KINDS.index(cell.kind),
    "none": str,
}


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, and print the table; 1 where a cell failed or could not be done."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    store = options.resume or options.json or Path(tempfile.gettempdir()) / "seedbed-faults.json"
    found = _load(store) if options.resume or options.show else {}
    wanted = [cell for cell in POSSIBLE if fnmatch.fnmatch(str(cell), options.only)]
    console = Console(width=options.width or None)
    if not options.show:
        found = {cell: outcome for cell, outcome in found.items() if outcome.verdict != "failed"}  # mended, perhaps
        logs = store.with_suffix(".logs")
        for group in _groups([cell for cell in wanted if cell not in found and not _reason(cell)], options.share):
            _run(group, found, store, logs, console)
    print_table(found, console)
    lacking = [cell for cell in wanted if cell not in found]
    return int(bool(lacking) or any(outcome.verdict == "failed" for outcome in found.values()))


def _run(group: list[Cell], found: dict[Cell, Outcome], store: Path, logs: Path, console: Console) -> None:
    """All cells of a group; what one federation could not do, another gets, and what failed in company is tried alone."""
    queue = [in_order(group)]
    tries: Counter[Cell] = Counter()
    while queue:
        cells = queue.pop(0)
        began = time.monotonic()
        console.print(f"{time.strftime('%H:%M:%S')} {', '.join(map(str, cells))}", highlight=False)
        where = logs / str(cells[0]).replace("/", "-").replace(" ", "")
        journey = Journey(cells, _undisturbed(store, logs), where)
        outcomes = journey.run()
        if journey.trouble:
            console.print(f"  {journey.trouble}", highlight=False, markup=False)
        tries.update(cells)
        for cell, outcome in outcomes.items():
            outcome.seconds = round(time.monotonic() - began, 1)
            console.print(f"  {cell}: {outcome.verdict}  {outcome.said}", highlight=False, markup=False)
            if outcome.verdict == "failed" and outcome.shared > 1 and tries[cell] < 2:
                queue.append([cell])
            else:
                found[cell] = outcome
        left = [cell for cell in cells if cell not in outcomes]
        for cell in [cell for cell in left if tries[cell] >= _TRIES]:
            found[cell] = Outcome("failed", f"the fault could not be done in {_TRIES} federations", 0.0, 1)
        # A stage may be over before the last of its faults; twice too late, a fault gets a federation for itself.
        again = [cell for cell in left if tries[cell] < 2]
        queue += [again] if again else []
        queue += [[cell] for cell in left if 2 <= tries[cell] < _TRIES]
        _save(store, found)


def _undisturbed(store: Path, logs: Path) -> dict[str, str]:
    """Digests of an undisturbed run, made once for this very code and kept beside the results."""
    place, code = store.with_suffix(".undisturbed.json"), _code()
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(place.read_text())
        if known["code"] == code:
            return dict(known["digests"])
    digests = undisturbed(logs / "undisturbed")
    place.write_text(json.dumps({"code": code, "digests": digests}))
    return digests


def _code() -> str:
    """Hash of everything that a result depends on."""
    total = hashlib.sha256()
    for package in ("common", "client", "server"):
        root = Path(__file__).parents[2] / package
        for file in sorted(root.rglob("*.py")):
            total.update(f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _reason(cell: Cell) -> str:
    """Why a cell cannot be done on this machine."""
    if cell.kind == "disk full" and cell.target in ("client", "coordinator") and os.geteuid() != 0:
        return "mounting a tmpfs needs root"
    return clock.reason_not_to() if cell.kind == "clock skew" else ""


def _groups(cells: Iterable[Cell], share: str) -> Iterator[list[Cell]]:
    key = _GROUPS[share]
    for _, group in groupby(sorted(cells, key=lambda cell: (KINDS.index(cell.kind), str(key(cell)))), key=key):
        yield list(group)


def print_table(found: dict[Cell, Outcome], console: Console) -> None:
    """Targets by kinds, in each place the verdicts of the stages; then what stands behind it."""
    table = Table(title=f"Faults: {' · '.join(STAGES)}", show_lines=True)
    table.add_column("")
    for target in TARGETS:
        table.add_column(target)
    for kind in KINDS:
        table.add_row(kind, *(_square(found, [Cell(target, kind, stage) for stage in STAGES]) for target in TARGETS))
    console.print(table)
    console.print(
        "– does not apply, · not run. survived: nobody did anything; resumed: stopped with a reason, --resume"
    )
    console.print(
        "completed it; refused: the bad input was refused with a reason, the run went on. Always the same digests."
    )
    counts = Counter(outcome.verdict for outcome in found.values())
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _LOOKS)
    nonsense = len(ALL) - len(POSSIBLE)
    missing = len(POSSIBLE) - len(found)
    console.print(f"{len(ALL)} cells: {told}; {nonsense} do not apply, {missing} not run.", highlight=False)
    for kind, how in HOW.items():
        console.print(f"  {kind}: {how}", highlight=False)
    for reason, cells in _nonsense().items():
        console.print(f"  does not apply: {', '.join(cells)}: {reason}", highlight=False)
    for cell, outcome in found.items():
        if outcome.verdict == "failed":
            console.print(f"  {cell} failed: {outcome.said}", markup=False, highlight=False)


def _square(found: dict[Cell, Outcome], cells: list[Cell]) -> str:
    return "\n".join(_mark(found, cell) for cell in cells)


def _mark(found: dict[Cell, Outcome], cell: Cell) -> str:
    if cell.nonsense:
        return "[dim]–[/dim]"
    if cell not in found:
        return "[dim]·[/dim]"
    verdict = found[cell].verdict
    return f"[{_LOOKS[verdict]}]{verdict}[/]"


def _nonsense() -> dict[str, list[str]]:
    by_reason: dict[str, dict[str, list[str]]] = {}
    for cell in ALL:
        if cell.nonsense:
            by_reason.setdefault(cell.nonsense, {}).setdefault(f"{cell.target} {cell.kind}", []).append(cell.stage)
    return {reason: [f"{what} ({', '.join(s)})" for what, s in cells.items()] for reason, cells in by_reason.items()}


def _load(store: Path) -> dict[Cell, Outcome]:
    if not store.exists():
        return {}
    told = json.loads(store.read_text())["cells"]
    known = {str(cell): cell for cell in POSSIBLE}
    return {known[name]: Outcome(**outcome) for name, outcome in told.items() if name in known}


def _save(store: Path, found: dict[Cell, Outcome]) -> None:
    commit = ""
    with contextlib.suppress(OSError):  # no git
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    told = {"commit": commit, "cells": {str(cell): asdict(outcome) for cell, outcome in found.items()}}
    aside = store.with_suffix(".new")
    aside.write_text(json.dumps(told, indent=1) + "\n")
    aside.replace(store)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="table.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of TARGET/KIND/STAGE, such as 'client/*/seed'")
    parser.add_argument("--share", choices=list(_GROUPS), default="target", help="which faults share a federation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results go")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with these results")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--width", type=int, default=0, help="of the table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
