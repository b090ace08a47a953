"""What a status is after events: numbers that one can do in the head, and bounds."""

from __future__ import annotations

import pickle
from typing import Any

from seedbed.common.events import Event
from seedbed.server.ledger import Entry
from seedbed.server.monitor.estimate import remaining_seconds
from seedbed.server.monitor.fold import fold, fold_all, from_entry
from seedbed.server.monitor.state import ARRIVALS, CURVE, JOBS, NODES, NOTES, TEXT, Curve, Status


def event(kind: Any, at: float = 100.0, node: str = "", name: str = "", **detail: Any) -> Event:
    return Event(kind=kind, time=at, node=node, name=name, detail=detail)


def step(at: float, node: str, name: str, step: int, loss: float, **more: Any) -> Event:
    return event("step", at, node, name, step=step, steps=10, loss=loss, lr=1e-3, **more)


TWO_AT_WORK = [
    event("stage", 100, name="experts", total=2),
    event("node", 100, "ada", state="joined", tasks=["sums"], devices=["cpu"]),
    event("node", 101, "bob", state="joined", tasks=["poems"], devices=["A100", "A100"]),
    event("job", 102, "ada", "expert:sums", state="running", steps=10),
    event("job", 102, "bob", "expert:poems", state="running", steps=10),
    step(104, "ada", "expert:sums", 2, 3.0, tokens=200, seconds=2.0),
    step(106, "ada", "expert:sums", 4, 2.0, tokens=400, seconds=4.0),
    step(107, "bob", "expert:poems", 1, 5.0, tokens=30, seconds=3.0),
]


def test_a_federation_at_work_is_seen_with_its_stage_nodes_and_jobs() -> None:
    status = fold_all(Status(), TWO_AT_WORK)
    assert (status.state, status.began, status.time) == ("running", 100, 107)
    assert (status.stage.name, status.stage.done, status.stage.total) == ("experts", 0, 2)
    assert status.nodes["bob"].devices == ("A100", "A100")
    assert status.nodes["bob"].seen == 107
    assert status.nodes["ada"].job == "expert:sums"
    job = status.jobs["expert:sums"]
    assert (job.node, job.state, job.step, job.steps, job.attempts, job.stage) == (
        *("ada", "running", 4, 10, 1),
        "experts",
    )
    assert job.curve.points == ((2, 3.0), (4, 2.0))
    assert job.pace == 1.0
    assert job.tokens_per_second == 100.0


def test_the_time_left_is_that_of_the_busiest_node() -> None:
    status = fold_all(Status(), TWO_AT_WORK)
    # ada: 6 steps of 1 s; bob: 9 steps of 3 s.
    assert remaining_seconds(status) == 27
    assert remaining_seconds(status, now=117) == 17
    assert remaining_seconds(status, now=1000) == 13.5, "nobody has said that anything was done"
    status = fold(status, event("job", 108, "ada", "expert:primes", state="open", steps=100))
    # ada has 6 more steps and then 100 of the other job, at her own pace.
    assert remaining_seconds(status) == 106


def test_the_time_left_is_unknown_before_there_is_a_pace() -> None:
    assert remaining_seconds(Status()) is None
    assert remaining_seconds(fold_all(Status(), TWO_AT_WORK[:5])) is None


def test_a_stage_without_trainings_goes_on_as_it_has_gone() -> None:
    events = [event("stage", 10, name="evaluate", total=5), event("advance", 12), event("advance", 14)]
    assert remaining_seconds(fold_all(Status(), events[:1])) is None
    assert remaining_seconds(fold_all(Status(), events)) == 6
    assert remaining_seconds(fold(fold_all(Status(), events), event("finished"))) is None


def test_an_accepted_job_is_done_arrives_once_and_frees_its_node() -> None:
    status = fold_all(Status(), TWO_AT_WORK)
    arrival = event("accepted", 110, "ada", "expert:sums", digest="ab", seconds=12.0, bytes=500, norm=2.0, cosine=-0.5)
    status = fold_all(status, [arrival, event("advance", 110, name="expert:sums"), arrival])
    job = status.jobs["expert:sums"]
    assert (job.state, job.step, job.seconds, job.digest) == ("done", 10, 12.0, "ab")
    assert job.tokens_per_second == 100.0
    assert job.pace == 1.0, "the pace is that of training, not of the whole job"
    assert (status.nodes["ada"].job, status.nodes["ada"].done) == ("", 1)
    (seen,) = status.arrivals
    assert (seen.time, seen.node, seen.digest, seen.size, seen.norm, seen.cosine) == (110, "ada", "ab", 500, 2.0, -0.5)
    assert status.arrived == 1
    assert status.stage.done == 1


def test_what_is_measured_later_is_added_to_the_arrival() -> None:
    status = fold(Status(), event("accepted", 110, "ada", "expert:sums", digest="ab"))
    status = fold(status, event("accepted", 111, "ada", "expert:sums", digest="ab", norm=3.0))
    assert [(one.norm, one.time) for one in status.arrivals] == [(3.0, 110)]


def test_a_step_that_comes_after_the_result_changes_nothing() -> None:
    status = fold_all(Status(), [*TWO_AT_WORK, event("accepted", 110, "ada", "expert:sums", digest="ab")])
    late = fold(status, step(109, "ada", "expert:sums", 5, 1.5))
    assert late.jobs == status.jobs
    assert late.nodes["ada"].job == ""


def test_a_job_that_failed_once_is_asked_again_and_counts_its_attempts() -> None:
    events = [
        event("job", 1, "ada", "expert:sums", state="running", steps=10),
        event("job", 2, "ada", "expert:sums", state="failed", reason="out of memory"),
        event("job", 3, "bob", "expert:sums", state="running"),
    ]
    failed = fold_all(Status(), events[:2])
    assert (failed.jobs["expert:sums"].state, failed.nodes) == ("open", failed.nodes)
    assert failed.jobs["expert:sums"].reason == "out of memory"
    again = fold_all(Status(), [*events[:2], event("node", 2, "bob"), events[2]])
    assert (again.jobs["expert:sums"].node, again.jobs["expert:sums"].attempts) == ("bob", 2)
    assert (again.nodes["ada"].job, again.nodes["bob"].job) == ("", "expert:sums")


def test_a_quarantined_result_keeps_its_reason_and_may_be_mended() -> None:
    status = fold(Status(), event("quarantined", 5, "ada", "expert:sums", reason="holds NaN"))
    assert (status.jobs["expert:sums"].state, status.jobs["expert:sums"].reason) == ("quarantined", "holds NaN")
    status = fold(status, event("accepted", 9, "ada", "expert:sums", digest="ab"))
    assert (status.jobs["expert:sums"].state, status.jobs["expert:sums"].reason) == ("done", "")


def test_a_node_that_is_gone_comes_back_with_its_next_step() -> None:
    status = fold(fold_all(Status(), TWO_AT_WORK), event("node", 110, "ada", state="gone", reason="no heartbeat"))
    assert (status.nodes["ada"].state, status.nodes["ada"].job, status.nodes["ada"].tasks) == ("gone", "", ("sums",))
    status = fold(status, step(111, "ada", "expert:sums", 5, 1.0))
    assert (status.nodes["ada"].state, status.nodes["ada"].job) == ("here", "expert:sums")


def test_contributions_are_withdrawn_and_bytes_are_added_up() -> None:
    events = [
        event("contributed", 1, "eve", "her sums", digest="cd", task="sums"),
        event("transfer", 2, "eve", "submitted", bytes=1000),
        event("transfer", 3, "eve", "fetched", bytes=10),
        event("transfer", 4, "eve", "fetched", bytes=5),
        event("withdrawn", 5, "eve", digest="cd"),
    ]
    status = fold_all(Status(), events)
    assert (status.received, status.sent) == (1000, 15)
    one = status.contributions["cd"]
    assert (one.participant, one.name, one.task, one.withdrawn) == ("eve", "her sums", "sums", True)
    assert not status.nodes, "who contributes is no node"


def test_a_failed_federation_says_why_and_runs_again_when_it_is_resumed() -> None:
    status = fold(fold_all(Status(), TWO_AT_WORK), event("failed", 200, reason="no quorum"))
    assert (status.state, status.reason, status.nodes["ada"].job) == ("failed", "no quorum", "")
    status = fold(status, event("stage", 300, name="experts", total=1))
    assert (status.state, status.reason) == ("running", "")


def test_an_unknown_kind_and_nonsense_in_the_detail_are_survived() -> None:
    unknown = Event.model_construct(kind="telepathy", time=1.0, node="ada", name="x", detail={})
    assert fold(Status(), unknown).unknown == 1
    nonsense: list[Any] = [None, "many", [1], {}, True, -3, 1e300, float("nan")]
    status = Status()
    for kind in (
        "stage",
        "advance",
        "note",
        "node",
        "job",
        "step",
        "accepted",
        "quarantined",
        "transfer",
        "contributed",
    ):
        for odd in nonsense:
            keys = (
                "step",
                "steps",
                "loss",
                "tokens",
                "seconds",
                "bytes",
                "total",
                "attempt",
                "tasks",
                "digest",
                "state",
            )
            status = fold(status, Event(kind=kind, time=1.0, node="ada", name="x", detail=dict.fromkeys(keys, odd)))
    assert status.received == status.sent == 0


def test_texts_of_participants_are_cut_and_cannot_steer_a_terminal() -> None:
    status = fold(Status(), event("quarantined", 1, "a\x1b[2Jb", "job\n", reason="x" * 10_000))
    (job,) = status.jobs.values()
    assert (job.name, job.node) == ("job", "a [2Jb")
    assert len(job.reason) == TEXT


def test_a_curve_stays_bounded_and_keeps_its_ends() -> None:
    curve = Curve()
    for number in range(1, 10_001):
        curve = curve.add(number, 10_000.0 - number)
        assert len(curve.kept) <= CURVE
        assert curve.last == 10_000.0 - number
    assert curve.points[0] == (1, 9999.0)
    assert curve.points[-1] == (10_000, 0.0)
    gaps = [later - earlier for (earlier, _), (later, _) in zip(curve.kept, curve.kept[1:], strict=False)]
    assert len(curve.points) > CURVE // 2
    assert set(gaps) == {curve.every}


def test_a_training_that_goes_on_from_its_checkpoint_keeps_what_lies_before() -> None:
    curve = Curve()
    for number in (1, 2, 3, 4, 3):
        curve = curve.add(number, float(number))
    assert [place for place, _ in curve.points] == [1, 2, 3]


def test_a_hundred_nodes_and_a_hundred_thousand_events_stay_bounded() -> None:
    status, sizes = Status(), []
    for number in range(100_000):
        node, name = f"node-{number % 100}", f"expert:{number % 700}"
        status = fold(status, step(1e9 + number, node, name, number // 700 + 1, 0.25, seconds=number / 700))
        if number in (89_999, 99_999):
            sizes.append(len(pickle.dumps(status)))
    assert len(status.nodes) == 100
    assert len(status.jobs) == 700
    assert all(len(job.curve.points) <= CURVE + 1 for job in status.jobs.values())
    assert max(sizes) < 1_500_000, "a bounded status makes every event cost the same"


def test_what_is_too_much_is_left_out_and_counted() -> None:
    status = Status()
    for number in range(JOBS + 10):
        status = fold(status, event("accepted", number, f"node-{number}", f"job-{number}", digest=str(number)))
        status = fold(status, event("note", number, text=str(number)))
    assert (len(status.jobs), status.dropped, status.arrived) == (JOBS, 10, JOBS + 10)
    assert (status.count("done"), status.count("running")) == (JOBS + 10, 0)
    assert len(status.arrivals) == ARRIVALS
    assert status.arrivals[-1].digest == str(JOBS + 9)
    assert len(status.nodes) == NODES
    assert len(status.notes) == NOTES
    assert "node-0" not in status.nodes
    assert f"node-{JOBS + 9}" in status.nodes


def test_the_ledger_alone_tells_of_a_simulated_run() -> None:
    entries = [
        Entry(event="start", name="small", time=1.0),
        Entry(event="hello", name="ada, bob", time=2.0),
        Entry(event="quarantined", node="eve", name="hello", reason="another base model", time=2.0),
        Entry(
            event="accepted", name="expert:sums", node="ada", digest="ab", seconds=5.0, detail={"loss": 0.5}, time=7.0
        ),
        Entry(event="evaluated", name="average on sums", time=8.0),
        Entry(event="finished", time=9.0),
    ]
    status = fold_all(Status(), [event for entry in entries for event in from_entry(entry)])
    assert (status.name, status.state, status.arrived) == ("small", "finished", 1)
    assert {name: node.state for name, node in status.nodes.items()} == {"ada": "here", "bob": "here", "eve": "refused"}
    assert (status.stage.name, status.stage.done) == ("evaluate", 1)
    assert status.jobs["expert:sums"].curve.last == 0.5


def test_an_expert_that_is_shut_out_after_it_was_accepted_stays_out() -> None:
    accepted = event("accepted", 10, "ada", "expert:sums", digest="ab")
    events = [accepted, event("quarantined", 20, "ada", "expert:sums", reason="its cosine is -1"), accepted]
    status = fold_all(Status(), events)
    assert (status.jobs["expert:sums"].state, status.arrived) == ("quarantined", 1)
