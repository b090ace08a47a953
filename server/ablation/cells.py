"""What a plan comes to: its cells, each with the whole configuration that it runs under; pure.

variants = expand(plan)     the full method first, then every row's cells in order
groups(variants)            cells that differ in their candidate only share one configuration, and so one federation
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from seedbed.common.config import ROUTER_KINDS, CandidateSettings, FederationConfig
from seedbed.common.config_file import load_config, parse_config
from seedbed.common.errors import ConfigError, nearest
from seedbed.server.ablation.parts import (
    CANDIDATE,
    EXPERTS,
    OPTIONS,
    SEED_TASKS,
    in_candidate,
    removal,
    removed_option,
)
from seedbed.server.ablation.values import Cell, Metric, Plan, Row
from seedbed.server.candidates import Candidate, resolve
from seedbed.server.merging import METHODS

FULL = "full"
"""Name of the cell that is the full method."""
Entry = str | CandidateSettings
_SIMPLE = ("base", "seed", "experts", "tuned", "individual", "joint", "oracle")
"""Candidates that have no settings of their own."""
_CELL_OF_ALL: tuple[Metric, ...] = ("zero_shot_accuracy", "task_performance", "generalization_performance")


@dataclass(frozen=True, slots=True)
class Variant:
    """A cell with what it runs under."""

    cell: Cell
    config: FederationConfig
    """Its candidates are those that the cell needs, no others."""
    candidate: Candidate
    entry: Entry

    @property
    def setting(self) -> str:
        """Equal for cells that differ in their candidate only."""
        values = self.config.model_dump(mode="json")
        values["combine"]["candidates"] = []
        return json.dumps(values, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Group:
    """Cells of one configuration, whose candidates one federation makes."""

    config: FederationConfig
    variants: tuple[Variant, ...]


def base_config(plan: Plan) -> FederationConfig:
    """The configuration of the full method, with all its candidates.

    Raises:
        ConfigError: if there is none, or it makes no sense.
    """
    return load_config(plan.config, plan.changes)


def expand(plan: Plan) -> list[Variant]:
    """All cells, the full method first.

    Raises:
        ConfigError: naming the row, if a cell makes no sense, or if two come to the same.
    """
    config = base_config(plan)
    entries = {_name(entry): entry for entry in config.combine.candidates}
    if plan.full not in entries:
        raise ConfigError(
            f"plan '{plan.name}': full is '{plan.full}', which is no candidate of the configuration",
            nearest(plan.full, entries),
        )
    maker = _Maker(plan, config, entries)
    found = [maker.full()]
    for row in plan.rows:
        try:
            found += maker.row(row)
        except ConfigError as error:
            raise ConfigError(f"plan '{plan.name}', row '{row.label}': {error.message}", error.hint) from None
    return _distinct(plan, found)


def groups(variants: Sequence[Variant]) -> list[Group]:
    """Cells by configuration, in order of their first cell."""
    found: dict[str, list[Variant]] = {}
    for variant in variants:
        found.setdefault(variant.setting, []).append(variant)
    return [Group(with_candidates(members), tuple(members)) for members in found.values()]


def with_candidates(members: Sequence[Variant]) -> FederationConfig:
    """The one configuration of some cells, with the candidates of all."""
    entries: dict[str, Any] = {}
    for variant in members:
        for entry in variant.config.combine.candidates:
            entries.setdefault(_name(entry), _plain(entry))
    return _with(members[0].config, [f"combine.candidates={_yaml(list(entries.values()))}"])


def whole_config(plan: Plan, variants: Sequence[Variant]) -> FederationConfig:
    """The plan's configuration with the expert tasks of all cells."""
    config = base_config(plan)
    tasks = [task for variant in variants for task in variant.config.tasks.experts]
    experts = tuple(dict.fromkeys((*config.tasks.experts, *tasks)))
    return config.model_copy(update={"tasks": config.tasks.model_copy(update={"experts": experts})})


def configured(config: FederationConfig, seed: int) -> FederationConfig:
    """A configuration as an ablation runs it: with its random seed, and nobody may be missing.

    A comparison in which one side silently lacks an expert would be wrong, so the quorum is all.
    """
    changes = {
        "run": config.run.model_copy(update={"random_seed": seed}),
        "stages": config.stages.model_copy(update={"quorum": 1.0}),
    }
    return config.model_copy(update=changes)


class _Maker:
    """Makes the cells of one plan."""

    def __init__(self, plan: Plan, config: FederationConfig, entries: Mapping[str, Entry]) -> None:
        self.plan = plan
        self.config = config
        self.entries = entries

    def full(self) -> Variant:
        entry = self.entries[self.plan.full]
        if isinstance(entry, str) and entry in _SIMPLE and entry != "joint":
            raise ConfigError(
                f"plan '{self.plan.name}': full is '{entry}', which combines nothing",
                "Name a merge or a router as the full method.",
            )
        cell = Cell(name=FULL, row="", candidate=self.plan.full, metrics=_CELL_OF_ALL)
        return self._variant(cell, [], entry)

    def row(self, row: Row) -> list[Variant]:
        if row.action == "remove":
            values = tuple(self._removal(part) for part in row.part)
            found = [self._cell(row, values)]
            if found[0].setting == self.full().setting and _same(found[0], self.full()):
                raise ConfigError(f"{' and '.join(row.part)} is not there to be removed", "Leave the row out.")
            return found
        return [self._cell(row, value if len(row.part) > 1 else (value,)) for value in row.values]

    def _removal(self, part: str) -> Any:
        if not part.startswith(OPTIONS):
            return removal(part)
        settings = self._settings(self.entries[self.plan.full])
        option = part.removeprefix(OPTIONS)
        fields = METHODS[settings.method].options.model_fields if settings.method in METHODS else {}
        if option not in fields:
            raise ConfigError(f"'{settings.name}' has no option '{option}'", nearest(option, fields or ["none"]))
        return removed_option(part, fields[option])

    def _cell(self, row: Row, values: tuple[Any, ...]) -> Variant:
        given = dict(zip(row.part, values, strict=True))
        changes = [
            f"{part}={_yaml(self._value(part, value))}"
            for part, value in given.items()
            if part != CANDIDATE and not in_candidate(part)
        ]
        entry = self.entries[self.plan.full]
        if CANDIDATE in given:
            entry = self._other(given[CANDIDATE])
        changed = {part: value for part, value in given.items() if in_candidate(part)}
        if changed:
            entry = self._changed(self._settings(entry), changed)
        texts = {part: _name(entry) if part == CANDIDATE else _told(part, value) for part, value in given.items()}
        number = _number(values[0]) if len(values) == 1 and row.part != (SEED_TASKS,) else None
        cell = Cell(
            name=",".join(f"{part}={text}" for part, text in texts.items()),
            row=row.label,
            value=", ".join(texts.values()),
            number=number,
            candidate=_name(entry),
            metrics=row.metrics,
        )
        return self._variant(cell, changes, entry)

    def _value(self, part: str, value: Any) -> Any:
        """A number of tasks takes the first ones, or below 0 the last ones."""
        if part not in (EXPERTS, SEED_TASKS) or isinstance(value, bool) or not isinstance(value, int):
            return value
        tasks = self.config.tasks.experts
        if not 1 <= abs(value) <= len(tasks):
            raise ConfigError(
                f"there are {len(tasks)} experts, so {value} cannot be taken", "Give 1 or more, but not above."
            )
        return list(tasks[:value] if value > 0 else tasks[value:])

    def _other(self, value: Any) -> Entry:
        """Another candidate: one of the configuration by name, any other name, or a mapping."""
        if isinstance(value, str):
            return self.entries.get(value, value)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{value!r} is no candidate", "Give a name, or a mapping as in combine.candidates.")
        return parse_candidate(value)

    def _settings(self, entry: Entry) -> CandidateSettings:
        """A candidate in its long form, so that settings of it can be changed."""
        if not isinstance(entry, str):
            return entry
        rank = self.config.combine.rank or self.config.lora.rank
        special: dict[str, dict[str, Any]] = {
            "compressed": {"method": "svd", "options": {"rank": rank}},
            "unseeded": {"method": "average", "of": "unseeded"},
        }
        if entry in special:
            return CandidateSettings.model_validate({"name": entry, **special[entry]})
        if entry in METHODS:
            return CandidateSettings(name=entry, method=entry)
        if entry in ROUTER_KINDS:
            return CandidateSettings.model_validate({"name": entry, "router": entry})
        raise ConfigError(f"candidate '{entry}' has no settings that could be changed", "Change another part.")

    def _changed(self, settings: CandidateSettings, changes: Mapping[str, Any]) -> CandidateSettings:
        """Another method keeps those options of the old one that it has, too."""
        values = settings.model_dump(exclude_defaults=True)
        for part, value in changes.items():
            if not part.startswith(OPTIONS):
                values[part] = value
        method = values.get("method")
        if method is not None and method in METHODS:
            kept = METHODS[method].options.model_fields
            values["options"] = {key: value for key, value in settings.options.items() if key in kept}
        for part, value in changes.items():
            if part.startswith(OPTIONS):
                values.setdefault("options", {})[part.removeprefix(OPTIONS)] = value
        told = [f"{part.rpartition('.')[2]}-{_text(value)}" for part, value in changes.items()]
        values["name"] = _slug(".".join([settings.name, *told]))
        return parse_candidate(values)

    def _variant(self, cell: Cell, changes: list[str], entry: Entry) -> Variant:
        candidates = _needed(entry)
        chosen = f"combine.candidates={_yaml([_plain(candidate) for candidate in candidates])}"
        config = _with(self.config, [*changes, chosen])
        if cell.name != FULL:
            cell = cell.model_copy(update={"changes": (*changes, chosen)})
        found = {candidate.name: candidate for candidate in resolve(config)}
        candidate = found[_name(entry)]
        if candidate.role == "alone" and candidate.of == "tuned":
            raise ConfigError(
                f"candidate '{candidate.name}' is measured on its own tasks only, so it compares with nothing",
                "Use 'experts', or a merge of them.",
            )
        return Variant(cell, config, candidate, entry)


def parse_candidate(values: Mapping[str, Any]) -> CandidateSettings:
    """A candidate of a mapping, with errors that are sentences."""
    whole = parse_config({"tasks": {"experts": ["any"]}, "combine": {"candidates": [dict(values)]}}, source="candidate")
    (entry,) = whole.combine.candidates
    assert isinstance(entry, CandidateSettings)  # a mapping was given
    return entry


def _needed(entry: Entry) -> list[Entry]:
    """The candidate, and what it is computed from where it is no model itself."""
    return ["experts", entry] if entry == "oracle" else [entry]


def _with(config: FederationConfig, changes: Sequence[str]) -> FederationConfig:
    return parse_config(config.model_dump(mode="json"), changes, "the configuration")


def _distinct(plan: Plan, variants: list[Variant]) -> list[Variant]:
    """Refuse cells that are the same thing twice; mark those that are the full method, as one point of a row's curve."""
    full, seen = variants[0], list[Variant]()
    names: dict[str, Entry] = {}
    for variant in variants:
        name = _name(variant.entry)
        if names.setdefault(name, variant.entry) != variant.entry:
            raise ConfigError(
                f"plan '{plan.name}': two candidates are called '{name}'", "Give one of them another name."
            )
        is_full = variant is not full and variant.setting == full.setting and _same(variant, full)
        twins = [one for one in seen if one.setting == variant.setting and _same(one, variant)]
        twin = next((one for one in twins if not is_full or one.cell.row == variant.cell.row), None)
        if twin is not None:
            raise ConfigError(
                f"plan '{plan.name}': '{variant.cell.name}' in row '{variant.cell.row}' is the same as "
                f"'{twin.cell.name}' in row '{twin.cell.row}'",
                "Leave one of them out.",
            )
        if is_full:
            variant = replace(variant, cell=variant.cell.model_copy(update={"is_full": True}))
        seen.append(variant)
    return [_told_apart(variant, seen) for variant in seen]


def _told_apart(variant: Variant, variants: Sequence[Variant]) -> Variant:
    """Rows that pass through the full method may each have a point there: then their names say of which row they are."""
    cell = variant.cell
    if sum(one.cell.name == cell.name for one in variants) == 1:
        return variant
    return replace(variant, cell=cell.model_copy(update={"name": f"{cell.name} ({cell.row})"}))


def _same(one: Variant, other: Variant) -> bool:
    return replace(one.candidate, name="") == replace(other.candidate, name="")


def _name(entry: Entry) -> str:
    return entry if isinstance(entry, str) else entry.name


def _plain(entry: Entry) -> Any:
    return entry if isinstance(entry, str) else entry.model_dump(mode="json", exclude_defaults=True)


def _yaml(value: Any) -> str:
    """A value on one line, as `--set` takes it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(_text, value))
    return (
        {None: "none", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _told(part: str, value: Any) -> str:
    if part == SEED_TASKS and isinstance(value, int):
        return f"first {value}" if value > 0 else f"last {-value}"
    return _text(value)


def _number(value: Any) -> float | None:
    """For curves; text counts where it is a number, as `2e-3` is text to YAML and a number to the configuration."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    with contextlib.suppress(ValueError):
        number = float(value)
        return number if math.isfinite(number) else None
    return None


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
