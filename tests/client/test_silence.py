"""What counts as a training that hangs: told by its own steps, on a clock that the test moves."""

from __future__ import annotations

import pytest

from seedbed.client.silence import Silence
from seedbed.common.errors import TrainingError


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("seedbed.client.silence.time.monotonic", lambda: self.now)

    def pass_by(self, silence: Silence, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            silence.check()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def steps(clock: Clock, silence: Silence, seconds: int) -> None:
    """An hour of loading, then three steps of so many seconds."""
    clock.pass_by(silence, 3600)
    silence.heard({"event": "start"})
    for step in (1, 2, 3):
        clock.pass_by(silence, seconds)
        silence.heard({"event": "step", "step": step})


@pytest.mark.parametrize(("step", "least", "allowed"), [(10, 5, 200), (1, 300, 300)])
def test_a_training_may_be_silent_for_twenty_steps_and_always_for_the_least(
    clock: Clock, step: int, least: int, allowed: int
) -> None:
    silence = Silence(least)
    steps(clock, silence, step)
    clock.pass_by(silence, allowed)
    with pytest.raises(TrainingError, match=f"no step for {allowed + 1} s, where one took at most {step} s before"):
        clock.pass_by(silence, 1)


def test_before_the_first_step_nothing_is_too_long(clock: Clock) -> None:
    silence = Silence(least=5)
    silence.heard({"event": "start"})
    clock.pass_by(silence, 10_000)


def test_a_client_that_stood_still_itself_does_not_blame_its_training(clock: Clock) -> None:
    silence = Silence(least=5)
    steps(clock, silence, 1)
    clock.now += 10_000
    silence.check()
