"""What a report tells beside accuracy: general text, routing tuning and routers, by numbers one can do in the head."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from seedbed.common.drift import TextDrift
from seedbed.common.routing import RoutingDiagnostics
from seedbed.common.routing.diagnostics import LayerDiagnostics
from seedbed.server.evaluation import beside
from seedbed.server.evaluation.compare import Measured, build_results, contenders
from seedbed.server.evaluation.report import write_report
from seedbed.server.evaluation.results import Results, load
from seedbed.server.evaluation.statistics import standard_error
from seedbed.server.evaluation.suite import TaskResult


def score(task: str, right: int, held_in: bool = True) -> TaskResult:
    outcomes = (1.0,) * right + (0.0,) * (50 - right)
    return TaskResult(
        task=task,
        metric="acc",
        value=right / 50,
        n=50,
        stderr=standard_error(outcomes),
        held_in=held_in,
        chance=0.25,
        outcomes=outcomes,
    )


def drift(kl: float, norm: float | None = 1.0) -> TextDrift:
    """Two texts of ten tokens, one of which moves twice as much as `kl`, the other not at all."""
    return TextDrift(kl=kl, perplexity=3.5, update_norm=norm, tokens=(10, 10), kls=(2 * kl, 0.0), losses=(1.0, 1.0))


def layer(load: tuple[float, ...], tokens: int = 10, collapsed: bool = False) -> LayerDiagnostics:
    return LayerDiagnostics(
        tokens=tokens,
        entropy=0.3,
        relative_entropy=0.5,
        max_probability=max(load),
        load=load,
        likeliest=load,
        collapsed=collapsed,
    )


def diagnostics(kind: str, load: tuple[float, ...], tokens: int = 10) -> RoutingDiagnostics:
    one = layer(load, tokens)
    return RoutingDiagnostics.model_validate(
        {"kind": kind, "names": ("sum", "mood"), "overall": one, "layers": {"q": one, "v": one}}
    )


def sample() -> Results:
    def whole(name: str, right: int, **more: object) -> Measured:
        scores = [score("sum", right), score("mood", right), score("odd", right, held_in=False)]
        return Measured(name, scores, **more)  # type: ignore[arg-type]

    learned = {"sum": diagnostics("learned", (0.8, 0.2), 30), "mood": diagnostics("learned", (0.4, 0.6), 10)}
    rows = [
        whole("base", 10, drift=drift(0.0, None)),
        Measured("expert:sum", [score("sum", 40)], drift=drift(0.2, 2.0)),
        Measured("expert:mood", [score("mood", 30)], drift=drift(0.4, 4.0)),
        Measured("tuned:sum", [score("sum", 39)], drift=drift(0.02, 0.2)),
        Measured("tuned:mood", [score("mood", 31)], drift=drift(0.04, 0.4)),
        whole("average", 20, drift=drift(0.1, 1.0)),
        whole("learned", 25, drift=drift(0.15, None), routing=learned, mixture=True),
        whole("molora", 45, routing={"sum": diagnostics("molora", (0.5, 0.5))}, mixture=True),
    ]
    return build_results("test", rows)[0]


def cells(grid: beside.Grid | None) -> dict[str, list[str]]:
    assert grid is not None
    return {row[0]: list(row[1:]) for row in grid.rows}


def test_drift_stands_with_its_error_and_experts_are_averaged() -> None:
    rows = cells(beside.general(sample()))
    assert rows["base model"] == ["0", "3.50", ""]
    assert rows["seeded average"] == ["0.100 ± 0.100", "3.50", "1.000"]
    assert rows["experts alone, mean"] == ["0.300", "3.50", "3.000"]
    assert rows["tuned experts alone, mean"] == ["0.030", "3.50", "0.300"]
    assert rows["learned router"][-1] == "", "a mixture has no single update"


def test_routing_tuning_is_told_task_by_task_with_the_difference_over_all() -> None:
    results = sample()
    grid = beside.tuning(results)
    assert cells(grid)["sum"] == ["80.0 %", "78.0 %", "0.200", "0.020", "2.000", "0.200"]
    assert cells(grid)["mood"] == ["60.0 %", "62.0 %", "0.400", "0.040", "4.000", "0.400"]
    assert cells(grid)["mean"] == ["70.0 %", "70.0 %", "0.300", "0.030", "3.000", "0.300"]
    effect = results.effect("tuned:own", "experts:own", "held_in")
    assert effect is not None
    assert effect.difference == pytest.approx(0)
    assert grid is not None
    assert "mean over tasks: 0.0 points" in grid.note


def test_a_router_is_summed_up_over_tasks_by_their_tokens() -> None:
    use = beside.used(sample())["learned"]
    assert use.overall.load == pytest.approx((0.7, 0.3)), "30 tokens at 0.8 and 10 at 0.4"
    assert use.overall.tokens == 2 * 40
    assert use.tasks["mood"].load == (0.4, 0.6)
    rows = cells(beside.routers(sample()))
    assert rows["learned router"] == ["50.0 %", "75.0 %", "sum 70.0 %", "mood 30.0 %", "0 of 2"]


def test_experts_trained_with_their_router_are_a_reference_and_no_contender() -> None:
    results = sample()
    assert results.candidates["molora"].kind == "joint"
    assert contenders(results.candidates) == ["average", "learned"]
    assert "learned router" in results.answer


def test_the_best_expert_for_each_task_is_chosen_by_the_answers() -> None:
    def everywhere(name: str, first: int, second: int) -> Measured:
        return Measured(name, [score("sum", first), score("odd", second, held_in=False)])

    rows = [everywhere("base", 5, 5), everywhere("expert:sum", 40, 10), everywhere("expert:mood", 20, 30)]
    best = build_results("test", rows)[0].candidates["experts:best"]
    assert (best.kind, best.tasks["sum"].value, best.tasks["odd"].value) == ("reference", 0.8, 0.6)


def test_the_report_shows_all_of_it_and_results_are_read_back(tmp_path: Path) -> None:
    results = sample()
    write_report(results, {}, tmp_path)
    assert load(tmp_path) == results
    page = (tmp_path / "report.html").read_text()
    for section in ("general", "routers"):
        assert f'<section id="{section}">' in page
    assert re.search(r'<desc id="loads-learned-desc">', page)
    assert re.search(r'<desc id="depth-learned-desc">Over all modules: sum 70\.0 %, mood 30\.0 %', page)
    assert re.search(r'<desc id="drift-desc">[^<]*seeded average 0\.100 and 40\.0', page)
    text = (tmp_path / "report.md").read_text()
    assert "What routing tuning changed" in text
    assert "What the routers did" in text


def test_without_general_text_and_routers_the_sections_are_left_out(tmp_path: Path) -> None:
    rows = [Measured(name, [score("sum", right)]) for name, right in (("base", 10), ("average", 20))]
    results = build_results("test", rows)[0]
    assert (beside.general(results), beside.tuning(results), beside.routers(results)) == (None, None, None)
    write_report(results, {}, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'id="general"' not in page
    assert 'id="routers"' not in page
