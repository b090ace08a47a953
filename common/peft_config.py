"""What PEFT's ``adapter_config.json`` means for plain LoRA: ranks and scalings of modules, and what cannot be read as
such.

Matching of `rank_pattern` and `alpha_pattern` is PEFT's own: a pattern is a regular expression for the end of the
module's name, and the first that matches decides.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from seedbed.common.adapter import Adapter
from seedbed.common.errors import AdapterFormatError
from seedbed.common.patterns import require_quick

_PLAIN = "Seedbed reads plain LoRA of linear layers; save the adapter without this, or convert it to LoRA first."
_INIT = "Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."

# These options change what the adapter computes beyond s · B · A, or the frozen weights themselves.
_REFUSED_IF_SET: Mapping[str, str] = {
    "use_dora": "is a DoRA adapter",
    "use_qalora": "is a QALoRA adapter",
    "use_bdlora": "has block-diagonal factors",
    "lora_bias": "has biases in its factors",
    "modules_to_save": "replaces whole modules of the base model",
    "trainable_token_indices": "changes token embeddings",
    "target_parameters": "adapts bare parameters",
    "layer_replication": "replicates layers of the base model",
    "alora_invocation_tokens": "is an activated LoRA",
    "arrow_config": "is an Arrow router",
    "kasa_config": "is a KaSA adapter",
    "monteclora_config": "is a MonteCLoRA adapter",
}
CAUSAL = "CAUSAL_LM"
_WEIGHT_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The part of ``adapter_config.json`` that decides what an adapter computes.

    `alpha` is PEFT's `lora_alpha`; patterns are compiled, in their order; `costly` of them are not plain names.
    """

    base_name: str
    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: tuple[tuple[re.Pattern[str], float], ...] = ()
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...] = ()
    costly: int = 0

    def rank_of(self, module: str) -> int:
        return int(_first_match(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA (Kalajdzievski, arXiv 2312.03732)."""
        rank, alpha = self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def parse_peft_config(values: Mapping[str, Any], source: str) -> PeftConfig:
    """Validate the contents of an ``adapter_config.json``.

    Raises:
        AdapterFormatError: if it is not plain LoRA, or a field is missing or of the wrong kind.
    """
    refuse_other_than_lora(values, source)
    ranks, costly_ranks = _patterns(values, "rank_pattern", source, lambda value: value >= 1 and value == int(value))
    alphas, costly_alphas = _patterns(values, "alpha_pattern", source, math.isfinite)
    return PeftConfig(
        base_name=str(values.get("base_model_name_or_path") or ""),
        rank=int(_number(values, "r", source, lambda value: value >= 1 and value == int(value))),
        alpha=_number(values, "lora_alpha", source, math.isfinite),
        rslora=bool(values.get("use_rslora")),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        costly=costly_ranks + costly_alphas,
    )


def refuse_other_than_lora(values: Mapping[str, Any], source: str) -> None:
    """Refuse every option under which an adapter is more than ``s · B · A`` on linear layers."""
    kind = values.get("peft_type")
    if str(kind).upper() != "LORA":
        raise AdapterFormatError(f"{source}: expected peft_type LORA, got {kind}", _PLAIN)
    for option, meaning in _REFUSED_IF_SET.items():
        if values.get(option):
            raise AdapterFormatError(f"{source}: the adapter {meaning} ({option} is set)", _PLAIN)
    bias = values.get("bias", "none")
    if bias != "none":
        raise AdapterFormatError(f"{source}: expected bias none, got {bias}", _PLAIN)
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_WEIGHT_CHANGING_INITS):
        raise AdapterFormatError(f"{source}: initialization {init} changes the base model's weights", _INIT)


def make_peft_config(adapter: Adapter, base_name: str, task_type: str | None = CAUSAL) -> dict[str, Any]:
    """The ``adapter_config.json`` under which PEFT computes exactly this adapter.

    The most frequent rank and alpha are the defaults, other modules have patterns; each alpha is ``scaling · rank``.
    `task_type` is PEFT's, and decides which of its model classes loads the adapter; none is a plain module.
    """
    ranks = {name: factors.rank for name, factors in adapter.items()}
    alphas = {name: _simple(factors.scaling * factors.rank) for name, factors in adapter.items()}
    config = _config(ranks, alphas, base_name, lambda name: name) | {"task_type": task_type}
    parsed = parse_peft_config(config, "adapter_config.json")
    if any(not _same(parsed, name, adapter) for name in adapter):
        # One module's name is the end of another's: anchor the patterns.
        config |= _config(ranks, alphas, base_name, lambda name: f"^{re.escape(name)}")
    return config


def _config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], base_name: str, pattern: Callable[[str], str]
) -> dict[str, Any]:
    rank, alpha = _most_frequent(ranks.values()), _most_frequent(alphas.values())
    return {
        "alpha_pattern": {pattern(name): value for name, value in alphas.items() if value != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {pattern(name): value for name, value in ranks.items() if value != rank},
        "revision": None,
        "target_modules": sorted(ranks),
        "use_dora": False,
        "use_rslora": False,
    }


def _same(config: PeftConfig, name: str, adapter: Adapter) -> bool:
    factors = adapter[name]
    return config.rank_of(name) == factors.rank and math.isclose(
        config.scaling_of(name), factors.scaling, rel_tol=1e-12, abs_tol=0
    )


def _most_frequent(values: Any) -> Any:
    """The commonest value; the smallest of several, so that equal adapters give equal bytes."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _simple(value: float) -> float:
    return int(value) if value == int(value) else value


def _first_match(patterns: tuple[tuple[re.Pattern[str], float], ...], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _is_number(value: Any, valid: Callable[[float], bool]) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and valid(value)


def _number(values: Mapping[str, Any], key: str, source: str, valid: Callable[[float], bool]) -> float:
    value = values.get(key, 8)  # PEFT's own default of both r and lora_alpha
    if not _is_number(value, valid):
        raise AdapterFormatError(
            f"{source}: {key} is {value!r}, which makes no sense", "Write the adapter again with PEFT."
        )
    return float(value)


def _patterns(
    values: Mapping[str, Any], key: str, source: str, valid: Callable[[float], bool]
) -> tuple[tuple[tuple[re.Pattern[str], float], ...], int]:
    """Compiled, and how many of them are not plain names."""
    table = values.get(key) or {}
    if not isinstance(table, Mapping):
        raise AdapterFormatError(f"{source}: {key} is not a mapping", "Write the adapter again with PEFT.")
    compiled, costly = [], 0
    for text, value in table.items():
        try:
            costly += not require_quick(text)
            pattern = re.compile(rf"(.*\.)?({text})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterFormatError(
                f"{source}: {key} holds {text!r}, which is not matched: {error}",
                "Name the modules one by one, or with fewer repeats and alternatives.",
            ) from None
        if not _is_number(value, valid):
            raise AdapterFormatError(f"{source}: {key} gives {value!r} for {text}, which makes no sense")
        compiled.append((pattern, float(value)))
    return tuple(compiled), costly
