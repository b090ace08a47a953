"""What a participant hands in compressed: as the job asked, with the error stated, and admitted as such."""

from __future__ import annotations

from pathlib import Path

import pytest

from seedbed.client.jobs import perform
from seedbed.common import basemodel
from seedbed.common.compression import transfer_error
from seedbed.common.config import BaseModelConfig, LoraSettings, TrainingSettings
from seedbed.common.embedded import write_task
from seedbed.common.errors import AdapterMismatchError
from seedbed.common.jobs import DataSource, Job, JobResult, Node
from seedbed.common.storage import AdapterFile, DirectoryStore, read_adapter
from seedbed.server.admission import Admission


@pytest.fixture
def node(tmp_path: Path) -> Node:
    write_task("addition", tmp_path, train=40, test=4, seed=0)
    source = DataSource(task="addition", location=str(tmp_path / "addition.train.jsonl"))
    return Node(
        name="n", base=BaseModelConfig(), store=tmp_path / "store", work=tmp_path / "work", data=(source,), threads=1
    )


def job(transfer: str, kind: str = "expert") -> Job:
    return Job.model_validate(
        {
            "kind": kind,
            "name": "a job",
            "base": basemodel.identify(basemodel.resolve(BaseModelConfig()), "embedded"),
            "tasks": ("addition",),
            "lora": LoraSettings(rank=16),
            "training": TrainingSettings(
                engine="torch", steps=2, batch_size=4, warmup_steps=0, log_every=1, transfer=transfer
            ),
        }
    )


def admission(node: Node, given: JobResult) -> Admission:
    file = AdapterFile(DirectoryStore(node.store).open(given.digest))
    return Admission(
        DirectoryStore(node.store), {name: file.shape(name) for name in file.names}, 1e4, job("float32").base
    )


@pytest.mark.parametrize(("transfer", "share"), [("bfloat16", 0.55), ("int8", 0.35)])
def test_an_expert_is_handed_in_as_asked_with_its_error_and_is_admitted(
    node: Node, transfer: str, share: float
) -> None:
    store = DirectoryStore(node.store)
    whole, small = perform(job("float32"), node), perform(job(transfer), node)
    assert (whole.error, small.error) == ("", "")
    assert small.manifest is not None
    assert small.manifest.dtype == transfer
    exact, received = (read_adapter(store.open(done.digest))[0] for done in (whole, small))
    error = transfer_error(exact, received)
    assert small.manifest.metrics["transfer_error"] == error.total
    assert small.manifest.metrics["transfer_error_worst_module"] == error.worst
    assert 0 < error.total < 0.02
    sizes = [(store.open(done.digest) / "adapter_model.safetensors").stat().st_size for done in (whole, small)]
    assert sizes[1] < share * sizes[0]
    assert admission(node, small).admit(job(transfer), small) == small.manifest


def test_an_expert_in_another_form_than_asked_is_refused(node: Node) -> None:
    small = perform(job("bfloat16"), node)
    asked = job("float32")
    with pytest.raises(AdapterMismatchError, match="expected"):
        admission(node, small).admit(asked, small.model_copy(update={"recipe": asked.recipe}))


def test_a_seed_asked_for_in_int8_comes_in_bfloat16(node: Node) -> None:
    seed = perform(job("int8", kind="seed"), node)
    assert seed.manifest is not None
    assert seed.manifest.dtype == "bfloat16"
    assert admission(node, seed).admit(job("int8", kind="seed"), seed) == seed.manifest
