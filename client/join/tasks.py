"""What `--task` means: a data file, a named one, or a small YAML file that says the same with more words.

    --task addition.train.jsonl            the task is the file's stem, without `.train`: addition
    --task addition=data/my_sums.csv       the task named
    --task tasks.yaml                      one mapping, or a list of them:
                                               task: addition
                                               location: my_sums.csv     beside the YAML file, or a hub id
                                               prompt: "Q: {prompt}\\nA:"  only where nobody else says it
                                               fraction: 0.5             optional, and so are
                                               limit: 1000               sample_seed and limit

A coordinator's job says which prompt template it uses; the file's own serves where a job says none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from seedbed.common.errors import ConfigError
from seedbed.common.jobs import GENERAL, DataSource

_FILES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv")
_YAML = (".yaml", ".yml")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_HINT = "Give FILE, NAME=FILE, or a YAML file with task and location; see `seedbed join --help`."


def parse_tasks(specs: Sequence[str], general: Path | None = None) -> tuple[DataSource, ...]:
    """The data that a participant brings, in the order named; no file of examples is opened.

    Args:
        specs: values of `--task`.
        general: file of general-purpose text, for routing tuning.

    Raises:
        ConfigError: if one makes no sense, or two name the same task.
    """
    sources = [source for spec in specs for source in _parse(spec)]
    if general is not None:
        sources.append(DataSource(task=GENERAL, location=_location(str(general), Path.cwd())))
    names = [source.task for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the task '{name}' is named twice", "Give each task once; name one with NAME=FILE.")
    return tuple(sources)


def _parse(spec: str) -> list[DataSource]:
    name, equals, location = spec.partition("=")
    if equals and _NAME.fullmatch(name) and not Path(spec).expanduser().exists():
        if not location:
            raise ConfigError(f"--task {spec} names no file", _HINT)
        return [DataSource(task=name, location=_location(location, Path.cwd()))]
    path = Path(spec).expanduser()
    if path.suffix.lower() in _YAML:
        return _from_yaml(path)
    if path.suffix.lower() not in _FILES:
        raise ConfigError(f"--task {spec} is not a file of a known kind ({', '.join((*_FILES, *_YAML))})", _HINT)
    stem = path.stem.removesuffix(".train")
    if not _NAME.fullmatch(stem):
        raise ConfigError(f"'{stem}' of {path} cannot name a task", "Use NAME=FILE, NAME of letters, digits, . _ -.")
    return [DataSource(task=stem, location=_location(spec, Path.cwd()))]


def _from_yaml(path: Path) -> list[DataSource]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the task file {path} cannot be read: {error}", _HINT) from None
    entries = found if isinstance(found, list) else [found]
    sources = []
    for number, entry in enumerate(entries, start=1):
        try:
            source = DataSource.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or f"entry {number}"
            raise ConfigError(f"the task file {path}, entry {number}: '{where}': {first['msg']}", _HINT) from None
        if not _NAME.fullmatch(source.task):
            raise ConfigError(f"the task file {path}: '{source.task}' cannot name a task", _HINT)
        sources.append(source.model_copy(update={"location": _location(source.location, path.parent)}))
    return sources


def _location(text: str, beside: Path) -> str:
    """An absolute path where it is a file's name: the node works in another directory. A hub id stays as it is."""
    path = Path(text).expanduser()
    if path.suffix.lower() in _FILES or (beside / path).exists():
        return str((beside / path).absolute())
    return text
