"""Some faults of the matrix, on real federations with TLS; all of them by `make faults` (see `table.py`)."""

from __future__ import annotations

import warnings
from pathlib import Path

import clock
import pytest
from faults import ALL, KINDS, POSSIBLE, STAGES, TARGETS, Cell
from journey import Journey, Outcome, in_order, undisturbed

_TRIES = 3
JOURNEYS: list[dict[Cell, set[str]]] = [
    {
        Cell("training", "kill -9", "seed"): {"survived"},
        Cell("client", "kill -9", "expert"): {"survived"},
        Cell("superlink", "kill -9", "combine"): {"survived"},
        Cell("coordinator", "kill -9", "evaluate"): {"resumed"},
    },
    {
        Cell("coordinator", "kill -9", "combine"): {"resumed"},
        Cell("client", "clock skew", "seed"): {"survived"},
        Cell("client", "duplicate reply", "expert"): {"survived"},
        Cell("superlink", "SIGTERM", "evaluate"): {"survived"},
    },
]
"""Faults that one federation has, and what becomes of each: two federations, since each takes minutes."""


@pytest.fixture(scope="session")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return undisturbed(tmp_path_factory.mktemp("undisturbed") / "logs")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("expected", JOURNEYS, ids=lambda expected: " ".join(map(str, expected)).replace(" ", "-"))
def test_a_federation_that_is_hit_ends_with_the_digests_of_an_undisturbed_one(
    expected: dict[Cell, set[str]], digests: dict[str, str], tmp_path: Path
) -> None:
    cells = [cell for cell in expected if cell.kind != "clock skew" or not clock.reason_not_to()]
    if len(cells) < len(expected):
        warnings.warn(f"no clock is skewed here: {clock.reason_not_to()}", stacklevel=1)
    outcomes: dict[Cell, Outcome] = {}
    for attempt in range(_TRIES):  # a stage may be over before its fault comes
        missing = [cell for cell in cells if cell not in outcomes]
        if missing:
            outcomes |= Journey(in_order(missing), digests, tmp_path / f"logs-{attempt}").run()
    for cell in cells:
        assert cell in outcomes, f"{cell} was not done: {outcomes}"
        assert outcomes[cell].verdict in expected[cell], f"{cell}: {outcomes[cell]}"


def test_every_combination_is_done_or_has_a_reason_why_it_cannot_be() -> None:
    assert len(ALL) == len(TARGETS) * len(KINDS) * len(STAGES) == 160
    assert all(cell.nonsense for cell in ALL if cell not in POSSIBLE)
    for target in TARGETS:
        for kind in KINDS[:3]:
            stages = [cell.stage for cell in POSSIBLE if (cell.target, cell.kind) == (target, kind)]
            assert stages == list(STAGES if target != "training" else STAGES[:2]), "kills and hangs can hit anything"
