"""What tests of whole simulated runs share: the ledger of a run, and the sight of every process that works for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


def ledger(out: Path) -> list[dict[str, Any]]:
    """All whole entries; the last may be half written while the run goes on."""
    path = out / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def processes_of(out: Path) -> list[psutil.Process]:
    """Every process that works for a run: Ray's and the training processes inherit where the run's nodes are."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("SEEDBED_NODES") == str(out / "nodes")
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def left_of(out: Path, below: list[psutil.Process]) -> list[psutil.Process]:
    """What of a run, or of the processes that were below it, is there after 15 seconds."""
    psutil.wait_procs(below, timeout=15)
    wait_until(lambda: not processes_of(out), 5)
    return processes_of(out) + [process for process in below if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and that nobody has asked for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
