"""A private participant: what it hands in is noised, counted, and says nothing else of its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seedbed.client.jobs import perform
from seedbed.client.privacy import sealed
from seedbed.common import basemodel
from seedbed.common.config import BaseModelConfig, LoraSettings, TrainingSettings
from seedbed.common.embedded import write_task
from seedbed.common.jobs import DataSource, Job, Node
from seedbed.common.privacy import PrivacySettings, composed, epsilon_of, update_norm
from seedbed.common.storage import DirectoryStore, read_adapter

PRIVACY = PrivacySettings(clip=0.1, noise_multiplier=4.0)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    write_task("addition", tmp_path, train=40, test=4, seed=0)
    source = DataSource(task="addition", location=str(tmp_path / "addition.train.jsonl"))
    return Node(
        name="n",
        base=BaseModelConfig(),
        store=tmp_path / "store",
        work=tmp_path / "work",
        data=(source,),
        threads=1,
        privacy=PRIVACY,
    )


def job(**changes: object) -> Job:
    values = {
        "kind": "expert",
        "name": "expert:addition",
        "base": basemodel.identify(basemodel.resolve(BaseModelConfig()), "embedded"),
        "tasks": ("addition",),
        "lora": LoraSettings(rank=2),
        "training": TrainingSettings(engine="torch", steps=2, batch_size=4, log_every=1),
    }
    return Job.model_validate({**values, **changes})


def test_a_private_expert_is_its_start_plus_a_short_update_and_noise(node: Node, tmp_path: Path) -> None:
    done = perform(job(), node)
    assert done.error == ""
    assert done.manifest is not None
    stated = done.manifest.settings["privacy"]
    assert stated["epsilon"] == stated["epsilon_of_all"] == epsilon_of(composed([4.0]), 1e-5)
    assert (stated["clip"], stated["noise_multiplier"], stated["delta"], stated["noise"]) == (0.1, 4.0, 1e-5, "system")
    assert done.manifest.metrics == {"steps": 2.0}  # no loss, no number of tokens

    open_node = node.model_copy(update={"privacy": None, "store": tmp_path / "open", "work": tmp_path / "open-work"})
    plain = perform(job(), open_node)
    private = read_adapter(DirectoryStore(node.store).open(done.digest))[0]
    exact = read_adapter(DirectoryStore(open_node.store).open(plain.digest))[0]
    count = exact.parameters
    # Noise of 0.4 in each of many entries, beside which an update of norm 0.1 is nothing.
    assert update_norm(private, exact) == pytest.approx(0.4 * count**0.5, rel=0.1)
    assert plain.manifest is not None
    assert "loss" in plain.manifest.metrics
    assert "privacy" not in plain.manifest.settings
    assert done.manifest.settings["data"] != plain.manifest.settings["data"]
    assert done.manifest.settings["data"] == sealed(plain.manifest.settings["data"], node.work)


def test_releases_add_up_and_a_result_that_is_held_is_not_released_again(node: Node) -> None:
    first = perform(job(), node)
    again = perform(job(), node)
    assert again.cached
    assert again.digest == first.digest
    second = perform(job(data_seed=1), node)
    assert second.manifest is not None
    stated = second.manifest.settings["privacy"]
    assert stated["releases"] == 2
    assert stated["epsilon_of_all"] == epsilon_of(composed([4.0, 4.0]), 1e-5)
    lines = [json.loads(line) for line in (node.work / "privacy.jsonl").read_text().splitlines()]
    assert [line["recipe"] for line in lines] == [job().recipe, job(data_seed=1).recipe]


def test_a_release_that_a_full_disk_has_torn_counts_for_nothing_and_harms_no_later_one(node: Node) -> None:
    node.work.mkdir(parents=True)
    ledger = node.work / "privacy.jsonl"
    ledger.write_text('{"recipe": "a", "noise_multiplier": 4.0}\n{"recipe": "b", "noise_mul')
    done = perform(job(), node)
    assert done.manifest is not None
    assert done.manifest.settings["privacy"]["releases"] == 2
    assert [json.loads(line)["recipe"] for line in ledger.read_text().splitlines()] == ["a", job().recipe]


def test_the_same_job_done_again_has_other_noise_unless_a_test_asks_for_the_same(node: Node, tmp_path: Path) -> None:
    def digest(place: str, privacy: PrivacySettings) -> str:
        places = {"store": tmp_path / place / "s", "work": tmp_path / place / "w", "privacy": privacy}
        done = perform(job(), node.model_copy(update=places))
        return done.manifest.tensors_sha256 if done.manifest is not None else done.error

    seeded = PRIVACY.model_copy(update={"seed": 3})
    assert digest("a", PRIVACY) != digest("b", PRIVACY)
    assert digest("c", seeded) == digest("d", seeded)


def test_privacy_is_the_participants_own_and_does_not_change_the_recipe(node: Node) -> None:
    assert perform(job(), node).recipe == job().recipe


def test_a_router_is_refused_before_it_is_trained(node: Node) -> None:
    mixture = job(kind="molora", name="m", names=("a", "b"), router={"kind": "molora"})
    done = perform(mixture, node)
    assert "privacy covers adapters" in done.error
    assert done.hint
    assert not (node.work / "privacy.jsonl").exists()


def test_the_key_is_secret_and_the_seal_is_its_owners(tmp_path: Path) -> None:
    one, other = sealed("data", tmp_path / "one"), sealed("data", tmp_path / "other")
    assert one == sealed("data", tmp_path / "one") != other
    assert one != sealed("other data", tmp_path / "one")
    key = tmp_path / "one/privacy.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == 32


def test_noise_does_not_come_from_the_trainings_own_random_numbers(node: Node, tmp_path: Path) -> None:
    """Two participants with the same seeds: equal noise would cancel in their difference."""
    adapters = []
    for place in ("a", "b"):
        own = node.model_copy(update={"store": tmp_path / place / "s", "work": tmp_path / place / "w"})
        adapters.append(read_adapter(DirectoryStore(own.store).open(perform(job(), own).digest))[0])
    assert update_norm(*adapters) == pytest.approx(0.4 * (2 * adapters[0].parameters) ** 0.5, rel=0.1)
    assert torch.isfinite(next(iter(adapters[0].values())).A).all()
