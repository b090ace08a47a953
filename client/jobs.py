"""What a participant does when it is asked: say hello, or train a job and put the result into the store.

Nothing here knows Flower. A job that fails is an answer, not an exception: the participant lives on. A job that is asked
again trains no second time: while it runs, the second asker waits for it (a lock for each recipe, between processes); when
it is done, the store answers; and what was trained but could not be handed in is handed in then.
"""

from __future__ import annotations

import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from seedbed.client.checkpoint import remove_checkpoint
from seedbed.client.data import digest_of
from seedbed.client.launch import run
from seedbed.client.outcome import manifest_of, put_result
from seedbed.client.privacy import sealed
from seedbed.client.progress import note_job, recording
from seedbed.client.spec import TrainSpec
from seedbed.common import basemodel
from seedbed.common.errors import AdapterError, AdapterMismatchError, SeedbedError
from seedbed.common.exclusive import exclusive
from seedbed.common.jobs import Hello, Job, JobResult, Node
from seedbed.common.manifest import BaseIdentity, Manifest, recipe_hash
from seedbed.common.storage import AdapterStore, DirectoryStore, read_manifest

_PATIENCE = 600.0
"""Seconds that a registry may be out of reach before a job gives up; what it has trained is kept all the same."""


def store_of(node: Node) -> AdapterStore:
    """Where a participant's adapters come from and go to: the registry, by way of its own directory, or that alone."""
    cache = DirectoryStore(node.store)
    if node.registry is None:
        return cache
    # Here, since without a registry gRPC is not needed.
    from seedbed.client.registry import RegistryClient
    from seedbed.client.registry_store import RegistryStore

    return RegistryStore(RegistryClient(node.registry, patience=_PATIENCE), cache)


def introduce(node: Node) -> Hello:
    """Describe this participant, so that a mismatch is found before any work is given."""
    return Hello(
        node=node.name,
        version=version("seedbed"),
        base=_identity(node),
        tasks=tuple(source.task for source in node.data),
        pooled=node.pooled,
        devices=tuple(basemodel.device_names()),
        platform={"python": platform.python_version(), "machine": platform.machine()},
    )


def perform(job: Job, node: Node, deadline: float | None = None) -> JobResult:
    """Train a job, unless the store already holds it, and answer with the digest of the result.

    Args:
        deadline: seconds after which the training is ended and the job has failed.
    """
    started = time.monotonic()

    def answer(**fields: Any) -> JobResult:
        seconds = time.monotonic() - started
        return JobResult(node=node.name, name=job.name, recipe=job.recipe, seconds=seconds, **fields)

    try:
        digest, manifest, cached = _result(job, node, deadline)
    except SeedbedError as error:
        return answer(error=_noted(job, node, error.message), hint=error.hint)
    except Exception as error:  # a defect of ours must not take the participant down: it is told as this job's failure
        return answer(error=_noted(job, node, f"{type(error).__name__}: {error}"))
    note_job(_work(job, node), job, "done")
    return answer(digest=digest, manifest=manifest, cached=cached)


def _noted(job: Job, node: Node, error: str) -> str:
    note_job(_work(job, node), job, "failed", error)
    return error


def _work(job: Job, node: Node) -> Path:
    return node.work / job.recipe[:16]


def _result(job: Job, node: Node, deadline: float | None) -> tuple[str, Manifest, bool]:
    base = _identity(node)
    if base.digest != job.base.digest:
        raise AdapterMismatchError(
            f"the job is for base model {job.base.name} ({job.base.digest[:12]}…), "
            f"this participant has {base.name} ({base.digest[:12]}…)",
            "Use the same base model, at the same revision.",
        )
    until = None if deadline is None else time.monotonic() + deadline
    with exclusive(_work(job, node).with_suffix(".lock"), f"does the job {job.name}", deadline):
        return _made(job, node, store_of(node), None if until is None else until - time.monotonic())


def _made(job: Job, node: Node, store: AdapterStore, deadline: float | None) -> tuple[str, Manifest, bool]:
    start = store.open(job.parent) if job.parent else None
    experts = [store.open(digest) for digest in job.experts]
    spec = TrainSpec.of(job, node, _work(job, node) / "adapter", start, experts)
    # The recipe is the coordinator's and knows no data: the same job on changed data is another training.
    sources = (*spec.data, *([spec.general] if spec.general is not None else []))
    data = recipe_hash({source.task: digest_of(source) for source in sources})
    data = sealed(data, node.work) if node.privacy is not None else data
    held = store.find(job.recipe)
    if held is not None:
        manifest = read_manifest(store.open(held))
        if manifest.settings.get("data") == data:
            return held, manifest, True
    spec = spec.model_copy(update={"settings": {**spec.settings, "data": data}})
    if not _is_trained(spec):
        _train(spec, job, node, deadline)
    digest = _hand_in(spec, job, node, store)
    return digest, read_manifest(store.open(digest)), False


def _is_trained(spec: TrainSpec) -> bool:
    """Whether an earlier try got as far as a result on disk, and no further."""
    try:
        found = manifest_of(spec.output)
    except SeedbedError:
        return False
    return found.recipe == spec.recipe and found.settings.get("data") == spec.settings["data"]


def _train(spec: TrainSpec, job: Job, node: Node, deadline: float | None) -> None:
    work = spec.output.parent
    shutil.rmtree(spec.output, ignore_errors=True)  # of another training, or half written
    work.mkdir(parents=True, exist_ok=True)
    note_job(work, job, "training")
    # One that goes on from its checkpoint goes on in its record, too.
    go_on = spec.checkpoint is not None and spec.checkpoint.is_dir()
    with recording(work, job, node, go_on=go_on) as on_event:
        run(spec, on_event=on_event, deadline=deadline, log=work / "training.log", warm=True)


def _hand_in(spec: TrainSpec, job: Job, node: Node, store: AdapterStore) -> str:
    """Put the result into the store. It stays where it is until that has worked."""
    work = spec.output.parent
    note_job(work, job, "handing in")
    try:
        digest = put_result(spec.output, store)
    except AdapterError:  # damaged on disk, or refused: asked again, it shall be trained anew
        shutil.rmtree(spec.output, ignore_errors=True)
        raise
    shutil.rmtree(spec.output, ignore_errors=True)
    remove_checkpoint(work / "checkpoint")
    return digest


def _identity(node: Node) -> BaseIdentity:
    return basemodel.identify(basemodel.resolve(node.base), node.base.model)
