"""Checks of what a participant brings: the base model, and its data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from seedbed.client.preflight.report import Check, failed
from seedbed.common import basemodel
from seedbed.common.config import BaseModelConfig
from seedbed.common.datafiles import read_examples
from seedbed.common.errors import ModelError, SeedbedError
from seedbed.common.jobs import GENERAL, DataSource
from seedbed.common.manifest import BaseIdentity
from seedbed.common.registry import FederationInfo

_BASE_HINT = "Fetch the same model at the same revision, or name a local copy of it with --base DIR."


def local_base(config: BaseModelConfig, override: Path | None) -> BaseModelConfig:
    """The base model as this participant finds it: the coordinator's, or a copy in a directory of its own.

    Raises:
        ModelError: if that directory is none.
    """
    if override is None:
        return config
    directory = override.expanduser().absolute()
    if not directory.is_dir():
        raise ModelError(f"there is no directory {directory} with a base model", "Check --base.")
    return config.model_copy(update={"model": str(directory), "revision": None})


def require_identity(config: BaseModelConfig, expected: BaseIdentity) -> tuple[Path, BaseIdentity]:
    """Find a base model and see that it is the federation's.

    Returns:
        its directory and its identity.

    Raises:
        ModelError: if it is not there, or is another one; both hashes are shown.
    """
    try:
        directory = basemodel.resolve(config)
    except ModelError as error:
        raise ModelError(error.message, f"{error.hint} A local copy can be named with --base DIR.") from None
    found = basemodel.identify(directory, config.model)
    if expected.digest and found.digest != expected.digest:
        raise ModelError(
            f"the base model in {directory} is not the federation's: expected {expected.name} ({expected.digest}), "
            f"got {found.digest}",
            _BASE_HINT,
        )
    return directory, found


def base_model(config: BaseModelConfig, info: FederationInfo | None) -> tuple[Path | None, Check]:
    """Whether the base model is here and the right one."""
    try:
        directory, found = require_identity(config, info.identity if info is not None else BaseIdentity(name=""))
    except SeedbedError as error:
        return None, failed("base model", error)
    same = ", the federation's" if info is not None else ""
    return directory, Check("base model", "ok", f"{directory} ({found.digest[:12]}…{same})")


def data(sources: Sequence[DataSource], info: FederationInfo | None) -> Iterator[Check]:
    """Every example of every file is read, so that a faulty line is named before a training meets it."""
    for source in sources:
        try:
            count = len(read_examples(source.location))
        except SeedbedError as error:
            yield failed(f"data: {source.task}", error)
            continue
        asked = info is None or source.task == GENERAL or source.task in info.tasks
        remedy = "" if asked or info is None else f"Name it as the federation does: {', '.join(info.tasks)}."
        also = "" if asked else "; the federation trains no such task"
        yield Check(f"data: {source.task}", "ok" if asked else "warn", f"{count} examples{also}", remedy)
    names = {source.task for source in sources}
    if info is not None and not names - {GENERAL}:
        remedy = f"Bring one with --task NAME=FILE: {', '.join(info.tasks)}."
        yield Check("data", "warn", "no task: this participant will be given no expert to train", remedy)
    if info is not None and info.needs_general_text and GENERAL not in names:
        remedy = 'Give --general FILE with one {"text": …} a line.'
        yield Check("data: general", "warn", "the federation tunes on general text, and there is none here", remedy)
