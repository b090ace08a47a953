"""The report: what it says, that it stands alone, and that it survives odd names."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from seedbed.common.errors import DataError
from seedbed.common.manifest import BaseIdentity
from seedbed.server.evaluation import plots, tables
from seedbed.server.evaluation.compare import Circumstances, Measured, build_results
from seedbed.server.evaluation.report import render, summary_table, write_report
from seedbed.server.evaluation.results import Cost, Effect, LineageNode, Outcomes, Results
from seedbed.server.evaluation.statistics import standard_error
from seedbed.server.evaluation.suite import TaskResult
from seedbed.server.evaluation.tables import candidate_costs, costs, interval, lineage

SEED, ONE, TWO, AVERAGE = (letter * 64 for letter in "abcd")
VOID = {"meta", "br", "use", "path", "link", "input", "img", "hr"}


def score(task: str, right: int, held_in: bool) -> TaskResult:
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


def measured(name: str, rights: tuple[int, ...], digest: str | None = None) -> Measured:
    tasks = (("sum", True), ("mood", True), ("odd", False))
    scores = [score(task, right, held_in) for (task, held_in), right in zip(tasks, rights, strict=False)]
    return Measured(name, scores, digest, rank=None if digest is None else 8)


def sample(note: str = "node-2 was left out") -> tuple[Results, Outcomes]:
    rows = [
        measured("base", (10, 12, 20)),
        measured("seed", (20, 20, 22), SEED),
        measured("expert:sum", (45, 12, 20), ONE),
        Measured("expert:mood", [score("mood", 40, True)], TWO, 8),
        measured("average", (35, 33, 31), AVERAGE),
    ]
    nodes = [
        LineageNode(digest=SEED, name="seed", kind="seed"),
        LineageNode(digest=ONE, name="expert:sum", kind="expert", parents=(SEED,)),
        LineageNode(digest=TWO, name="expert:mood", kind="expert", parents=(SEED,)),
        LineageNode(digest=AVERAGE, name="average", kind="merge", parents=(ONE, TWO)),
    ]
    jobs = [
        Cost(name="seed", seconds=10, steps=20, tokens=1000),
        Cost(name="expert:sum", seconds=30, steps=100, tokens=5000),
        Cost(name="expert:mood", seconds=34, steps=100, tokens=5000),
        Cost(name="unseeded:sum", seconds=99, steps=120, tokens=6000),
    ]
    about = Circumstances(
        command="seedbed simulate test --out 'a dir'",
        base=BaseIdentity(name="tiny", digest="e" * 64),
        config={"tasks": {"experts": ["sum", "mood"]}, "run": {"random_seed": 0}},
        versions={"torch": "2.13.0"},
        lineage=nodes,
        costs=jobs,
        diagnostics={"factor_gap_seeded": 0.0123, "other": 0.5},
        notes=(note,),
    )
    return build_results("test", rows, about)


class Page(HTMLParser):
    """Collects what matters and fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    write_report(*sample(), directory)
    return directory


@pytest.fixture(scope="module")
def html(written: Path) -> str:
    return (written / "report.html").read_text(encoding="utf-8")


def test_all_four_files_are_written_and_rendering_again_changes_no_byte(written: Path) -> None:
    names = ["outcomes.json", "report.html", "report.md", "results.json"]
    assert sorted(path.name for path in written.iterdir()) == names
    before = [(written / name).read_bytes() for name in names]
    assert render(written) == sample()[0]
    assert [(written / name).read_bytes() for name in names] == before


def test_the_report_opens_with_the_answer(written: Path, html: str) -> None:
    opening = "On the 1 held-out task, which no expert was trained on, the best combined model is the seeded average"
    text = "".join(Page(html).text).replace("\xa0", " ")
    assert text.index(opening) < text.index("Candidates")
    assert (written / "report.md").read_text(encoding="utf-8").splitlines()[2].startswith(f"**{opening}")


def test_the_page_asks_the_network_for_nothing(html: str) -> None:
    addresses = [
        value
        for _, attributes in Page(html).attributes
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "data", "action", "srcset")
    ]
    assert addresses
    assert all(value is not None and value.startswith("#") for value in addresses)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "<script" not in html


def test_the_page_fits_a_phone_and_both_themes(html: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "prefers-color-scheme: dark" in html
    for table in re.finditer("<table>", html):
        assert html[: table.start()].rfind('<div class="scroll" role="region" tabindex="0"') > 0
    assert html.count("<table>") == html.count('class="scroll"')


def test_every_plot_has_a_title_and_a_description_and_follows_the_theme(html: str) -> None:
    page = Page(html)
    plots = [attributes for tag, attributes in page.attributes if tag == "svg"]
    assert len(plots) == 4, "accuracies, two forests, heat map"
    ids = [attributes["id"] for _, attributes in page.attributes if attributes.get("id")]
    for attributes in plots:
        assert attributes["role"] == "img"
        for name in (attributes["aria-labelledby"] or "").split():
            assert name in ids
        assert "width" not in attributes
    assert not re.search(r"#0(10203|40506|70809|a0b0c)", html), "every colour that stands for a theme's is replaced"


def test_no_id_is_used_twice(html: str) -> None:
    ids = [attributes["id"] for _, attributes in Page(html).attributes if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_numbers_stand_with_their_errors_and_held_in_stands_apart(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    assert "| seeded average | **62.0 % ± 6.9** | +22.0 (" in text
    held_out, held_in = text.index("Held-out tasks: zero-shot"), text.index("Held-in tasks: some expert")
    assert held_out < text.index("| odd | 50 | 25.0 % |") < held_in < text.index("| sum | 50 | 25.0 % |")
    assert "| mood | 80.0 % ± 5.7 | 24.0 % ± 6.1 | 66.0 % ± 6.8 |" in text, (
        "an expert that was measured on some tasks only has its row"
    )


def test_settings_versions_command_and_notes_are_there(written: Path, html: str) -> None:
    for text in (html, (written / "report.md").read_text(encoding="utf-8")):
        assert "node-2 was left out" in text
        assert "2.13.0" in text
        assert "e" * 64 in text
    assert "seedbed simulate test --out &#x27;a dir&#x27;" in html
    assert '<th scope="row">tasks.experts</th><td>sum, mood</td>' in html
    assert "off by 1.2&nbsp;% of the exact mean" in html
    assert "other: 0.5" in html


def test_names_cannot_break_out_of_the_page_or_of_a_markdown_table(tmp_path: Path) -> None:
    results, outcomes = sample(note="<script>alert(1)</script> | a `tick`\n# title")
    evil = results.model_copy(update={"name": '<img src="x">'})
    write_report(evil, outcomes, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "# title" not in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()


def test_effort_is_summed_by_stage_and_by_lineage() -> None:
    results, _ = sample()
    by_stage, by_candidate = costs(results), candidate_costs(results)
    assert by_stage is not None
    assert by_candidate is not None
    assert [row[:3] for row in by_stage.rows] == [
        ["seed", "1", "20"],
        ["expert", "2", "200"],
        ["unseeded", "1", "120"],
        ["all", "4", "340"],
    ]
    assert list(by_candidate.rows) == [
        ["seed alone", "1", "20", "", "1,000", "10"],
        ["seeded average", "3", "220", "", "11,000", "74"],
    ]


def test_lineage_runs_from_the_seed_by_the_experts_to_the_average() -> None:
    (seed,) = lineage(sample()[0])
    assert [node.name for node in seed.nodes] == ["seed"]
    (experts,) = seed.children
    assert [node.name for node in experts.nodes] == ["expert:sum", "expert:mood"]
    (merges,) = experts.children
    assert [node.name for node in merges.nodes] == ["average"]
    assert merges.children == []


@pytest.mark.parametrize(
    "names", [["base"], ["base", "average"], ["expert:sum"], ["average", "expert:sum"], ["seed", "joint", "mine"]]
)
def test_absent_candidates_are_no_trouble(tmp_path: Path, names: list[str]) -> None:
    results, outcomes = build_results("few", [measured(name, (10, 20, 30)) for name in names])
    write_report(results, outcomes, tmp_path)
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_one_example_of_one_task_is_no_trouble(tmp_path: Path) -> None:
    single = score("odd", 50, False).model_copy(update={"outcomes": (1.0,), "n": 1, "value": 1.0, "stderr": 0.5})
    write_report(*build_results("one", [Measured("base", [single]), Measured("average", [single])]), tmp_path)
    assert "level with the base model" in (tmp_path / "report.md").read_text(encoding="utf-8")


def shown(results: Results, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary_table(results))
    return console.export_text()


def test_the_terminal_gets_one_row_for_each_candidate_but_the_experts() -> None:
    lines = {re.split(r"  +", line)[0]: line.split() for line in shown(sample()[0]).splitlines()}
    assert lines["candidate"] == ["candidate", "held-out", "vs", "base,", "95", "%", "held-in", "rank", "steps"]
    assert lines["base model"] == ["base", "model", "40.0", "±", "7.0", "22.0", "±", "4.2"]
    assert lines["seed alone"][-2:] == ["8", "20"], "rank, and steps of the seed"
    assert lines["seeded average"][:5] == ["seeded", "average", "*62.0", "±", "6.9"], "the best has a star"
    assert lines["seeded average"][-2:] == ["8", "220"], "steps of the seed and of both experts"
    assert lines["guessing"] == ["guessing", "25.0", "25.0"]
    assert "expert sum" not in lines


def test_the_terminal_shows_the_interval_of_the_difference_from_the_base() -> None:
    results, _ = sample()
    effect = results.effect("average", "base", "held_out")
    assert effect is not None
    assert interval(effect) in shown(results)
    inside = [Measured(name, [score("sum", right, True)]) for name, right in (("base", 10), ("average", 35))]
    text = shown(build_results("inside", inside)[0])
    assert re.search(r"seeded average +\*70\.0 ± 6\.5 +\+\d+\.\d to \+\d+\.\d", text)
    assert re.search(r"held-in +vs base, 95 %", text), "without held-out tasks it is that of the held-in ones"


def test_the_summary_of_every_kind_of_candidate_fits_80_columns() -> None:
    names = ["base", "seed", "expert:sum", "expert:mood", "tuned:sum", "tuned:mood", "average"]
    names += ["compressed", "factor_mean", "unseeded", "joint", "phatgoose"]
    rows = [measured(name, (50 - place, 20 + place, 4 * place), f"{place:064d}") for place, name in enumerate(names)]
    nodes = [LineageNode(digest=f"{place:064d}", name=name, kind="expert") for place, name in enumerate(names)]
    jobs = [Cost(name=name, steps=12_345) for name in names]
    text = shown(build_results("all", rows, Circumstances(lineage=nodes, costs=jobs))[0])
    assert len(text.splitlines()) == 3 + 13, (
        "title, heads, rule; eight models, four references, guessing; no line broken"
    )
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_the_first_plot_tells_where_guessing_is(written: Path, html: str) -> None:
    found = re.search(r'<desc id="accuracies-desc">(.*?)</desc>', html)
    assert found is not None
    assert found.group(1).count("guessing 25.0 %") == 2, "of held-out and of held-in tasks"
    unknown = [
        Measured(name, [score("odd", right, False).model_copy(update={"chance": None})])
        for name, right in (("base", 10), ("average", 35))
    ]
    assert "guessing" not in plots.accuracies(build_results("unknown", unknown)[0])


def test_a_directory_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results\.json"):
        render(tmp_path)


@pytest.mark.parametrize(
    ("low", "p_holm", "verdict"), [(0.01, 0.02, "clear"), (0.01, 0.2, "clear alone"), (-0.01, 0.4, "not clear")]
)
def test_a_difference_is_clear_only_after_the_adjustment_for_all_comparisons(
    low: float, p_holm: float, verdict: str
) -> None:
    effect = Effect(
        candidate="a",
        reference="b",
        scope="held_out",
        difference=0.1,
        low=low,
        high=0.2,
        p=p_holm / 4,
        p_holm=p_holm,
        n=10,
        tasks=1,
    )
    assert tables._verdict(effect) == verdict
