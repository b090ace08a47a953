"""The report of an ablation: that it finds what was put in, says so first, and can be recomputed, read back and drawn again."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import laboratory
import pytest
from rich.console import Console

from seedbed.common.errors import DataError
from seedbed.common.manifest import BaseIdentity
from seedbed.server.ablation import tables
from seedbed.server.ablation.report import recompute, render, summary, write_ablation
from seedbed.server.ablation.results import ABLATION, ABLATION_OUTCOMES, AblationResults, load, load_outcomes
from seedbed.server.ablation.values import Cell, CellOutcome, Plan, Row, SeedOutcome
from seedbed.server.evaluation.compare import Circumstances
from seedbed.server.evaluation.results import LineageNode

COMMAND = "seedbed ablate made-up --seeds 6 --out 'a dir'"
NAMES = [ABLATION, ABLATION_OUTCOMES, "report.html", "report.md"]


def made() -> list[CellOutcome]:
    """Six seeds, of little luck, so that what is there is seen."""
    return laboratory.outcomes(range(6), spread=0.005)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ablation")
    about = Circumstances(
        base=BaseIdentity(name="tiny", digest="e" * 64),
        config={"training": {"steps": 50}},
        versions={"torch": "2.13.0"},
        lineage=[LineageNode(digest="a" * 64, name="seed", kind="seed")],
        notes=["a note of the run"],
    )
    write_ablation(laboratory.PLAN, made(), directory, COMMAND, about)
    return directory


@pytest.fixture(scope="module")
def results(written: Path) -> AblationResults:
    return load(written)


@pytest.fixture(scope="module")
def html(written: Path) -> str:
    return (written / "report.html").read_text(encoding="utf-8")


def text_of(html: str) -> str:
    return re.sub(r"<[^>]+>", " ", html).replace("&nbsp;", " ").replace("&#x27;", "'")


def test_the_estimates_are_what_was_put_in(results: AblationResults) -> None:
    for effect in results.effects:
        if effect.measure in ("held_out", "held_in"):
            assert effect.difference == pytest.approx(laboratory.TRUE[effect.cell], abs=3.5 * effect.stderr + 1e-9)
    clear = {effect.cell for effect in results.of_measure("held_out") if effect.is_clear}
    assert "seed.mode=none" in clear
    assert not clear & {"candidate=uniform", "routing_tuning.kl_weight=0", "options.retention=0.8"}


def test_the_answer_names_the_part_that_earned_most_with_its_interval(results: AblationResults) -> None:
    first, _, rest = results.answer.partition(". ")
    effect = results.effect("seed.mode=none", "held_out")
    assert effect is not None
    low, high = (f"{100 * end:.1f}" for end in (effect.low, effect.high))
    assert first == (
        f"The seed expert earned most: without it, mean accuracy on 3 held-out tasks is "
        f"{100 * effect.difference:.1f} points lower (95 % interval {low} to {high}), after Holm's correction for "
        "10 comparisons"
    )
    assert re.search(r"May be chance, as the interval includes zero: .*with uniform for the routing \(", rest)
    assert re.search(r"The kl loss earned most: without it, divergence from the base model .* higher", rest)


def test_the_answer_stands_first_in_page_and_markdown(results: AblationResults, written: Path, html: str) -> None:
    first = results.answer.partition(". ")[0]
    assert text_of(html).index(first) < text_of(html).index("Effects on held-out accuracy")
    assert (written / "report.md").read_text(encoding="utf-8").splitlines()[2].startswith(f"**{first}")


def test_all_files_are_written_and_drawing_again_changes_no_byte(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == NAMES
    before = [(written / name).read_bytes() for name in NAMES]
    render(written)
    assert [(written / name).read_bytes() for name in NAMES] == before


def test_all_effects_can_be_recomputed_from_the_outcomes_of_examples(written: Path, results: AblationResults) -> None:
    effects, missing = recompute(written)
    assert (tuple(effects), tuple(missing)) == (results.effects, results.missing)
    kept = load_outcomes(written)
    for name, cell in results.cells.items():
        for task, mean in cell.tasks.items():
            runs = [kept[name][seed].outcomes[task] for seed in cell.digests]
            assert sum(map(sum, runs)) / sum(map(len, runs)) == pytest.approx(mean.value)


def test_outcomes_are_compact(written: Path) -> None:
    document = json.loads((written / ABLATION_OUTCOMES).read_text(encoding="utf-8"))
    digits = document["cells"]["full"]["0"]["tasks"]["odd"]
    assert re.fullmatch(r"[01]{160}", digits)


def test_the_order_of_rows_and_cells_changes_no_number(results: AblationResults, tmp_path: Path) -> None:
    about = Circumstances()
    plan = laboratory.PLAN.model_copy(update={"rows": laboratory.PLAN.rows[::-1]})
    moved = write_ablation(plan, made()[::-1], tmp_path, COMMAND, about)
    assert {(one.cell, one.measure): one for one in moved.effects} == {
        (one.cell, one.measure): one for one in results.effects
    }
    assert moved.cells == results.cells
    assert moved.answer.partition(". ")[0] == results.answer.partition(". ")[0]


def test_every_figure_has_a_text_alternative_and_its_numbers_in_a_table(html: str) -> None:
    figures = re.findall(r'<svg class="plot".*?aria-labelledby="([^"]+)"', html)
    curves = [f"curve-3-{measure}" for measure in ("held_out", "held_in", "retention", "kl", "perplexity")]
    forests = [f"forest-{measure}" for measure in ("held_out", "held_in", "retention", "kl", "perplexity")]
    keys = [names.split()[0].removesuffix("-title") for names in figures]
    assert keys[:10] == forests + curves
    assert keys[10:13] == ["scatter-retention-held_out", "scatter-kl-retention", "cells-tasks"]
    assert [key for key in keys[13:] if key.startswith("loads")] == ["loads-cell-0", "loads-cell-6"], (
        "cells with routers"
    )
    for names in figures:
        for name in names.split():
            assert html.count(f'id="{name}"') == 1
    assert re.search(r'<desc id="forest-held_out-desc">seed expert removed \+\d', html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for section in ("effects", "curves", "crosses", "cells", "tasks", "routers", "effort", "lineage", "making"):
        part = html[html.index(f'<section id="{section}">') :].partition("</section>")[0]
        assert "<table>" in part


def test_curves_are_drawn_of_rows_with_numbers_and_cross_tables_of_rows_of_two_parts(results: AblationResults) -> None:
    ((row, cells),) = tables.numbered(results)
    assert (row.label, [cell.number for cell in cells]) == ("svd_retention", [0.6, 0.8, 1.0])
    grid = tables.curve(results, row, cells)
    assert grid is not None
    assert [line[0] for line in grid.rows] == ["0.6", "0.8", "1.0"]
    full = results.effect("options.retention=0.6", "held_out")
    same = results.effect("options.retention=0.8", "held_out")
    assert full is not None
    assert same is not None
    assert same.value == pytest.approx(full.full), "the point that is the full method lies on its line"
    crosses = {row.label: tables.cross(results, row, "held_out") for row in results.plan.rows}
    (found,) = [grid for grid in crosses.values() if grid is not None]
    assert [list(found.headers), [line[0] for line in found.rows]] == [
        ["merge rule and experts", "experts", "tuned"],
        ["ties", "dare"],
    ]
    effect = results.effect("method=dare,of=experts", "held_out")
    assert effect is not None
    assert found.rows[1][1] == f"{100 * effect.value:.1f} % (+{100 * effect.difference:.1f})"


def test_command_base_versions_lineage_changes_and_cost_are_there(html: str, written: Path) -> None:
    text = text_of(html)
    for shown in (COMMAND, "e" * 64, "2.13.0", "a note of the run", "routing_tuning.kl_weight=0", "training.steps=50"):
        assert shown in text
    assert "seed aaaaaaaaaa" in " ".join(text.split())
    # Six seeds of 4 trainings, 12.5 seconds, 20,000 tokens and a million bytes.
    row = "| full method | 24 | 75 | 120,000 | 6,000,000 |"
    assert row in (written / "report.md").read_text(encoding="utf-8")


def test_the_page_asks_the_network_for_nothing(html: str) -> None:
    addresses = re.findall(r'\b(?:src|href|xlink:href|srcset|action)="([^"]*)"', html)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert not re.search(r"@import|url\((?!#)|<script", html)


def test_the_summary_fits_80_columns_and_says_what_is_clear(results: AblationResults) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary(results))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert " ".join(text.split()).startswith(" ".join(results.answer.split()))
    lines = {line.split("  ")[0]: line.rstrip() for line in text.split("held-in accuracy:")[0].splitlines()}
    assert lines["seed expert removed"].endswith("*")
    assert lines["svd retention: 0.8"].endswith("=")
    assert not lines["routing: uniform"].endswith("*")


def run(value: float, task: str = "z", held_in: bool = False) -> SeedOutcome:
    right = [1.0] * round(20 * value) + [0.0] * round(20 * (1 - value))
    return SeedOutcome(digest=f"{value}", scores=(laboratory.score(task, right, held_in),))


def small(*outcomes: CellOutcome) -> tuple[Plan, list[CellOutcome]]:
    rows = tuple(Row(label=one.cell.row, part=("p",), action="remove") for one in outcomes)
    full = CellOutcome(cell=Cell(name="full", row="", candidate="c"), seeds={0: run(0.5), 1: run(0.5)})
    return Plan(name="small", config="embedded", full="c", rows=rows), [full, *outcomes]


def outcome(name: str, seeds: dict[int, SeedOutcome], **failures: str) -> CellOutcome:
    reasons = {int(seed.removeprefix("seed")): reason for seed, reason in failures.items()}
    return CellOutcome(cell=Cell(name=name, row=f"part {name}", candidate="c"), seeds=seeds, failures=reasons)


def test_a_part_whose_interval_includes_zero_has_earned_nothing(tmp_path: Path) -> None:
    mixed = SeedOutcome(digest="m", scores=(laboratory.score("z", [1.0, 0.0] * 10, False),))
    results = write_ablation(*small(outcome("x", {0: mixed, 1: mixed})), tmp_path, "")
    (effect,) = results.effects
    assert effect.high == pytest.approx(-effect.low, abs=0.01)
    assert results.answer == (
        "No part is shown to have earned or cost anything in accuracy on 1 held-out task: the difference, 0.0 points apart "
        f"(95 % interval {tables.plain('held_out', -effect.high)} to {tables.plain('held_out', -effect.low)}, which includes "
        "zero) without the part x, does not stand after Holm's correction for one comparison."
    )


def test_what_makes_no_difference_at_all_is_said_to_make_none(tmp_path: Path) -> None:
    other = run(0.5).model_copy(update={"digest": "another adapter that answers alike"})
    results = write_ablation(*small(outcome("x", {0: other, 1: other})), tmp_path, "")
    assert results.answer == "In accuracy on 1 held-out task nothing differs from the full method."


def test_a_part_that_costs_is_said_to_cost(tmp_path: Path) -> None:
    results = write_ablation(*small(outcome("x", {0: run(1.0), 1: run(1.0)})), tmp_path, "")
    assert results.answer.startswith(
        "No part is shown to have earned anything in accuracy on 1 held-out task. The full method is worse"
    )
    assert "without the part x (by 50.0 points, 95 % interval" in results.answer


def test_failures_are_reported_with_their_reasons_and_stop_nothing(tmp_path: Path) -> None:
    cells = [outcome("x", {0: run(0.0)}, seed1="out of memory"), outcome("y", {}, seed0="diverged", seed1="diverged")]
    results = write_ablation(*small(*cells), tmp_path, "")
    assert {effect.cell: effect.seeds for effect in results.effects} == {"x": (0,)}
    assert results.answer.startswith("The part x earned its place: without it, accuracy on 1 held-out task is 50.0")
    notes = " ".join(results.notes)
    assert "Not every run succeeded (x, y)" in notes
    assert "There is one random seed" in notes
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in (
        "| part x removed | seed 1 | out of memory |",
        "| part y removed | seed 0 | diverged |",
        "| part y removed | held-out accuracy | no random seed has an outcome of it and of the full method |",
    ):
        assert line in text
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary(results))
    told = " ".join(console.export_text().split())
    for sentence in ("part x removed, random seed 1: out of memory", "part y removed, random seed 0: diverged"):
        assert f"Failed: {sentence}" in told


def test_a_cell_without_a_digest_is_called_base_model_only_where_it_is(tmp_path: Path) -> None:
    nothing = run(0.5).model_copy(update={"digest": None})
    made = [outcome(name, {0: nothing, 1: nothing}) for name in ("base", "oracle")]
    named = [one.model_copy(update={"cell": one.cell.model_copy(update={"candidate": one.cell.name})}) for one in made]
    results = write_ablation(*small(*named), tmp_path, "")
    told = {row[1]: row[2] for row in tables.cells(results).rows}
    assert told["base"] == "seed 0: base model, seed 1: base model"
    assert told["oracle"] == "seed 0: from the scores of several, seed 1: from the scores of several"


def test_nothing_at_all_is_no_trouble(tmp_path: Path) -> None:
    plan, outcomes = small(outcome("x", {}, seed0="failed"))
    empty = [one.model_copy(update={"seeds": {}}) for one in outcomes]
    results = write_ablation(plan, empty, tmp_path, "")
    assert results.answer.startswith("Nothing could be compared with the full method")
    assert load(tmp_path) == results


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    plan, outcomes = small(outcome("<img src=x>", {0: run(0.0), 1: run(0.1)}, seed3="<script>alert(1)</script>"))
    write_ablation(plan.model_copy(update={"name": "<b>", "about": "<i>"}), outcomes, tmp_path, "<u>")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(img|script|b|i|u)[ >]", page)


def test_damaged_or_foreign_files_are_refused_with_their_names(tmp_path: Path, written: Path) -> None:
    with pytest.raises(DataError, match=r"ablation\.json cannot be read"):
        load(tmp_path)
    (tmp_path / ABLATION).write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="not valid JSON"):
        load(tmp_path)
    (tmp_path / ABLATION).write_text('{"schema": 2}', encoding="utf-8")
    with pytest.raises(DataError, match="schema 2, expected 1"):
        load(tmp_path)
    (tmp_path / ABLATION).write_text('{"schema": 1, "name": "x"}', encoding="utf-8")
    with pytest.raises(DataError, match="answer"):
        load(tmp_path)
    (tmp_path / ABLATION_OUTCOMES).write_text('{"schema": 1, "cells": {"full": {"0": {}}}}', encoding="utf-8")
    with pytest.raises(DataError, match="not a file of outcomes"):
        load_outcomes(tmp_path)


def test_every_field_is_documented() -> None:
    import seedbed.server.ablation.results as module

    schema = (Path(module.__file__).parent / "SCHEMA.md").read_text(encoding="utf-8")
    from seedbed.server.ablation.effects import MeanOf, Missing, PartEffect
    from seedbed.server.ablation.results import CellCost, CellResult, TaskMean

    for record in (AblationResults, CellResult, TaskMean, CellCost, PartEffect, MeanOf, Missing, Plan, Row, Cell):
        for name, field in record.model_fields.items():
            assert f"`{field.alias or name}`" in schema, f"{record.__name__}.{name}"
