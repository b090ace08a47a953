"""The parts of a method that an ablation can take away or change: their names, and what removing each one means.

A part is a path of the configuration (`routing_tuning.kl_weight`), `candidate` (another candidate is measured in place of the
full one), a setting of the full candidate (`method`, `options.retention`, `top_k`, ...), or a short name of one of these.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from seedbed.common.config import CandidateSettings, FederationConfig
from seedbed.common.errors import ConfigError, nearest

CANDIDATE = "candidate"
EXPERTS = "tasks.experts"
SEED_TASKS = "seed.tasks"
OPTIONS = "options."
ALIASES: Mapping[str, str] = {
    "seed_expert": "seed.mode",
    "seed_fraction": "seed.fraction",
    "seed_tasks": SEED_TASKS,
    "kl_loss": "routing_tuning.kl_weight",
    "norm_loss": "routing_tuning.norm_weight",
    "experts": EXPERTS,
    "routing": CANDIDATE,
    "merge_rule": "method",
    "svd_retention": "options.retention",
    "task_scale": "options.task_scale",
    "include_seed": "options.include_seed",
}
"""Short names."""
FIELDS = ("method", "router", "of", "over", "top_k", "temperature", "order")
"""Settings of the full candidate, beside its options."""
_FIXED: Mapping[str, str] = {
    "name": "it names the run and changes nothing",
    "base": "all cells of a plan stand on one base model; make a plan for each",
    "tasks.data": "all cells of a plan read the same data; make a plan for each",
    "tasks.held_out": "all cells are compared on the same zero-shot tasks",
    "tasks.general": "all cells are compared on the same general text",
    "tasks.general_test": "all cells are compared on the same general text",
    "seed.data": "all cells of a plan read the same data; make a plan for each",
    "combine.candidates": "use 'candidate', or a setting of the full candidate",
    "combine.routing.data": "all cells of a plan read the same data; make a plan for each",
    "evaluation": "all cells are measured in the same way",
    "stages.max_norm_ratio": "every cell needs all its experts, so a gate that leaves one out would only make it fail",
    "stages.min_cosine": "every cell needs all its experts, so a gate that leaves one out would only make it fail",
    "stages": "it says when to give up, and changes no result",
    "run": "it says where jobs run; --seeds repeats a plan with other random seeds",
}
_REMOVED: Mapping[str, Any] = {
    "seed.mode": "none",
    "routing_tuning.kl_weight": 0.0,
    "routing_tuning.norm_weight": 0.0,
    "routing_tuning.task_weight": 0.0,
    "combine.routing.load_balance": 0.0,
    "training.weight_decay": 0.0,
    "training.clip_norm": 0.0,
    "training.warmup_steps": 0,
    "lora.dropout": 0.0,
    "temperature": 1.0,
    "top_k": None,
    "order": None,
    "options.task_scale": 1.0,
    "options.retention": 1.0,
    "options.density": 1.0,
}
"""What stands in the place of a part that is removed. Beside these: false for a switch, nothing for a setting that may be
left out."""


def canonical(name: str) -> str:
    """The path that a part's name stands for; whether an option exists is known to the method only.

    Raises:
        ConfigError: if there is no such part (with the nearest ones), or if it must be the same for all cells.
    """
    path = ALIASES.get(name, name)
    for fixed, reason in _FIXED.items():
        if path == fixed or path.startswith(f"{fixed}."):
            raise ConfigError(f"'{name}' cannot be ablated: {reason}", "Choose another part.")
    if path in (CANDIDATE, *FIELDS) or path.startswith(OPTIONS) or path in leaves():
        return path
    sections = [leaf for leaf in leaves() if leaf.startswith(f"{path}.")]
    if sections:
        raise ConfigError(f"'{name}' is a section of several parts", f"Name one or more: {', '.join(sections)}.")
    raise ConfigError(f"there is no part '{name}'", _near(name))


def in_candidate(path: str) -> bool:
    """Whether a part is a setting of the full candidate."""
    return path in FIELDS or path.startswith(OPTIONS)


def removal(path: str) -> Any:
    """What stands in the place of a removed part.

    Raises:
        ConfigError: if removing it has no meaning.
    """
    if path in _REMOVED:
        return _REMOVED[path]
    field = leaves().get(path)
    if field is None or not (field.annotation is bool or _may_be_none(field)):
        hint = "replace it by 'uniform', for instance" if path == CANDIDATE else "replace it by another value"
        raise ConfigError(f"'{path}' cannot be removed: nothing says what is left without it", f"{hint.capitalize()}.")
    return False if field.annotation is bool else None


def removed_option(path: str, field: FieldInfo) -> Any:
    """The same for an option of a merge method."""
    if path in _REMOVED:
        return _REMOVED[path]
    if field.annotation is bool:
        return False
    if _may_be_none(field):
        return None
    raise ConfigError(f"'{path}' cannot be removed: nothing says what is left without it", "Replace it instead.")


def leaves() -> dict[str, FieldInfo]:
    """Every single setting of the configuration, by its path."""
    return dict(_walk(FederationConfig, ""))


def _walk(section: type[BaseModel], prefix: str) -> Iterable[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _walk(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _may_be_none(field: FieldInfo) -> bool:
    union = get_origin(field.annotation) in (Union, types.UnionType)
    return union and type(None) in get_args(field.annotation) and field.default is None


def _near(name: str) -> str:
    """Up to three valid names that are like a wrong one, in whole or in their last word."""
    known = [CANDIDATE, *FIELDS, *ALIASES, *(path for path in leaves() if not _is_fixed(path))]
    last = {path.rpartition(".")[2]: path for path in reversed(known)}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    close += [last[word] for word in difflib.get_close_matches(name.rpartition(".")[2], last, n=2, cutoff=0.75)]
    found = list(dict.fromkeys(close))[:3]
    quoted = " or ".join(f"'{entry}'" for entry in found)
    return f"Did you mean {quoted}?" if found else nearest(name, known)


def _is_fixed(path: str) -> bool:
    return any(path == fixed or path.startswith(f"{fixed}.") for fixed in _FIXED)


assert set(FIELDS) <= set(CandidateSettings.model_fields)
