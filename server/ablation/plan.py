"""Plans of ablations: read from YAML, checked key by key, kept in their run directories; what a plan comes to is in `cells`.

name: my-question
about: Does the KL term pay?
config: embedded                        # preset or file
set: [training.steps=50]                # on top of it
full: iterative_tuned                   # the candidate that is the full method
rows:
  - {part: kl_loss, action: remove, metrics: [task_performance, generalization_performance]}
  - {part: [kl_loss, norm_loss], action: remove, label: both terms}
  - {part: options.retention, action: replace, with: [0.6, 1.0]}
  - {part: [merge_rule, of], action: replace, with: [{merge_rule: ties, of: experts}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from seedbed.common.config_file import preset_names
from seedbed.common.errors import ConfigError, ResumeError, nearest
from seedbed.common.files import atomic_write
from seedbed.server.ablation.parts import canonical
from seedbed.server.ablation.values import Metric, Plan, Row

_KEYS = ("name", "about", "config", "set", "full", "rows")
_ROW_KEYS = ("label", "part", "action", "with", "metrics")
METRICS: tuple[str, ...] = get_args(Metric)
PLAN = "plan.json"
"""In a run directory: the plan, complete."""


def plan_names() -> list[str]:
    """Names of the plans that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("seedbed.server.ablation").joinpath("plans").iterdir()
        if entry.name.endswith(".yaml")
    )


def load_plan(source: str, changes: Sequence[str] = (), config: str | None = None) -> Plan:
    """Read a shipped plan or a file.

    Args:
        source: name of a shipped plan, or path of a YAML file; a configuration file that it names may lie beside it.
        changes: `key.path=value` on top of the plan's own.
        config: preset or file in the place of the plan's.

    Raises:
        ConfigError: if there is no such plan, or it makes no sense.
    """
    beside: Path | None = None
    if source in plan_names():
        text = resources.files("seedbed.server.ablation").joinpath("plans", f"{source}.yaml").read_text("utf-8")
    elif Path(source).is_file():
        beside = Path(source).parent
        try:
            text = Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"{source} is not UTF-8 text", "Name a YAML file.") from None
    else:
        raise ConfigError(f"there is no plan and no file named '{source}'", nearest(source, plan_names()))
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise ConfigError(f"{source} is not valid YAML, line {line}", "Mend that line.") from None
    plan = parse_plan(values, source)
    if config is not None:
        plan = plan.model_copy(update={"config": config})
    elif beside is not None and plan.config not in preset_names() and (beside / plan.config).is_file():
        plan = plan.model_copy(update={"config": str(beside / plan.config)})
    return plan.model_copy(update={"changes": (*plan.changes, *changes)})


def parse_plan(values: Any, source: str = "plan") -> Plan:
    """Check a mapping and make a plan of it; see `load_plan`."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source} does not hold a mapping", "A plan has the keys name, config, full and rows.")
    _known(values, _KEYS, source)
    for key in ("name", "config", "full", "rows"):
        if not values.get(key):
            raise ConfigError(f"{source}: '{key}' is missing", "A plan has the keys name, config, full and rows.")
    if not isinstance(values["rows"], list):
        raise ConfigError(f"{source}: 'rows' is not a list", "Each row has a part and an action.")
    changes = values.get("set") or []
    if not isinstance(changes, list) or not all(isinstance(change, str) and "=" in change for change in changes):
        raise ConfigError(f"{source}: 'set' is not a list of key.path=value", "Example: set: [training.steps=50]")
    rows = tuple(_row(row, f"{source}, row {index}") for index, row in enumerate(values["rows"], start=1))
    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{source}: two rows are called '{label}'", "Give one of them another label.")
    return Plan(
        name=_text(values, "name", source),
        about=_text(values, "about", source),
        config=_text(values, "config", source),
        changes=tuple(changes),
        full=_text(values, "full", source),
        rows=rows,
    )


def _row(values: Any, where: str) -> Row:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is not a mapping", "A row has a part and an action.")
    _known(values, _ROW_KEYS, where)
    names = values.get("part")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: 'part' is not the name of a part, nor a list of names", "Example: part: seed.mode")
    try:
        parts = tuple(canonical(name) for name in names)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", error.hint) from None
    if len(set(parts)) < len(parts):
        raise ConfigError(f"{where} names the part '{parts[0]}' twice", "Name each part once.")
    action = values.get("action")
    if action not in ("remove", "replace"):
        raise ConfigError(f"{where}: action is {action!r}, expected 'remove' or 'replace'", "Set one of them.")
    replaced = _replacements(values.get("with"), names, parts, action, where)
    return Row(
        label=_text(values, "label", where) or " + ".join(names),
        part=parts,
        action=action,
        values=replaced,
        metrics=_metrics(values.get("metrics"), where),
    )


def _replacements(values: Any, names: Sequence[str], parts: Sequence[str], action: str, where: str) -> tuple[Any, ...]:
    """One value for each cell; for a row of several parts a tuple of values, in the order of the parts."""
    if action == "remove":
        if values is not None:
            raise ConfigError(f"{where}: 'with' does not go with the action 'remove'", "Set action: replace.")
        return ()
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: 'with' is not a list of values", "Example: with: [0.6, 0.8]")
    if len(parts) == 1:
        return tuple(values)
    return tuple(_several(value, names, parts, where) for value in values)


def _several(value: Any, names: Sequence[str], parts: Sequence[str], where: str) -> tuple[Any, ...]:
    if isinstance(value, Mapping):
        by_path = {canonical(str(key)): entry for key, entry in value.items()}
        if set(by_path) == set(parts):
            return tuple(by_path[part] for part in parts)
    elif isinstance(value, list) and len(value) == len(parts):
        return tuple(value)
    raise ConfigError(
        f"{where}: {value!r} does not give one value for each of {', '.join(names)}",
        f"Example: with: [{{{', '.join(f'{name}: …' for name in names)}}}]",
    )


def _metrics(values: Any, where: str) -> tuple[Metric, ...]:
    if values is None:
        return ("zero_shot_accuracy",)
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: 'metrics' is not a list", f"Choose among: {', '.join(METRICS)}.")
    for value in values:
        if value not in METRICS:
            raise ConfigError(f"{where}: there is no metric '{value}'", nearest(str(value), METRICS))
    return tuple(dict.fromkeys(values))


def _known(values: Mapping[Any, Any], keys: Sequence[str], where: str) -> None:
    for key in values:
        if key not in keys:
            raise ConfigError(f"{where}: unknown key '{key}'", nearest(str(key), keys))


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    value = values.get(key, "")
    if not isinstance(value, str):
        raise ConfigError(f"{where}: '{key}' is not text (got {value!r})", "Quote it.")
    return " ".join(value.split())


def kept_plan(root: Path) -> Plan | None:
    """The plan that a run directory was made by last; none where there is none.

    Raises:
        ResumeError: if it cannot be read.
    """
    path = root / PLAN
    if not path.exists():
        return None
    try:
        return Plan.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise ResumeError(f"{path} cannot be read", "Restore it, or name another --out.") from None


def keep_plan(root: Path, plan: Plan) -> None:
    """Write the plan into a run directory.

    Raises:
        StorageError: if that fails.
    """
    atomic_write(root / PLAN, (plan.model_dump_json(indent=2) + "\n").encode())


def refuse_change(before: Plan, now: Plan, where: str) -> None:
    """A plan that is continued must have the full method that was started; its rows may be others.

    Raises:
        ResumeError: saying what has changed.
    """
    hint = "Continue with the old plan, or start a new run with another --out."
    for setting in (*before.changes, *now.changes):
        if (setting in before.changes) != (setting in now.changes):
            what = "was set" if setting in before.changes else "was not set"
            raise ResumeError(f"the plan has changed since {where} was started: then {setting} {what}", hint)
    for field in ("name", "config", "full", "changes"):
        old, new = getattr(before, field), getattr(now, field)
        if old != new:
            raise ResumeError(
                f"the plan has changed since {where} was started: {field} was {old!r} and is {new!r}", hint
            )
