"""Stages of a federation against participants of a few lines: who is let in, and what a resumed run redoes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from village import BASE, OTHER, SHAPES, TASKS, Fault, Village, adapter, config, done, open_run, put

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import QuorumError, ResumeError, StorageError
from seedbed.common.jobs import Hello, Job, JobResult
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import read_adapter, read_manifest, write_adapter
from seedbed.server.combination import Combination
from seedbed.server.federation import Federation
from seedbed.server.observer import Silent
from seedbed.server.rundir import RunDirectory
from seedbed.server.workforce import Failure


def conduct(run: RunDirectory, village: Village) -> dict[str, Combination]:
    federation = Federation(run, village, BASE, SHAPES, Silent())
    return {candidate.name: candidate for candidate in federation.conduct()}


def delta(run: RunDirectory, candidate: Combination) -> float:
    assert candidate.digest is not None
    value, _ = read_adapter(run.store.open(candidate.digest))
    dense = value["layer"].delta()
    assert torch.allclose(dense, dense[0, 0].expand_as(dense))
    return float(dense[0, 0])


def test_every_candidate_is_what_its_name_says(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    found = conduct(run, Village(run.root / "store"))
    assert set(found) == {
        "base",
        "seed",
        *(f"expert:{task}" for task in TASKS),
        "average",
        "compressed",
        "unseeded",
        "joint",
    }
    assert found["base"].digest is None
    assert delta(run, found["seed"]) == 3, "2 steps and the length of the task's name"
    assert delta(run, found["expert:a"]) == 3 + 3 + 1
    assert delta(run, found["average"]) == pytest.approx(7)
    assert delta(run, found["compressed"]) == pytest.approx(7)
    assert delta(run, found["unseeded"]) == pytest.approx(2 + 3 + 1)
    assert delta(run, found["joint"]) == 4 * (2 + 3) + 1
    assert (run.adapters / "expert-a" / "adapter_model.safetensors").exists()


def test_lineage_leads_from_the_average_to_the_seed(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    found = conduct(run, Village(run.root / "store"))
    average = read_manifest(run.adapters / "average")
    assert average.parents == tuple(found[f"expert:{task}"].digest for task in TASKS)
    expert = read_manifest(run.store.open(average.parents[0]))
    assert expert.parents == (found["seed"].digest,)
    seed = read_manifest(run.store.open(expert.parents[0]))
    assert len(seed.parents) == len(TASKS), "the clients' contributions"


def nan(job: Job, store: Path) -> JobResult:
    """NaN bytes in the place of the last numbers of a good file."""
    digest = put(store, job, adapter(1.0))
    tensors = store / "adapters" / digest / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    return done(job, digest)


FAULTS: dict[str, tuple[Fault, str]] = {
    "raises": (lambda job, store: Failure(0, "raised an error: boom"), "boom"),
    "vanishes": (lambda job, store: Failure(0, "did not answer within 1 s"), "did not answer"),
    "reports a failure": (
        lambda job, store: JobResult(node="n", name=job.name, recipe=job.recipe, error="out of memory"),
        "out of memory",
    ),
    "changes tensors after the digest": (nan, "damaged"),
    "has another shape": (
        lambda job, store: done(job, put(store, job, adapter(1.0, rows=4))),
        "expected shape [3, 2], got [4, 2]",
    ),
    "lacks a module": (
        lambda job, store: done(job, put(store, job, adapter(1.0, module="mlp"))),
        "misses module layer",
    ),
    "has another base model": (
        lambda job, store: done(job, put(store, job, adapter(1.0), base=OTHER)),
        "another base model",
    ),
    "has another rank": (
        lambda job, store: done(
            job, put(store, job, Adapter({"layer": LoraFactors(torch.ones(2, 2), torch.ones(3, 2), 1.0)}))
        ),
        "rank",
    ),
    "has another scaling": (
        lambda job, store: done(
            job, put(store, job, Adapter({"layer": LoraFactors(torch.ones(1, 2), torch.ones(3, 1), 4.0)}))
        ),
        "scaling",
    ),
    "is huge": (lambda job, store: done(job, put(store, job, adapter(1e9))), "norm"),
    "forges a digest": (lambda job, store: done(job, "f" * 64), "not in the store"),
    "sends a path as digest": (lambda job, store: done(job, "../../etc/passwd"), "64 hexadecimal digits"),
    "answers with another job's adapter": (
        lambda job, store: done(job, put(store, job, adapter(1.0), recipe="0" * 64)),
        "recipe",
    ),
    "did not start from the seed": (
        lambda job, store: done(job, put(store, job, adapter(1.0), parents=())),
        "parents",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_participant_is_quarantined_with_a_reason_and_the_others_go_on(case: str, tmp_path: Path) -> None:
    fault, reason = FAULTS[case]
    run = open_run(tmp_path / "run")
    found = conduct(run, Village(run.root / "store", {"expert:b": fault}))
    (entry,) = run.ledger.of("quarantined")
    assert entry.name == "expert:b"
    assert entry.node == "node-b"
    assert reason in entry.reason
    assert "expert:b" not in found
    assert delta(run, found["average"]) == pytest.approx(7), "the mean of the other three"


def test_nan_in_an_update_names_the_module_and_enters_nothing(tmp_path: Path) -> None:
    def honest_hashes(job: Job, store: Path) -> JobResult:
        """NaN tensors under hashes that are right: what a participant with its own writer could hand in."""
        import hashlib

        digest = put(store, job, adapter(1.0))
        place = store / "adapters" / digest
        tensors = place / "adapter_model.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
        manifest = read_manifest(place).model_copy(
            update={"tensors_sha256": hashlib.sha256(tensors.read_bytes()).hexdigest()}
        )
        (place / "seedbed.json").write_bytes(manifest.canonical())
        place.rename(store / "adapters" / manifest.digest)
        return done(job, manifest.digest)

    run = open_run(tmp_path / "run")
    found = conduct(run, Village(run.root / "store", {"expert:b": honest_hashes}))
    (entry,) = run.ledger.of("quarantined")
    assert "module layer" in entry.reason
    assert "NaN" in entry.reason
    assert delta(run, found["average"]) == pytest.approx(7)


def test_too_few_results_fail_loudly_with_every_reason(tmp_path: Path) -> None:
    broken: Fault = lambda job, store: Failure(0, f"{job.name} is broken")  # noqa: E731
    run = open_run(tmp_path / "run")
    with pytest.raises(QuorumError, match="2 of 4 results and needs 3") as caught:
        conduct(run, Village(run.root / "store", {"expert:a": broken, "expert:c": broken}))
    assert "expert:a is broken" in caught.value.message
    assert "expert:c is broken" in caught.value.message
    assert not (run.adapters / "average").exists()


def test_a_failed_seed_job_leaves_the_federation_before_the_experts(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    village = Village(run.root / "store", {"seed:d:round-1": lambda job, store: Failure(0, "gone")})
    found = conduct(run, village)
    assert "expert:d" not in village.asked
    assert "unseeded:d" not in village.asked
    assert {name for name in found if name.startswith("expert:")} == {"expert:a", "expert:b", "expert:c"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"base": OTHER}, "expected tiny"), ({"version": "0.0.1"}, "seedbed 0.0.1")],
)
def test_hello_refuses_a_participant_that_does_not_match(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    village = Village(run.root / "store")
    hello = village.hellos[0]
    assert isinstance(hello, Hello)
    village.hellos[0] = hello.model_copy(update=change)
    conduct(run, village)
    refused = [entry for entry in run.ledger.of("quarantined") if entry.name == "hello"]
    assert [entry.node for entry in refused] == ["node-a"]
    assert reason in refused[0].reason
    assert not any(name.endswith(":a") for name in village.asked)


def test_a_finished_run_asks_nobody_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run = open_run(root)
    first = conduct(run, Village(run.root / "store"))
    run.close()
    again = open_run(root, resume=True)
    village = Village(again.root / "store")
    village.hellos = {}
    assert conduct(again, village) == first
    assert village.asked == []


def test_a_resumed_run_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run = open_run(root)
    gone: Fault = lambda job, store: Failure(0, "gone")  # noqa: E731
    with pytest.raises(QuorumError):
        conduct(run, Village(run.root / "store", {"expert:c": gone, "expert:d": gone}))
    run.close()
    again = open_run(root, resume=True)
    village = Village(again.root / "store")
    found = conduct(again, village)
    assert village.asked[:2] == ["expert:c", "expert:d"]
    assert not any(name.startswith("seed:") for name in village.asked)
    assert delta(again, found["average"]) == pytest.approx(7)


def test_rounds_start_from_the_seed_of_the_round_before(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", config(seed={"steps": 2, "rounds": 3}))
    found = conduct(run, Village(run.root / "store"))
    assert delta(run, found["seed"]) == 3 * (2 + 1)


def test_without_a_seed_all_experts_share_their_start(tmp_path: Path) -> None:
    settings = config(seed={"mode": "none"}, combine={"candidates": ["base", "experts", "average"]})
    run = open_run(tmp_path / "run", settings)
    village = Village(run.root / "store")
    found = conduct(run, village)
    assert village.asked == [f"expert:{task}" for task in TASKS]
    assert delta(run, found["average"]) == pytest.approx(4)


def test_a_given_seed_is_taken_into_the_store(tmp_path: Path) -> None:
    write_adapter(tmp_path / "given", adapter(5.0), kind="external", base=BaseIdentity(name="tiny"))
    run = open_run(tmp_path / "run", config(seed={"mode": "given", "adapter": str(tmp_path / "given")}))
    village = Village(run.root / "store")
    found = conduct(run, village)
    assert not any(name.startswith("seed:") for name in village.asked)
    assert delta(run, found["expert:a"]) == 5 + 3 + 1


def test_a_changed_configuration_is_not_resumed(tmp_path: Path) -> None:
    root = tmp_path / "run"
    open_run(root).close()
    with pytest.raises(ResumeError, match=r"training\.steps was 3 and is 4"):
        open_run(root, config(training={"steps": 4}), resume=True)
    with pytest.raises(ResumeError, match="data has changed"):
        RunDirectory.open(root, config(), {"data": "other"}, resume=True)
    open_run(root, resume=True).close()


def test_an_existing_run_is_neither_overwritten_nor_shared(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run = open_run(root)
    with pytest.raises(StorageError, match="already exists"):
        open_run(root)
    with pytest.raises(ResumeError, match="another process"):
        open_run(root, resume=True)
    run.close()


def test_a_directory_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ResumeError, match=r"no config\.yaml"):
        open_run(tmp_path, resume=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_public_seed_is_made_by_the_participant_that_holds_the_sample(tmp_path: Path) -> None:
    sample = tmp_path / "sample.jsonl"
    sample.write_text('{"text": "anything"}\n')
    run = open_run(tmp_path / "run", config(seed={"mode": "public", "data": str(sample), "steps": 2}))
    village = Village(run.root / "store")
    found = conduct(run, village)
    assert village.asked[0] == "seed:public"
    assert delta(run, found["seed"]) == 2 + len("public")
    assert delta(run, found["unseeded"]) == 3 + 1, "no client has spent steps on the seed"
