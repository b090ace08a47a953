"""Where the examples of a run lie: a directory of task files, or the embedded tasks, generated."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from seedbed.common.config import FederationConfig
from seedbed.common.datafiles import read_examples
from seedbed.common.embedded import TASKS, write_task
from seedbed.common.errors import ConfigError, DataError, nearest
from seedbed.server.plan import PUBLIC

_SUFFIXES = (".jsonl", ".parquet", ".csv")
EMBEDDED_TRAIN, EMBEDDED_TEST = 1000, 200
"""Examples of each embedded task."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where the examples of every task lie, and their hashes."""

    train: dict[str, str]
    test: dict[str, str]
    hashes: dict[str, str]


def find_inputs(config: FederationConfig) -> Inputs | None:
    """Locate and read every data file before anything is written, so that bad data stops a run before it starts.

    Returns:
        None for the embedded tasks, which are generated into the run directory.

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
        return None
    if not tasks.data.is_dir():
        raise DataError(
            f"there is no data directory {tasks.data}", "Pass --data DIR with NAME.train.jsonl and NAME.test.jsonl."
        )
    train = {name: _locate(tasks.data, name, "train") for name in tasks.experts}
    test = {name: _locate(tasks.data, name, "test") for name in (*tasks.experts, *tasks.held_out)}
    if config.seed.mode == "public":
        train[PUBLIC] = str(_existing(config.seed.data))
    for name, location in test.items():
        if any(len(example.choices) < 2 for example in read_examples(location)):
            raise DataError(
                f"{location} has examples without choices: task '{name}' cannot be scored",
                "Give test files the shape prompt/choices/label.",
            )
    hashes = {}
    for location in (*train.values(), *test.values()):
        read_examples(location)
        hashes[location] = hashlib.sha256(Path(location).read_bytes()).hexdigest()
    return Inputs(train, test, hashes)


def write_embedded(config: FederationConfig, directory: Path) -> Inputs:
    """Generate the embedded tasks into a directory; the same files every time."""
    names = (*config.tasks.experts, *config.tasks.held_out)
    for name in names:
        if not (directory / f"{name}.test.jsonl").exists():
            write_task(name, directory, EMBEDDED_TRAIN, EMBEDDED_TEST, seed=0)
    train = {name: str(directory / f"{name}.train.jsonl") for name in config.tasks.experts}
    if config.seed.mode == "public":
        train[PUBLIC] = str(_existing(config.seed.data))
    return Inputs(train, {name: str(directory / f"{name}.test.jsonl") for name in names}, {})


def _locate(directory: Path, name: str, split: str) -> str:
    for suffix in _SUFFIXES:
        path = directory / f"{name}.{split}{suffix}"
        if path.is_file():
            return str(path.resolve())
    known = {entry.name.partition(".")[0] for entry in directory.iterdir() if entry.is_file()}
    hint = nearest(name, known) if known else "The directory is empty."
    raise DataError(f"there is no {directory / name}.{split}.jsonl (nor .parquet, .csv)", hint)


def _existing(path: Path | None) -> Path:
    if path is None or not path.is_file():
        raise DataError(f"there is no public sample {path}", "Set seed.data to a file of examples.")
    return path.resolve()
