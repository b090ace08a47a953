"""What a participant does when it is asked: say hello, or train a job and put the result into the store.

Nothing here knows Flower. A job that fails is an answer, not an exception: the participant lives on.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from seedbed.client.checkpoint import remove_checkpoint
from seedbed.client.data import digest_of
from seedbed.client.launch import run
from seedbed.client.outcome import put_result
from seedbed.client.spec import TrainSpec
from seedbed.common import basemodel
from seedbed.common.errors import AdapterMismatchError, SeedbedError
from seedbed.common.jobs import Hello, Job, JobResult, Node
from seedbed.common.manifest import BaseIdentity, Manifest, recipe_hash
from seedbed.common.storage import DirectoryStore, read_manifest


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
        return answer(error=error.message, hint=error.hint)
    except Exception as error:  # a defect of ours must not take the participant down: it is told as this job's failure
        return answer(error=f"{type(error).__name__}: {error}")
    return answer(digest=digest, manifest=manifest, cached=cached)


def _result(job: Job, node: Node, deadline: float | None) -> tuple[str, Manifest, bool]:
    base = _identity(node)
    if base.digest != job.base.digest:
        raise AdapterMismatchError(
            f"the job is for base model {job.base.name} ({job.base.digest[:12]}…), "
            f"this participant has {base.name} ({base.digest[:12]}…)",
            "Use the same base model, at the same revision.",
        )
    store = DirectoryStore(node.store)
    work = node.work / job.recipe[:16]
    start = store.open(job.parent) if job.parent else None
    experts = [store.open(digest) for digest in job.experts]
    spec = TrainSpec.of(job, node, work / "adapter", start, experts)
    # The recipe is the coordinator's and knows no data: the same job on changed data is another training.
    sources = (*spec.data, *([spec.general] if spec.general is not None else []))
    data = recipe_hash({source.task: digest_of(source) for source in sources})
    held = store.find(job.recipe)
    if held is not None:
        manifest = read_manifest(store.open(held))
        if manifest.settings.get("data") == data:
            return held, manifest, True
    digest = _train(spec.model_copy(update={"settings": {**spec.settings, "data": data}}), work, store, deadline)
    return digest, read_manifest(store.open(digest)), False


def _train(spec: TrainSpec, work: Path, store: DirectoryStore, deadline: float | None) -> str:
    shutil.rmtree(spec.output, ignore_errors=True)  # of an earlier try that was interrupted before the store had it
    work.mkdir(parents=True, exist_ok=True)
    # One that goes on from its checkpoint goes on in its record, too.
    mode = "a" if spec.checkpoint is not None and spec.checkpoint.is_dir() else "w"
    with (work / "progress.jsonl").open(mode, encoding="utf-8") as progress:
        on_event = _writer(progress.write, progress.flush)
        run(spec, on_event=on_event, deadline=deadline, log=work / "training.log", warm=True)
    digest = put_result(spec.output, store)
    shutil.rmtree(spec.output, ignore_errors=True)
    remove_checkpoint(work / "checkpoint")
    return digest


def _writer(write: Callable[[str], Any], flush: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    def on_event(event: dict[str, Any]) -> None:
        write(json.dumps(event) + "\n")
        flush()

    return on_event


def _identity(node: Node) -> BaseIdentity:
    return basemodel.identify(basemodel.resolve(node.base), node.base.model)
