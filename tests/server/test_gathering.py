"""A federation whose participants come late, vanish and come back: real stages, scripted nodes, a clock of the test's own."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import Does, Node, ScriptedMessenger
from village import BASE, OTHER, SHAPES, Village, adapter, config, done, open_run, put

from seedbed.common.errors import QuorumError
from seedbed.common.events import Event
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.common.registry import Contribution
from seedbed.common.storage import DirectoryStore, read_adapter, read_manifest, write_adapter
from seedbed.server.combination import Combination
from seedbed.server.conductor import settled
from seedbed.server.contributions import FILE
from seedbed.server.federation import Federation
from seedbed.server.ledger import Entry
from seedbed.server.observer import Silent
from seedbed.server.rundir import RunDirectory
from seedbed.server.workforce import Failure

TASKS = ("a", "b")
FOREVER = float("inf")


class Listener(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.events: list[Event] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def tell(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


def hello(name: str, *tasks: str, **change: Any) -> Hello:
    values = {"node": name, "version": version("seedbed"), "base": BASE, "tasks": tasks, "devices": ("cpu",), **change}
    return Hello.model_validate(values)


def open_federation(tmp_path: Path, **stages: Any) -> RunDirectory:
    settings = config(
        tasks={"experts": list(TASKS)},
        combine={"candidates": ["base", "seed", "experts", "average"]},
        stages={"deadline": 100, "silence": 1000, **stages},
    )
    return open_run(tmp_path / "run", settings, resume=True)


def trains(run: RunDirectory) -> Does:
    village = Village(run.root / "store")
    return lambda job, _: village._train(job)


def conduct(
    run: RunDirectory, messenger: ScriptedMessenger, listener: Listener | None = None
) -> dict[str, Combination]:
    federation = Federation(run, messenger, BASE, SHAPES, listener or Listener())
    return {candidate.name: candidate for candidate in federation.conduct(diagnose=False)}


def delta(run: RunDirectory, candidate: Combination) -> float:
    assert candidate.digest is not None
    value, _ = read_adapter(run.store.open(candidate.digest))
    return float(value["layer"].delta()[0, 0])


def test_who_is_there_from_the_start_trains_everything(tmp_path: Path) -> None:
    run = open_federation(tmp_path)
    work = trains(run)
    messenger = ScriptedMessenger({1: Node(hello("one", "a"), work), 2: Node(hello("two", "b"), work)})
    found = conduct(run, messenger)
    assert delta(run, found["average"]) == pytest.approx(3 + 3 + 1), "2 seed steps, 3 steps, a name of one letter each"
    assert messenger.nodes[1].asked == ["seed:a:round-1", "expert:a"]


def test_whoever_comes_late_is_greeted_and_takes_part(tmp_path: Path) -> None:
    run = open_federation(tmp_path)
    work, listener = trains(run), Listener()
    late = Node(hello("two", "b"), work, there=((40, FOREVER),))
    messenger = ScriptedMessenger({1: Node(hello("one", "a"), work), 2: late})
    found = conduct(run, messenger, listener)
    assert set(found) == {"base", "seed", "expert:a", "expert:b", "average"}
    assert late.asked == ["seed:b:round-1", "expert:b"]
    assert messenger.asked("seed:b:round-1") == [(40, 2)]
    assert "waiting for participants that bring: b" in listener.notes


def test_whoever_takes_long_to_say_who_it_is_takes_part_and_joins_once(tmp_path: Path) -> None:
    run = open_federation(tmp_path)
    work, listener = trains(run), Listener()
    slow = Node(hello("two", "b"), work, greets=40)
    messenger = ScriptedMessenger({1: Node(hello("one", "a"), work), 2: slow})
    assert "expert:b" in conduct(run, messenger, listener)
    assert [when for when, node in messenger.asked("hello") if node == 2] == [0, 30]
    assert messenger.asked("seed:b:round-1") == [(40, 2)]
    joined = [event for event in listener.of("node") if event.node == "two" and event.detail["state"] == "joined"]
    assert len(joined) == 1, "though it answers both greetings"


def test_a_seed_goes_on_without_the_one_that_comes_only_for_its_expert(tmp_path: Path) -> None:
    run = open_federation(tmp_path, quorum=0.5)
    work = trains(run)
    late = Node(hello("two", "b"), work, there=((120, FOREVER),))
    found = conduct(run, ScriptedMessenger({1: Node(hello("one", "a"), work), 2: late}))
    assert late.asked == ["expert:b"]
    assert len(read_manifest(run.store.open(str(found["seed"].digest))).parents) == 1
    assert {"expert:a", "expert:b"} <= set(found)


def test_a_job_of_a_vanished_participant_is_asked_again_when_it_is_back(tmp_path: Path) -> None:
    run = open_federation(tmp_path)
    work, listener = trains(run), Listener()
    lost = Node(hello("two", "b"), work, there=((0, 3), (30, FOREVER)), takes=5)
    messenger = ScriptedMessenger({1: Node(hello("one", "a"), work), 2: lost})
    found = conduct(run, messenger, listener)
    assert [when for when, _ in messenger.asked("seed:b:round-1")] == [0, 30]
    assert "expert:b" in found
    assert not list(run.ledger.of("quarantined"))
    states = [event.detail["state"] for event in listener.of("node") if event.node == "two"]
    assert states == ["joined", "gone", "joined"]


def test_flowers_word_that_a_node_is_gone_is_no_failure_of_the_participant(tmp_path: Path) -> None:
    run = open_federation(tmp_path, attempts=1)
    work = trains(run)
    shaky: Does = lambda job, time: Failure(2, "is gone", vanished=True) if time < 4 else work(job, time)  # noqa: E731
    found = conduct(run, ScriptedMessenger({1: Node(hello("one", "a"), work), 2: Node(hello("two", "b"), shaky)}))
    assert "expert:b" in found


def test_a_participant_that_fails_has_as_many_attempts_as_configured(tmp_path: Path) -> None:
    run = open_federation(tmp_path, attempts=3, quorum=0.5)
    work = trains(run)
    out_of_memory: Does = lambda job, _: JobResult(  # noqa: E731
        node="two", name=job.name, recipe=job.recipe, error="out of memory"
    )
    broken = Node(hello("two", "b"), out_of_memory)
    found = conduct(run, ScriptedMessenger({1: Node(hello("one", "a"), work), 2: broken}))
    assert broken.asked == ["seed:b:round-1"] * 3, "and it has left the federation before the experts"
    (entry,) = run.ledger.of("quarantined")
    assert (entry.node, entry.name, entry.reason) == ("two", "seed:b:round-1", "out of memory")
    assert set(found) == {"base", "seed", "expert:a", "average"}


def test_a_refused_update_is_an_attempt_and_the_spare_delivers(tmp_path: Path) -> None:
    run = open_federation(tmp_path, attempts=1)
    work = trains(run)
    liar: Does = lambda job, _: done(job, "f" * 64)  # noqa: E731
    nodes = {1: Node(hello("one", "a"), work), 2: Node(hello("liar", "b"), liar), 3: Node(hello("spare", "b"), work)}
    messenger = ScriptedMessenger(nodes)
    found = conduct(run, messenger)
    assert "expert:b" in found
    assert [node for _, node in messenger.asked("seed:b:round-1")] == [2, 3]


def test_of_two_with_one_task_one_is_asked_and_the_silent_one_is_relieved(tmp_path: Path) -> None:
    run = open_federation(tmp_path, patience=0.2)
    work = trains(run)
    silent: Does = lambda *_: None  # noqa: E731
    nodes = {1: Node(hello("one", "a"), work), 2: Node(hello("mute", "b"), silent), 3: Node(hello("spare", "b"), work)}
    messenger = ScriptedMessenger(nodes)
    assert "expert:b" in conduct(run, messenger)
    assert messenger.asked("seed:b:round-1") == [(0, 2), (20, 3)]


def test_a_second_answer_never_replaces_the_first(tmp_path: Path) -> None:
    run = open_federation(tmp_path, patience=0.01)
    work = trains(run)
    other: Does = lambda job, _: done(job, put(run.root / "store", job, adapter(99.0)))  # noqa: E731
    nodes = {
        1: Node(hello("one", "a"), work),
        2: Node(hello("first", "b"), work, takes=10),
        3: Node(hello("second", "b"), other, takes=12),
    }
    found = conduct(run, ScriptedMessenger(nodes))
    assert delta(run, found["expert:b"]) == pytest.approx(7)
    assert len([entry for entry in run.ledger.of("accepted") if entry.name == "expert:b"]) == 1


def test_silence_until_the_deadline_is_told_and_counts_against_the_quorum(tmp_path: Path) -> None:
    run = open_federation(tmp_path)
    silent: Does = lambda *_: None  # noqa: E731
    messenger = ScriptedMessenger({1: Node(hello("one", "a"), trains(run)), 2: Node(hello("mute", "b"), silent)})
    with pytest.raises(QuorumError, match=r"1 of 2 results and needs 2: mute \(seed:b:round-1\): did not answer"):
        conduct(run, messenger)


def test_when_nobody_comes_the_first_stage_ends_at_its_deadline_naming_whom_it_waited_for(tmp_path: Path) -> None:
    run, listener = open_federation(tmp_path), Listener()
    messenger = ScriptedMessenger({})
    with pytest.raises(QuorumError, match="no participant brings this task"):
        conduct(run, messenger, listener)
    assert messenger.clock == 100
    assert listener.notes[0] == "waiting for participants that bring: a, b"


def test_who_does_not_match_is_refused_once_and_asked_for_nothing(tmp_path: Path) -> None:
    run, listener = open_federation(tmp_path, quorum=0.5), Listener()
    work = trains(run)
    stranger = Node(hello("stranger", "b", base=OTHER), work)
    conduct(run, ScriptedMessenger({1: Node(hello("one", "a"), work), 2: stranger}), listener)
    assert stranger.asked == []
    refused = [entry for entry in run.ledger.of("quarantined") if entry.name == "hello"]
    assert [entry.node for entry in refused] == ["stranger"]
    assert "expected tiny" in refused[0].reason


def test_a_stage_that_was_over_is_not_opened_again_after_a_crash(tmp_path: Path) -> None:
    run = open_federation(tmp_path, quorum=0.5)
    work = trains(run)
    first = conduct(run, ScriptedMessenger({1: Node(hello("one", "a"), work)}))
    run.close()
    again = open_federation(tmp_path, quorum=0.5)
    both = ScriptedMessenger({1: Node(hello("one", "a"), work), 2: Node(hello("two", "b"), work)})
    assert conduct(again, both) == first, "a seed that is made stays as it is: experts have been trained from it"
    assert both.log == []


# -- contributions ------------------------------------------------------------------------------------------------------


def contribute(run: RunDirectory, task: str, b: float, name: str = "", **fields: Any) -> str:
    """Hand in dW = b · ones; the registry would write the line."""
    place = run.root.parent / "collaborator" / (name or task)
    write_adapter(place, adapter(b), kind="external", base=BASE, **fields)
    digest = DirectoryStore(run.root / "store").put(place)
    note(run, Contribution(digest=digest, task=task, name=name or task, participant="carol", time=b))
    return digest


def note(run: RunDirectory, one: Contribution) -> None:
    with (run.root / FILE).open("a") as file:
        file.write(one.model_dump_json() + "\n")


def test_a_contributed_expert_takes_the_place_of_a_participant_that_is_not_there_and_ends_the_wait(
    tmp_path: Path,
) -> None:
    run = open_federation(tmp_path, quorum=0.5)
    work = trains(run)
    messenger = ScriptedMessenger({1: Node(hello("one", "a"), work)})
    original = messenger.pause

    def pause() -> None:
        original()
        if messenger.clock == 130:
            contribute(run, "b", 1.0)

    messenger.pause = pause  # type: ignore[method-assign]
    found = conduct(run, messenger)
    assert messenger.clock == 130, "the seed's deadline, and then no longer than until it came"
    assert delta(run, found["expert:b"]) == 1
    assert delta(run, found["average"]) == pytest.approx((7 + 1) / 2)
    accepted = next(entry for entry in run.ledger.of("accepted") if entry.name == "contributed:b")
    assert accepted.node == "carol"


def test_what_a_participant_has_delivered_comes_before_what_is_contributed(tmp_path: Path) -> None:
    run = open_federation(tmp_path)
    work = trains(run)
    messenger = ScriptedMessenger({1: Node(hello("one", "a"), work), 2: Node(hello("two", "b"), work)})
    run.ledger.append(Entry(event="hello"))
    first = conduct(run, messenger)
    contribute(run, "b", 1.0)
    run.close()
    again = open_federation(tmp_path)
    assert conduct(again, ScriptedMessenger({}))["average"] == first["average"]


def test_an_expert_for_a_further_task_joins_the_merges_and_can_be_withdrawn(tmp_path: Path) -> None:
    run = open_federation(tmp_path)
    work = trains(run)
    messenger = ScriptedMessenger({1: Node(hello("one", "a"), work), 2: Node(hello("two", "b"), work)})
    before = conduct(run, messenger)["average"]
    run.ledger.append(Entry(event="finished"))
    digest = contribute(run, "poetry", 1.0)
    run.close()

    again = open_federation(tmp_path)
    found = conduct(again, ScriptedMessenger({}))
    assert delta(again, found["average"]) == pytest.approx((7 + 7 + 1) / 3)
    assert read_manifest(again.adapters / "average").digest == found["average"].digest, (
        "the published one is the new one"
    )
    note(again, Contribution(digest=digest, task="poetry", name="poetry", participant="carol", time=1, withdrawn=True))
    again.close()

    last = open_federation(tmp_path)
    assert conduct(last, ScriptedMessenger({}))["average"] == before


def test_a_place_that_a_contribution_filled_while_it_was_waited_for_is_empty_again_when_that_is_withdrawn(
    tmp_path: Path,
) -> None:
    """A quorum of all would stop a run that still can wait; who withdraws has a right to a result without it."""
    settings = config(
        tasks={"experts": list(TASKS)},
        seed={"mode": "none"},
        combine={"candidates": ["base", "experts", "average"]},
        stages={"deadline": 100, "silence": 1000, "quorum": 1.0},
    )
    run = open_run(tmp_path / "run", settings)
    work = trains(run)
    messenger = ScriptedMessenger({1: Node(hello("one", "a"), work)})
    original, handed_in = messenger.pause, []

    def pause() -> None:
        original()
        if messenger.clock == 30:
            handed_in.append(contribute(run, "b", 1.0))

    messenger.pause = pause  # type: ignore[method-assign]
    federation = Federation(run, messenger, BASE, SHAPES, Listener())
    both = {candidate.name: candidate for candidate in federation.conduct(diagnose=False)}["average"]
    (digest,) = handed_in
    assert federation.stages.counted == [f"{digest} b b"], "it came after the beginning, and counts"
    run.ledger.append(Entry(event="finished", detail={"contributed": federation.stages.counted}))
    note(run, Contribution(digest=digest, task="b", name="b", participant="carol", time=1, withdrawn=True))
    run.close()

    again = open_run(tmp_path / "run", settings, resume=True)
    assert not settled(again)
    listener = Listener()
    found = conduct(again, ScriptedMessenger({}), listener)
    assert found["average"].digest != both.digest
    assert digest not in read_manifest(again.adapters / "average").parents
    assert "stage 'experts' is combined again from 1 of 2 results" in listener.notes


def test_a_contribution_of_another_rank_is_averaged(tmp_path: Path) -> None:
    from seedbed.common.adapter import Adapter, LoraFactors

    run = open_federation(tmp_path)
    work = trains(run)
    place = tmp_path / "wide"
    wide = Adapter({"layer": LoraFactors(torch.ones(4, 2), torch.ones(3, 4), 0.25)})
    write_adapter(place, wide, kind="external", base=BASE)
    digest = DirectoryStore(run.root / "store").put(place)
    note(run, Contribution(digest=digest, task="poetry", name="wide", participant="carol", time=1))
    messenger = ScriptedMessenger({1: Node(hello("one", "a"), work), 2: Node(hello("two", "b"), work)})
    found = conduct(run, messenger)
    assert delta(run, found["average"]) == pytest.approx((7 + 7 + 1) / 3)


@pytest.mark.parametrize(
    ("value", "fields", "reason"),
    [
        (adapter(1.0, rows=4), {}, r"expected shape [3, 2], got [4, 2]"),
        (adapter(1.0, module="mlp"), {}, "module layer: expected shape [3, 2], got none"),
        (adapter(1e9), {}, "norm"),
        (adapter(1.0), {"base": OTHER}, "another base model"),
        (adapter(1.0), {"kind": "seed"}, "kind 'seed'"),
        (adapter(1.0).map(lambda module: module.to(dtype=torch.float64)), {}, "expected float32 or less, got float64"),
    ],
)
def test_a_contribution_that_does_not_fit_is_quarantined_with_a_reason(
    value: Any, fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    run = open_federation(tmp_path)
    work = trains(run)
    place = tmp_path / "odd"
    write_adapter(place, value, **{"kind": "external", "base": BASE, **fields})
    digest = DirectoryStore(run.root / "store").put(place)
    note(run, Contribution(digest=digest, task="poetry", name="odd", participant="carol", time=1))
    messenger = ScriptedMessenger({1: Node(hello("one", "a"), work), 2: Node(hello("two", "b"), work)})
    found = conduct(run, messenger)
    assert delta(run, found["average"]) == pytest.approx(7)
    (entry,) = run.ledger.of("quarantined")
    assert (entry.node, entry.name) == ("carol", "contributed:odd")
    assert reason in entry.reason


# -- the cohort ---------------------------------------------------------------------------------------------------------


def test_an_expert_whose_update_is_far_larger_than_the_others_is_shut_out_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    run = open_federation(tmp_path, max_norm_ratio=10, quorum=0.5)
    work, listener = trains(run), Listener()

    def wild(job: Job, time: int) -> JobResult:
        return done(job, put(run.root / "store", job, adapter(1000.0))) if job.kind == "expert" else work(job, time)  # type: ignore[return-value]

    found = conduct(
        run, ScriptedMessenger({1: Node(hello("one", "a"), work), 2: Node(hello("two", "b"), wild)}), listener
    )
    assert "expert:b" not in found
    assert delta(run, found["average"]) == pytest.approx(7)
    (entry,) = run.ledger.of("quarantined")
    assert (entry.node, entry.name) == ("node", "expert:b")
    assert "times the others' median" in entry.reason
