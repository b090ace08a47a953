"""Where the examples of a run lie: a directory of task files, or the embedded tasks, generated."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from seedbed.common.config import FederationConfig
from seedbed.common.datafiles import read_examples
from seedbed.common.embedded import TASKS, write_task
from seedbed.common.embedded.corpus import general_text
from seedbed.common.errors import ConfigError, DataError, nearest
from seedbed.common.files import atomic_write
from seedbed.server.candidates import groups, resolve
from seedbed.server.plan import PUBLIC, PUBLIC_ROUTER

_SUFFIXES = (".jsonl", ".parquet", ".csv")
EMBEDDED_TRAIN, EMBEDDED_TEST = 1000, 200
"""Examples of each embedded task."""
EMBEDDED_GENERAL = 2000
"""Texts of the embedded model's own kind that routing tuning may train on."""


@dataclass(frozen=True, slots=True)
class General:
    """A file of general-purpose text, of which the last part only measures."""

    location: str
    train: int
    """Number of texts to train on, the first ones."""

    def test_texts(self) -> list[str]:
        return [example.completion for example in read_examples(self.location)[self.train :]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where the examples of every task lie."""

    train: dict[str, str]
    test: dict[str, str]
    hashes: dict[str, str]
    """SHA-256 of every file that the configuration names; what is generated is the same every time."""
    general: General | None = None


def find_inputs(config: FederationConfig, *, training: bool = True) -> Inputs:
    """Locate and read every data file before anything is written, so that bad data stops a run before it starts.

    What is generated, `complete` adds: the embedded tasks, and general text of the embedded model's kind.

    Args:
        training: whether training data lie here, too; those of a real federation are with its participants.

    Raises:
        ConfigError: if there is no data for the tasks.
        DataError: naming the file, and the line, that is missing or malformed.
    """
    tasks = config.tasks
    if tasks.data is None:
        for name in (*tasks.experts, *tasks.held_out):
            if name not in TASKS:
                raise ConfigError(
                    f"'{name}' is no embedded task and tasks.data is not set",
                    f"Pass --data DIR with {name}.test.jsonl. {nearest(name, TASKS)}",
                )
        untrainable = [name for name in tasks.experts if not TASKS[name].held_in]
        if untrainable:
            trainable = ", ".join(sorted(name for name, task in TASKS.items() if task.held_in))
            raise ConfigError(f"embedded task '{untrainable[0]}' has no training data", f"Choose among: {trainable}.")
        return _hashed(_public(config) if training else {}, {}, _general(config, training))
    if not tasks.data.is_dir():
        raise DataError(
            f"there is no data directory {tasks.data}", "Pass --data DIR with NAME.train.jsonl and NAME.test.jsonl."
        )
    train = {name: _locate(tasks.data, name, "train") for name in tasks.experts} | _public(config) if training else {}
    test = {name: _locate(tasks.data, name, "test") for name in (*tasks.experts, *tasks.held_out)}
    for name, location in test.items():
        if any(len(example.choices) < 2 for example in read_examples(location)):
            raise DataError(
                f"{location} has examples without choices: task '{name}' cannot be scored",
                "Give test files the shape prompt/choices/label.",
            )
    return _hashed(train, test, _general(config, training))


def complete(inputs: Inputs, config: FederationConfig, directory: Path, *, training: bool = True) -> Inputs:
    """What `find_inputs` has found, with what is generated into a directory: the same files every time."""
    if config.tasks.data is None:
        names = (*config.tasks.experts, *config.tasks.held_out)
        for name in names:
            if not (directory / f"{name}.test.jsonl").exists():
                write_task(name, directory, EMBEDDED_TRAIN, EMBEDDED_TEST, seed=0)
        train = {name: str(directory / f"{name}.train.jsonl") for name in config.tasks.experts} if training else {}
        test = {name: str(directory / f"{name}.test.jsonl") for name in names}
        inputs = replace(inputs, train={**train, **inputs.train}, test=test)
    if inputs.general is None and (config.tasks.data is None or config.base.model == "embedded"):
        return replace(inputs, general=_embedded_general(config, directory))
    return inputs


def _hashed(train: dict[str, str], test: dict[str, str], general: General | None) -> Inputs:
    """Read every file once, and note what it holds."""
    hashes = {}
    for location in (*train.values(), *test.values(), *([general.location] if general else [])):
        read_examples(location)
        hashes[location] = hashlib.sha256(Path(location).read_bytes()).hexdigest()
    return Inputs(train, test, hashes, general)


def _public(config: FederationConfig) -> dict[str, str]:
    """Samples that one participant trains on for all: of the seed, and of a learned router."""
    found = {}
    if config.seed.mode == "public":
        found[PUBLIC] = str(_existing(config.seed.data, "seed.data"))
    if config.combine.routing.mode == "public":
        found[PUBLIC_ROUTER] = str(_existing(config.combine.routing.data, "combine.routing.data"))
    return found


def _general(config: FederationConfig, training: bool) -> General | None:
    """The general text that is named, or that lies beside the tasks."""
    tasks = config.tasks
    beside = tasks.data / "general_text.jsonl" if tasks.data is not None else None
    if tasks.general is None and (beside is None or not beside.is_file()):
        missing = "tuned" in groups(resolve(config)) and config.routing_tuning.needs_general_text
        if missing and training and config.base.model != "embedded":
            raise DataError(
                "routing tuning needs general text, and there is none",
                'Set tasks.general to a file with one {"text": …} a line.',
            )
        return None
    location = tasks.general if tasks.general is not None else beside
    return _split(str(_existing(location, "tasks.general")), config)


def _embedded_general(config: FederationConfig, directory: Path) -> General:
    path = directory / "general_text.jsonl"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        texts = general_text(EMBEDDED_GENERAL + config.tasks.general_test, seed=0)
        atomic_write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    return _split(str(path), config)


def _split(location: str, config: FederationConfig) -> General:
    count, held = len(read_examples(location)), config.tasks.general_test
    if count <= held:
        raise DataError(
            f"{location} has {count} texts, of which tasks.general_test keeps {held} for measuring: none is left to train on",
            "Lower tasks.general_test, or give more text.",
        )
    return General(location, count - held)


def _locate(directory: Path, name: str, split: str) -> str:
    for suffix in _SUFFIXES:
        path = directory / f"{name}.{split}{suffix}"
        if path.is_file():
            return str(path.resolve())
    known = {entry.name.partition(".")[0] for entry in directory.iterdir() if entry.is_file()}
    hint = nearest(name, known) if known else "The directory is empty."
    raise DataError(f"there is no {directory / name}.{split}.jsonl (nor .parquet, .csv)", hint)


def _existing(path: Path | None, setting: str) -> Path:
    if path is None or not path.is_file():
        raise DataError(f"{setting}: there is no file {path}", f"Set {setting} to a file of examples.")
    return path.resolve()
