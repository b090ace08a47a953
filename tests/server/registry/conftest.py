"""A real registry, in a process of its own, over a run directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from registry.process import Local, Process


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts registries over ``tmp_path/run`` and ends them afterwards."""
    started: list[Process] = []

    def start(*arguments: str) -> Process:
        started.append(Process(tmp_path / "run", *arguments))
        return started[-1]

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    yield start
    for process in started:
        process.kill()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Local]:
    local = Local(tmp_path / "run")
    yield local
    local.server.stop(0)
