"""A real coordinator and real SuperNodes over loopback: whatever is killed, the federation ends with the same adapters."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from federating import Coordinator, accepted, digests, events, participants, processes_of, until


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("undisturbed")
    coordinator = Coordinator(home / "run")
    try:
        with participants(home, coordinator):
            code = coordinator.wait()
    finally:
        coordinator.stop()
    assert code == 0, coordinator.said
    return home / "run"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[..., Coordinator]]:
    started: list[Coordinator] = []

    def start(**request: object) -> Coordinator:
        started.append(Coordinator(tmp_path / "run", **request))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for coordinator in started:
        coordinator.stop()


def nothing_is_left(out: Path) -> bool:
    return until(lambda: not processes_of(out), 60)


def nothing_was_done_twice(out: Path) -> bool:
    return set(Counter(entry["key"] for entry in accepted(out)).values()) == {1}


def test_a_federation_comes_to_its_report_and_leaves_nothing_running(undisturbed: Path) -> None:
    assert {entry.name for entry in (undisturbed / "adapters").iterdir()} == {
        "expert-addition",
        "expert-antonym",
        "average",
    }
    for name in ("results.json", "report.html", "events.jsonl", "logs/coordinator.log"):
        assert (undisturbed / name).stat().st_size > 0, name
    assert nothing_is_left(undisturbed)
    assert len(events(undisturbed, "finished")) == 1
    assert {event.node for event in events(undisturbed, "node")} == {"addition", "antonym"}
    arrivals = [event for event in events(undisturbed, "accepted") if "cosine" in event.detail]
    assert {event.name for event in arrivals} == {"expert:addition", "expert:antonym"}


def test_a_finished_federation_is_summed_up_again_without_participants(undisturbed: Path) -> None:
    before = digests(undisturbed)
    coordinator = Coordinator(undisturbed)
    assert coordinator.wait() == 0
    assert digests(undisturbed) == before


KILLED = {
    "superlink": ("flower-superlink", "--database"),
    "registry": ("seedbed.server.registry", "--listen"),
    "gateway": ("seedbed.server.gateway", "--listen"),
    "serverapp": ("flwr-serverapp",),
}


def test_whatever_process_of_it_is_killed_the_coordinator_brings_it_back_and_the_result_is_the_same(
    undisturbed: Path, running: Callable[..., Coordinator], tmp_path: Path
) -> None:
    coordinator = running()
    out = coordinator.out
    # One after the other in one run: each at the next sign of progress.
    moments: dict[str, Callable[[], bool]] = {
        "registry": lambda: bool(events(out, "job")),
        "gateway": lambda: len(accepted(out, "seed:")) == 2,
        "serverapp": lambda: any(event.name.startswith("expert:") for event in events(out, "job")),
        "superlink": lambda: bool(accepted(out, "expert:")),
    }
    with participants(tmp_path, coordinator):
        for name, reached in moments.items():
            assert until(lambda: reached() or coordinator.process.poll() is not None), name  # noqa: B023
            victims = processes_of(out, *KILLED[name])
            assert victims, f"no {name} to kill: {coordinator.said}"
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):  # gone with its keeper
                    os.kill(victim.pid, signal.SIGKILL)
        assert coordinator.wait() == 0, coordinator.said
    assert digests(out) == digests(undisturbed)
    assert nothing_was_done_twice(out)
    assert nothing_is_left(out)


def test_after_kill_9_of_the_coordinator_nothing_is_left_and_resume_completes_it(
    undisturbed: Path, running: Callable[..., Coordinator], tmp_path: Path
) -> None:
    coordinator = running()
    out = coordinator.out
    with participants(tmp_path, coordinator):
        assert until(lambda: bool(accepted(out, "seed:")))
        coordinator.kill()
        assert nothing_is_left(out), processes_of(out)
        again = running(port=coordinator.port, registry_port=coordinator.registry_port)
        assert again.wait() == 0, again.said
    assert digests(out) == digests(undisturbed)
    assert nothing_was_done_twice(out)


def test_a_run_that_was_submitted_and_not_begun_when_the_coordinator_was_killed_is_not_in_the_way(
    running: Callable[..., Coordinator], undisturbed: Path, tmp_path: Path
) -> None:
    """The SuperLink that is started again starts it, too; only the ServerApp of the new submission works."""
    coordinator = running()
    log = coordinator.out / "logs" / "coordinator.log"
    assert until(lambda: log.exists() and "submitted the run (1)" in log.read_text(), 280), coordinator.said
    coordinator.kill()
    assert nothing_is_left(coordinator.out), processes_of(coordinator.out)
    again = running(port=coordinator.port, registry_port=coordinator.registry_port)
    with participants(tmp_path, again):
        assert again.wait() == 0, again.said
    assert digests(again.out) == digests(undisturbed)
    assert nothing_was_done_twice(again.out)


def test_sigterm_ends_all_with_a_word_and_a_second_coordinator_is_refused(
    running: Callable[..., Coordinator], tmp_path: Path
) -> None:
    coordinator = running()
    assert until(lambda: bool(events(coordinator.out, "stage")), 280), coordinator.said
    second = running()
    assert second.wait(300) == 10
    assert "another coordinator is at work" in second.said
    coordinator.process.send_signal(signal.SIGTERM)
    assert coordinator.wait(120) == 143
    assert "continue with --resume" in coordinator.said
    assert f"seedbed join 127.0.0.1:{coordinator.port} --task FILE" in coordinator.said
    assert "Traceback" not in coordinator.said
    assert nothing_is_left(coordinator.out)


def test_a_federation_without_enough_participants_fails_with_the_stages_own_sentence_and_exit_code(
    running: Callable[..., Coordinator], tmp_path: Path
) -> None:
    coordinator = running(settings=["stages.deadline=5"])
    assert coordinator.wait() == 9, coordinator.said
    assert "stage 'seed' has 0 of 2 results and needs 2" in coordinator.said
    assert "no participant brings this task" in coordinator.said
    assert nothing_is_left(coordinator.out)
