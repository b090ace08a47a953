"""Reports in a real browser: nothing missing, nothing fetched, nothing that sticks out, on a phone and on a desk."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import laboratory
import pytest
from browser import Browser, executable

from seedbed.common.drift import TextDrift
from seedbed.common.routing import RoutingDiagnostics
from seedbed.server.ablation.report import write_ablation
from seedbed.server.evaluation.compare import Circumstances, Measured, build_results
from seedbed.server.evaluation.report import write_report
from seedbed.server.evaluation.results import Cost, LineageNode

FOUND = executable()
pytestmark = pytest.mark.skipif(
    FOUND is None or sys.platform == "win32",
    reason="no Chromium here: `apt-get install chromium`, `playwright install chromium`, or name one in SEEDBED_BROWSER",
)
SIZES = [(390, False), (390, True), (1200, False)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert FOUND is not None
    with Browser(FOUND) as opened:
        yield opened


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ablation")
    write_ablation(laboratory.PLAN, laboratory.outcomes(), directory, "seedbed ablate made-up " + "--set a.b=c " * 20)
    return directory / "report.html"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With every section that there can be."""

    def drift(kl: float) -> TextDrift:
        return laboratory.drift(kl)

    def measured(name: str, right: int, digest: str | None = None, **more: object) -> Measured:
        scores = [
            laboratory.score(task, [1.0] * right + [0.0] * (50 - right), task != "odd")
            for task in ("sum", "mood", "odd")
        ]
        return Measured(name, scores, digest, 8, drift=drift(right / 100), **more)  # type: ignore[arg-type]

    use = laboratory.routing()
    routing = {
        task: RoutingDiagnostics.model_validate(
            {"kind": "learned", "names": use.names, "overall": use.overall, "layers": use.layers}
        )
        for task in ("sum", "mood")
    }
    rows = [
        measured("base", 10),
        measured("seed", 15, "a" * 64),
        measured("expert:sum", 40, "b" * 64),
        measured("tuned:sum", 38, "c" * 64),
        measured("average", 30, "d" * 64),
        measured("learned", 33, "e" * 64, routing=routing, mixture=True),
    ]
    nodes = [
        LineageNode(digest="a" * 64, name="seed", kind="seed"),
        LineageNode(digest="b" * 64, name="expert:sum", kind="expert", parents=("a" * 64,)),
        LineageNode(digest="d" * 64, name="average", kind="merge", parents=("b" * 64,)),
    ]
    about = Circumstances(
        command="seedbed simulate embedded " + "--set a.b=c " * 20,
        lineage=nodes,
        costs=[Cost(name="seed", seconds=10, steps=20, tokens=1000)],
        config={"tasks": {"experts": ["sum", "mood"]}},
        diagnostics={"factor_gap_seeded": 0.01},
    )
    directory = tmp_path_factory.mktemp("federation")
    write_report(*build_results("a federation", rows, about), directory)
    return directory / "report.html"


@pytest.mark.parametrize(("width", "dark"), SIZES)
@pytest.mark.parametrize("report", ["ablation", "federation"])
def test_a_report_renders_whole(
    report: str, width: int, dark: bool, browser: Browser, request: pytest.FixtureRequest
) -> None:
    page: Path = request.getfixturevalue(report)
    seen = browser.look(page, width, dark=dark)
    assert seen.errors == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert seen.overflow == 0, "the page itself never scrolls sideways"
    assert len(seen.figures) == page.read_text(encoding="utf-8").count('<svg class="plot"') > 5
    for figure in seen.figures:
        assert figure["width"] >= 200, figure
        assert figure["height"] >= 100, figure
        assert figure["marks"] >= 10, figure
    assert seen.small == [], "every letter of a plot can be read"
    assert seen.image.startswith(b"\x89PNG")


def test_what_is_wrong_with_a_page_is_seen(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><html><head><meta name='viewport' content='width=device-width'></head><body>"
        "<div style='width:2000px;height:9px'></div><img src='missing.png'>"
        "<svg class='plot' aria-labelledby='x' style='width:0;height:0'></svg>"
        "<script>console.error('no'); undefinedName()</script></body></html>",
        encoding="utf-8",
    )
    seen = browser.look(page, 390)
    assert seen.overflow > 1000
    assert (seen.figures[0]["width"], seen.figures[0]["marks"]) == (0, 0)
    assert "console.error" in seen.errors
    assert any("Uncaught" in error for error in seen.errors)
    assert any("request failed" in error for error in seen.errors)
    assert any(url.endswith("missing.png") for url in seen.requests)
