"""Who gets which job next, told by hand: no clock, no network."""

from __future__ import annotations

from seedbed.common.config import LoraSettings, TrainingSettings
from seedbed.common.jobs import Job
from seedbed.common.manifest import BaseIdentity
from seedbed.server.assignments import Assignment, Assignments

BASE = BaseIdentity(name="tiny", digest="0" * 64)


def job(task: str) -> Job:
    return Job(
        kind="expert", name=f"expert:{task}", base=BASE, tasks=(task,), lora=LoraSettings(), training=TrainingSettings()
    )


def stage(*tasks: str, attempts: int = 2, silence: float = 1000, patience: float = 1000) -> Assignments:
    return Assignments([job(task) for task in tasks], attempts=attempts, silence=silence, patience=patience)


def given(assignments: list[Assignment]) -> list[tuple[int, str]]:
    return [(one.node, one.job.name) for one in assignments]


def test_whoever_brings_a_task_gets_its_job_once() -> None:
    desk = stage("a", "b")
    desk.welcome(1, "one", ["a"])
    desk.welcome(2, "two", ["b"])
    assert given(desk.due(0)) == [(1, "expert:a"), (2, "expert:b")]
    assert desk.due(1) == []


def test_whoever_comes_late_gets_what_is_open() -> None:
    desk = stage("a", "b")
    desk.welcome(1, "one", ["a"])
    assert given(desk.due(0)) == [(1, "expert:a")]
    assert desk.missing() == ["b"]
    desk.welcome(2, "two", ["b"])
    assert desk.missing() == []
    assert given(desk.due(5)) == [(2, "expert:b")]


def test_a_participant_has_one_job_at_a_time() -> None:
    desk = stage("a", "b")
    desk.welcome(1, "one", ["a", "b"])
    assert given(desk.due(0)) == [(1, "expert:a")]
    desk.settle("expert:a")
    assert given(desk.due(1)) == [(1, "expert:b")]
    desk.settle("expert:b")
    assert desk.over


def test_of_two_that_bring_a_task_one_is_asked() -> None:
    desk = stage("a")
    desk.welcome(1, "one", ["a"])
    desk.welcome(2, "two", ["a"])
    assert given(desk.due(0)) == [(1, "expert:a")]
    assert desk.due(10) == []


def test_what_a_vanished_participant_had_is_given_to_its_spare_or_to_itself_when_it_comes_back() -> None:
    desk = stage("a", "b")
    desk.welcome(1, "one", ["a"])
    desk.welcome(2, "two", ["a"])
    desk.welcome(3, "three", ["b"])
    desk.due(0)
    assert [job.name for job in desk.depart(1)] == ["expert:a"]
    assert given(desk.due(1)) == [(2, "expert:a")]
    desk.depart(3)
    assert desk.due(2) == []
    desk.welcome(3, "three", ["b"])
    assert given(desk.due(3)) == [(3, "expert:b")]


def test_vanishing_is_no_attempt() -> None:
    desk = stage("a", attempts=1)
    desk.welcome(1, "one", ["a"])
    for now in range(5):
        assert [one.attempt for one in desk.due(now)] == [1]
        desk.vanished(1, "expert:a")
    assert not desk.over


def test_a_failure_is_an_attempt_and_after_the_last_one_the_job_is_given_up() -> None:
    desk = stage("a", attempts=2)
    desk.welcome(1, "one", ["a"])
    assert [one.attempt for one in desk.due(0)] == [1]
    assert not desk.failed(1, "expert:a", "out of memory")
    assert [one.attempt for one in desk.due(1)] == [2]
    assert desk.failed(1, "expert:a", "out of memory")
    assert desk.over
    assert desk.due(2) == []


def test_after_a_failure_the_spare_has_its_turn_and_a_job_is_given_up_when_nobody_may_try() -> None:
    desk = stage("a", attempts=1)
    desk.welcome(1, "one", ["a"])
    desk.welcome(2, "two", ["a"])
    desk.due(0)
    assert not desk.failed(1, "expert:a", "broken")
    assert given(desk.due(1)) == [(2, "expert:a")]
    assert desk.failed(2, "expert:a", "broken, too")


def test_one_that_vanished_without_having_failed_is_waited_for() -> None:
    desk = stage("a", attempts=1)
    desk.welcome(1, "one", ["a"])
    desk.welcome(2, "two", ["a"])
    desk.due(0)
    desk.failed(1, "expert:a", "broken")
    desk.due(1)
    desk.depart(2)
    assert not desk.over
    assert desk.due(2) == []
    desk.welcome(2, "two", ["a"])
    assert given(desk.due(3)) == [(2, "expert:a")]


def test_a_silent_participant_is_asked_again_at_growing_intervals() -> None:
    desk = stage("a", silence=10)
    desk.welcome(1, "one", ["a"])
    asked = [now for now in range(100) if desk.due(now)]
    assert asked == [0, 10, 30, 70]


def test_a_job_that_shows_signs_of_life_is_left_alone() -> None:
    desk = stage("a", silence=10)
    desk.welcome(1, "one", ["a"])
    asked = []
    for now in range(60):
        asked += [now] * len(desk.due(now))
        if now < 40:
            desk.heard("expert:a", now)
    assert asked == [0, 49]


def test_a_job_whose_signs_of_life_are_rarer_than_its_silence_is_soon_left_alone() -> None:
    desk = stage("a", silence=2)
    desk.welcome(1, "one", ["a"])
    asked = []
    for now in range(1000):
        asked += [now] * len(desk.due(now))
        if now % 10 == 0:
            desk.heard("expert:a", now)
    assert asked == [0, 2, 6, 18], "after 2, 4 and 8 seconds of silence; 16 it never is"


def test_after_patience_a_spare_is_asked_beside_the_silent_one_and_the_first_answer_counts() -> None:
    desk = stage("a", patience=20)
    desk.welcome(1, "one", ["a"])
    desk.welcome(2, "two", ["a"])
    assert given(desk.due(0)) == [(1, "expert:a")]
    assert desk.due(19) == []
    assert given(desk.due(20)) == [(2, "expert:a")]
    assert desk.due(21) == []
    desk.settle("expert:a")
    assert desk.over
    assert not desk.failed(1, "expert:a", "too late"), "an answer after the first is ignored"
    assert not desk.wants("expert:a")


def test_a_spare_that_has_work_of_its_own_is_not_disturbed() -> None:
    desk = stage("a", "b", patience=20)
    desk.welcome(1, "one", ["a"])
    desk.welcome(2, "two", ["a", "b"])
    assert given(desk.due(0)) == [(1, "expert:a"), (2, "expert:b")]
    assert desk.due(20) == []
    desk.settle("expert:b")
    assert given(desk.due(21)) == [(2, "expert:a")]


def test_what_remains_at_the_end_says_why() -> None:
    desk = stage("a", "b", "c", "d", attempts=5)
    desk.welcome(1, "one", ["a"])
    desk.welcome(2, "two", ["b"])
    desk.welcome(3, "three", ["c"])
    desk.due(0)
    desk.depart(2)
    desk.failed(3, "expert:c", "out of memory")
    desk.depart(3)
    assert [(left.name, node, reason) for left, node, reason in desk.remaining()] == [
        ("expert:a", 1, "did not answer"),
        ("expert:b", None, "the participant that had it vanished and did not come back"),
        ("expert:c", 3, "out of memory"),
        ("expert:d", None, "no participant brings this task"),
    ]
