"""`federation.yaml` and the presets: read, changed by ``key.path=value``, validated, written.

An unknown key is refused with the nearest valid one, a wrong value with its path, and cross-field mistakes with a sentence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from seedbed.common.config import CandidateSettings, CombineSettings, FederationConfig
from seedbed.common.errors import ConfigError, nearest


def preset_names() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("seedbed.common").joinpath("presets").iterdir()
        if entry.name.endswith(".yaml")
    )


def load_config(source: str, overrides: Iterable[str] = ()) -> FederationConfig:
    """Read a preset or a YAML file and apply ``key.path=value`` overrides.

    Args:
        source: name of a preset, or path of a file.
        overrides: each ``key.path=value``, the value in YAML.

    Raises:
        ConfigError: if the source is missing, is not YAML, or holds an unknown key or a wrong value.
    """
    return parse_config(_read(source), overrides, source)


def parse_config(values: Mapping[str, Any], overrides: Iterable[str] = (), source: str = "config") -> FederationConfig:
    """Validate a mapping with overrides on top; see `load_config`."""
    merged = copy.deepcopy(dict(values))
    for override in overrides:
        _assign(merged, override)
    _refuse_unknown(merged, FederationConfig, "", source)
    try:
        return FederationConfig.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(_place(merged, first["loc"], missing=first["type"] == "missing"))
        reason = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        where = f"{source}: {path}: " if path else f"{source}: "
        raise ConfigError(f"{where}{reason}{got}", "Mend the file, or the --set option, and start again.") from None


def _place(values: Any, location: tuple[int | str, ...], *, missing: bool) -> list[str]:
    """Where in a file an error is. Pydantic names the kinds of a union in between, which are not part of the file."""
    path = []
    for depth, part in enumerate(location, 1):
        here = part in values if isinstance(values, Mapping) else isinstance(values, list) and isinstance(part, int)
        if here:
            values = values[part]
        elif not (missing and depth == len(location)):
            continue
        path.append(str(part))
    return path


def dump_config(config: FederationConfig) -> str:
    """The configuration as YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(source: str) -> dict[str, Any]:
    names = preset_names()
    if source in names:
        text = resources.files("seedbed.common").joinpath("presets", f"{source}.yaml").read_text(encoding="utf-8")
    elif Path(source).is_file():
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source} cannot be read: {error}", "Name a YAML file in UTF-8.") from None
    else:
        raise ConfigError(f"there is no preset and no file named '{source}'", nearest(source, names))
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise ConfigError(f"{source} is not valid YAML, line {line}", "Mend that line.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source} does not hold a mapping of settings", "See the presets for an example.")
    return values


def _assign(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r} is not of the form key.path=value", "Example: --set training.steps=50")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {parent} is not a section", "Give the path of a single setting.")
        values = child
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: {text!r} is not valid YAML", "Quote the value.") from None


def _refuse_unknown(values: Mapping[str, Any], section: type[BaseModel], path: str, source: str) -> None:
    for key, value in values.items():
        field = section.model_fields.get(key)
        if field is None:
            raise ConfigError(f"{source}: unknown key '{path}{key}'", nearest(key, section.model_fields))
        if (
            isinstance(value, Mapping)
            and isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
        ):
            _refuse_unknown(value, field.annotation, f"{path}{key}.", source)
        elif section is CombineSettings and key == "candidates" and isinstance(value, list | tuple):
            for index, entry in enumerate(value):
                if isinstance(entry, Mapping):
                    _refuse_unknown(entry, CandidateSettings, f"{path}{key}.{index}.", source)
