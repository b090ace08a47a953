"""Routers in a federation: who trains them, how they are combined, what is refused, and what a resumed run redoes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from village import BASE, OTHER, SHAPES, TASKS, Village, adapter, config, done, open_run, put, put_router, router

from seedbed.common.config import FederationConfig
from seedbed.common.errors import ConfigError, QuorumError
from seedbed.common.jobs import Job, JobResult
from seedbed.common.routing import Mixture
from seedbed.common.routing.mixture_file import read_mixture
from seedbed.common.storage import read_manifest
from seedbed.server.candidates import resolve
from seedbed.server.combination import Combination
from seedbed.server.federation import Federation
from seedbed.server.measurement import wearable
from seedbed.server.observer import Silent
from seedbed.server.rundir import RunDirectory
from seedbed.server.workforce import Failure

ROUTING = {"steps": 5, "gate_steps": 7, "rounds": 2}


def routed(*candidates: Any, **values: Any) -> FederationConfig:
    combine = {"candidates": ["base", "experts", *candidates], "routing": {**ROUTING, **values.pop("routing", {})}}
    return config(combine=combine, **values)


def conduct(run: RunDirectory, village: Village) -> dict[str, Combination]:
    federation = Federation(run, village, BASE, SHAPES, Silent())
    return {candidate.name: candidate for candidate in federation.conduct()}


def mixture(run: RunDirectory, found: dict[str, Combination], name: str) -> Mixture:
    digest = found[name].digest
    assert digest is not None
    worn = wearable(run.store, digest)
    assert isinstance(worn, Mixture)
    return worn


def test_a_learned_router_is_the_mean_of_what_every_client_trained_twice(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", routed("learned"))
    village = Village(run.root / "store")
    found = conduct(run, village)
    assert [name for name in village.asked if name.startswith("router:")] == [
        f"router:learned:{task}:round-{index}" for index in (1, 2) for task in TASKS
    ]
    worn = mixture(run, found, "learned")
    assert worn.names == TASKS
    # Each round adds 5 steps and a name of one letter; the second starts from the mean of the first.
    assert torch.equal(worn.router.tensors["layer"]["weight"], torch.full((4, 2), 12.0))


def test_the_routers_parents_are_the_experts_in_their_order(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", routed("learned", "arrow", "uniform", "phatgoose"))
    found = conduct(run, Village(run.root / "store"))
    experts = tuple(found[f"expert:{task}"].digest for task in TASKS)
    for name in ("learned", "arrow", "uniform", "phatgoose"):
        assert read_manifest(run.adapters / name).parents == experts
        published, _ = read_mixture(run.adapters / name)
        assert float(published.experts[2]["layer"].B[0, 0]) == 3 + 3 + 1


def test_every_expert_gets_a_gate_from_its_own_client(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", routed("phatgoose"))
    village = Village(run.root / "store")
    found = conduct(run, village)
    assert [job.experts for job in village.jobs.values() if job.kind == "gate"] == [
        (found[f"expert:{task}"].digest,) for task in TASKS
    ]
    worn = mixture(run, found, "phatgoose")
    assert worn.router.settings.top_k == 2
    assert torch.equal(worn.router.tensors["layer"]["gates"], torch.full((4, 2), 7.0))


def test_a_sequence_router_averages_the_router_that_it_is_made_of(tmp_path: Path) -> None:
    over = {"name": "slow", "router": "sequence", "over": "learned"}
    run = open_run(tmp_path / "run", routed("learned", over))
    village = Village(run.root / "store")
    found = conduct(run, village)
    worn = mixture(run, found, "slow")
    assert (worn.router.settings.kind, worn.router.settings.of) == ("sequence", "learned")
    assert torch.equal(worn.router.tensors["layer"]["weight"], torch.full((4, 2), 12.0))
    recipes = [village.jobs[name].recipe for name in village.asked if name.endswith("a:round-1")]
    assert len(set(recipes)) == len(recipes), "nothing is trained twice"


def test_a_router_over_tuned_experts_has_them_for_parents(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", routed("tuned", {"name": "arrow_tuned", "router": "arrow", "of": "tuned"}))
    village = Village(run.root / "store")
    found = conduct(run, village)
    assert read_manifest(run.adapters / "arrow_tuned").parents == tuple(found[f"tuned:{t}"].digest for t in TASKS)
    assert all(village.jobs[f"tuned:{task}"].tuning is not None for task in TASKS)
    assert all(village.jobs[f"expert:{task}"].tuning is None for task in TASKS)


def test_a_public_router_is_trained_once_by_the_participant_that_holds_the_sample(tmp_path: Path) -> None:
    sample = tmp_path / "sample.jsonl"
    sample.write_text('{"text": "anything"}\n')
    run = open_run(tmp_path / "run", routed("learned", routing={"mode": "public", "data": str(sample)}))
    village = Village(run.root / "store")
    found = conduct(run, village)
    assert [name for name in village.asked if "router" in name] == ["router:learned:public-router:round-1"]
    assert mixture(run, found, "learned").router.tensors["layer"]["bias"][0] == 5 + len("public-router")


def test_molora_brings_its_own_experts(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", routed("molora"))
    found = conduct(run, Village(run.root / "store"))
    worn = mixture(run, found, "molora")
    assert [float(expert["layer"].B[0, 0]) for expert in worn.experts] == [1, 2, 3, 4]
    assert (run.adapters / "molora/experts/3-d/adapter_model.safetensors").exists()


def test_diagnostics_tell_how_much_an_order_matters_and_are_computed_once(tmp_path: Path) -> None:
    run = open_run(
        tmp_path / "run", routed("iterative", {"name": "mean", "method": "iterative", "options": {"combine": "mean"}})
    )
    federation = Federation(run, Village(run.root / "store"), BASE, SHAPES, Silent())
    federation.conduct()
    # All experts are one update times a number, so the largest is the same in every order; a running mean is not.
    assert federation.diagnostics["order_sensitivity_iterative"] == pytest.approx(0, abs=1e-5)
    assert federation.diagnostics["factor_gap_seeded"] == pytest.approx(0, abs=1e-5)
    for kept in (run.root / "evaluations").glob("*.number.json"):
        kept.write_text("0.25")
    federation.conduct()
    assert set(federation.diagnostics.values()) == {0.25}


def test_merges_take_options_groups_and_the_seed(tmp_path: Path) -> None:
    scaled = {"name": "louder", "method": "average", "options": {"task_scale": 2.0}}
    run = open_run(
        tmp_path / "run", routed("seed", "average", scaled, {"name": "u", "method": "svd", "of": "unseeded"})
    )
    found = conduct(run, Village(run.root / "store"))

    def value(name: str) -> float:
        worn = wearable(run.store, str(found[name].digest))
        assert not isinstance(worn, Mixture)
        return float(worn["layer"].delta()[0, 0])

    assert value("seed") == 3
    assert value("average") == pytest.approx(7)
    assert value("louder") == pytest.approx(3 + 2 * (7 - 3))
    assert value("u") == pytest.approx(6)


REFUSED: dict[str, tuple[Callable[[Job, Path], JobResult], str]] = {
    "has another number of experts": (
        lambda job, store: done(job, put_router(store, job, router(1, 3), names=TASKS[:3], parents=job.parents[:3])),
        "parents",
    ),
    "does not fit the layer": (
        lambda job, store: done(job, put_router(store, job, router(1, 4, size=9))),
        r"expected weight [4, 2], got [4, 9]",
    ),
    "is of another kind": (
        lambda job, store: done(job, put_router(store, job, router(1, 4, kind="phatgoose"))),
        "expected learned, got phatgoose",
    ),
    "is huge": (lambda job, store: done(job, put_router(store, job, router(1e9, 4))), "norm"),
    "is an adapter": (lambda job, store: done(job, put(store, job, adapter(1.0), kind="expert")), "router"),
    "has another base model": (lambda job, store: done(job, put_router(store, job, router(1, 4), base=OTHER)), "base"),
    "has the experts in another order": (
        lambda job, store: done(job, put_router(store, job, router(1, 4), parents=job.parents[::-1])),
        "parents",
    ),
    "answers another job": (
        lambda job, store: done(job, put_router(store, job, router(1, 4), recipe="0" * 64)),
        "recipe",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_router_that_does_not_fit_is_quarantined_and_the_others_are_averaged(case: str, tmp_path: Path) -> None:
    fault, reason = REFUSED[case]
    run = open_run(tmp_path / "run", routed("learned", routing={"rounds": 1}))
    found = conduct(run, Village(run.root / "store", {"router:learned:b:round-1": fault}))
    (entry,) = run.ledger.of("quarantined")
    assert (entry.node, entry.name) == ("node-b", "router:learned:b:round-1")
    assert reason in entry.reason
    assert torch.equal(mixture(run, found, "learned").router.tensors["layer"]["bias"], torch.full((4,), 6.0))


def test_an_expert_without_a_gate_fails_the_stage_whatever_the_quorum(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", routed("phatgoose"))
    with pytest.raises(QuorumError, match="'gates' has 3 of 4"):
        conduct(run, Village(run.root / "store", {"gate:c": lambda job, store: Failure(2, "gone")}))


@pytest.mark.parametrize("router", ["arrow", "learned"])
def test_a_router_over_more_experts_than_are_left_is_left_out_and_the_run_goes_on(router: str, tmp_path: Path) -> None:
    wide = {"name": "wide", "router": router, "top_k": 4}
    run = open_run(tmp_path / "run", routed("average", wide))
    found = conduct(run, Village(run.root / "store", {"expert:c": lambda job, store: Failure(2, "gone")}))
    assert "average" in found
    assert "wide" not in found
    (entry,) = (entry for entry in run.ledger.of("quarantined") if entry.node == "candidate")
    assert (entry.name, entry.reason) == ("wide", "top_k 4 of the router is larger than the number of experts, 3")


def test_a_reference_that_failed_leaves_its_candidate_out(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", routed("molora", "joint", "tuned", "average"))
    found = conduct(run, Village(run.root / "store", {"molora": lambda job, store: Failure(4, "out of memory")}))
    assert "molora" not in found
    assert {"joint", "average", "tuned:a"} <= set(found)
    assert [entry.name for entry in run.ledger.of("quarantined")] == ["molora", "molora"], "the job, then the candidate"


def test_a_finished_run_asks_nobody_again_for_gates_and_routers(tmp_path: Path) -> None:
    settings = routed("learned", "phatgoose", "molora", "tuned")
    run = open_run(tmp_path / "run", settings)
    first = conduct(run, Village(run.root / "store"))
    run.close()
    again = open_run(tmp_path / "run", settings, resume=True)
    village = Village(again.root / "store")
    village.hellos = {}
    assert conduct(again, village) == first
    assert village.asked == []


@pytest.mark.parametrize(
    ("candidate", "sentence"),
    [
        ("arow", "no candidate 'arow'"),
        ({"name": "x", "method": "iterativ"}, "no merge method 'iterativ'"),
        ({"name": "x", "method": "iterative", "options": {"retention": 0}}, "retention"),
        ({"name": "x", "router": "arrow", "top_k": 5}, "larger than the number of experts, 4"),
        ({"name": "x", "method": "svd", "options": {"rank": 5}}, "expected a rank from 1 to 4, .* got 5"),
        (
            {"name": "x", "method": "average", "of": "unseeded", "options": {"task_scale": 2}},
            "refers to a seed that unseeded experts have not",
        ),
    ],
)
def test_a_candidate_that_makes_no_sense_is_refused_before_anything_starts(candidate: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve(routed(candidate))


def test_what_needs_a_seed_is_refused_without_one() -> None:
    scaled = {"name": "x", "method": "average", "options": {"task_scale": 2.0}}
    with pytest.raises(ConfigError, match=r"needs the seed, but seed\.mode is 'none'"):
        resolve(routed(scaled, seed={"mode": "none"}))
