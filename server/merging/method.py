"""What a method of merging is: a pure function of one module's updates, and what a reader of the table wants to know of it.

    merged = METHODS["ties"].merge(adapters, weights, options)

A method sees one module at a time, so merging from files needs the memory of one module, and merging whole adapters is the
same arithmetic. `Method` does what all methods have in common: weights, modules that some adapters lack, shapes, dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, get_args, get_origin

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from seedbed.common import algebra
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError, ConfigError, nearest


class Options(BaseModel):
    """What a method can be told; each method has a subclass with its own fields, documented beside them."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """One module of all the adapters that have it.

    An adapter without the module is a zero update: it is left out here, while `weights` stay shares of all adapters, so
    they may sum to less than 1.
    """

    name: str
    updates: tuple[LoraFactors, ...]
    """In the order of the adapters; at least one, all of one ``[out, in]``."""
    weights: tuple[float, ...]
    """One for each update; not negative where the method normalizes them."""
    seed: LoraFactors | None = None
    """The update that all experts started from, where it was given."""

    @property
    def terms(self) -> list[tuple[LoraFactors, float]]:
        return list(zip(self.updates, self.weights, strict=True))

    def generator(self, random_seed: int) -> torch.Generator:
        """Random numbers of this module's own, whatever the order in which modules are merged; on the CPU."""
        text = f"{random_seed}:{self.name}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))


MergeFunction = Callable[[Module, Any], LoraFactors]
"""``(module, options) -> update``: inputs unchanged, the same inputs give the same bits. `options` is the row's own kind. The
result may be in float32 or wider; `Method` casts it back to the inputs' dtype."""


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table of methods."""

    name: str
    summary: str
    function: MergeFunction
    source: str
    """Where the method was published."""
    cost: str
    """Operations for one module of N adapters of rank r, R = N r, d = in + out."""
    rank: str
    """Rank of the result."""
    options: type[Options] = Options
    takes_mixed: bool = True
    """Whether ranks, scalings and sets of modules may differ between the adapters."""
    takes_weights: bool = True
    normalizes: bool = True
    """Whether weights are divided by their sum; else they are taken as given, of either sign, 1 each where none are."""
    idempotent: bool = True
    """Whether N identical adapters give the adapter back, where the options leave nothing out (density 1, retention 1)."""
    ordered: bool = False
    """Whether the order of the adapters matters, with default options; to random methods, since they draw in that order."""
    within_inputs: bool = False
    """Whether a rank that is asked for cannot be above what the adapters have together."""
    warning: str = ""
    """What a user must know before they trust the result."""

    @property
    def takes_rank(self) -> bool:
        return "rank" in self.options.model_fields

    @property
    def takes_seed(self) -> bool:
        """Whether options of the method refer to the seed that all experts started from."""
        return "task_scale" in self.options.model_fields

    def parse(self, values: Mapping[str, Any]) -> Options:
        """Validate options by name.

        Raises:
            ConfigError: if one is unknown (with the nearest) or has a wrong value.
        """
        fields = self.options.model_fields
        for key in values:
            if key not in fields:
                hint = nearest(key, fields) if fields else f"'{self.name}' has no options."
                raise ConfigError(f"merge method '{self.name}' has no option '{key}'", hint)
        given = {key: self._given(key, fields[key].annotation, value) for key, value in values.items()}
        try:
            return self.options.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            where = f" option '{first['loc'][0]}'" if first["loc"] else ""
            reason = first["msg"].removeprefix("Value error, ")
            raise ConfigError(
                f"merge method '{self.name}'{where}: {reason} (got {first['input']!r})", "See `seedbed merge --list`."
            ) from None

    def _given(self, key: str, annotation: Any, value: Any) -> Any:
        """A value as it is written: `none` as `option_rows` writes it, and true is no number."""
        kinds = _kinds(annotation)
        if value == "none" and type(None) in kinds:
            return None
        if isinstance(value, bool) and bool not in kinds:
            raise ConfigError(
                f"merge method '{self.name}' option '{key}': expected {_type_text(annotation)}, got {_value_text(value)}",
                "See `seedbed merge --list`.",
            )
        return value

    def merge(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float] | None = None,
        options: Options | None = None,
        seed: Adapter | None = None,
    ) -> Adapter:
        """Merge whole adapters in memory.

        Args:
            adapters: the experts, in order.
            weights: one for each, see `shares`. None weighs all the same.
            options: of the row's own kind; none are the defaults.
            seed: the adapter that all experts started from, where the options refer to it.

        Raises:
            ConfigError: if the weights or the options make no sense.
            AdapterMismatchError: if adapters do not fit together.
        """
        shares = self.shares(weights, len(adapters))
        merged = {}
        for name in sorted({name for adapter in (*adapters, *([seed] if seed else [])) for name in adapter}):
            updates = [adapter.get(name) for adapter in adapters]
            merged[name] = self.merge_module(name, updates, shares, options, seed_update(seed, name, updates))
        return Adapter(merged)

    def shares(self, weights: Sequence[float] | None, count: int) -> list[float]:
        """The weights that the method works with: divided by their sum, or as given where it does not normalize.

        Raises:
            ConfigError: if the method takes none, if there are not `count`, or if they make no sense (all zero, not
                finite, negative for a method that normalizes).
        """
        if weights is not None and not self.takes_weights:
            raise ConfigError(f"merge method '{self.name}' takes no weights", "Leave them out, or use another method.")
        if self.normalizes:
            return algebra.normalized(weights, count)
        # The same refusals, except of a sign: a negative weight takes an update away.
        algebra.normalized(None if weights is None else [abs(weight) for weight in weights], count)
        return [1.0] * count if weights is None else [float(weight) for weight in weights]

    def merge_module(
        self,
        name: str,
        updates: Sequence[LoraFactors | None],
        shares: Sequence[float],
        options: Options | None = None,
        seed: LoraFactors | None = None,
    ) -> LoraFactors:
        """Merge one module.

        Args:
            updates: one for each adapter; None for an adapter that does not have the module, as some adapter or the seed
                must.
            shares: one for each adapter, as `shares` gives them.
            seed: see `seed_update`.
        """
        chosen = options if options is not None else self.options()
        terms = [(update, share) for update, share in zip(updates, shares, strict=True) if update is not None]
        if len(terms) < len(updates) and not self.takes_mixed:
            raise AdapterMismatchError(
                f"module {name} is missing in one of the adapters, which '{self.name}' does not allow", _MIXED
            )
        if not terms and seed is not None:  # only the seed has it: the adapters' updates are zero
            terms = [(_zero_like(seed), sum(shares))]
        present = [update for update, _ in terms]
        algebra.require_same_shape(name, present if seed is None else [*present, seed])
        module = Module(name, tuple(present), tuple(share for _, share in terms), seed)
        return self.function(module, chosen).to(dtype=common_dtype(present))


def option_rows(method: Method) -> list[tuple[str, str, str, str]]:
    """``(name, type, default, meaning)`` of every option of a method, as text for a reader."""
    rows = []
    for name, field in method.options.model_fields.items():
        meaning = " ".join((field.description or "").split())
        rows.append((name, _type_text(field.annotation), _value_text(field.default), meaning))
    return rows


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return () if get_origin(annotation) is Literal else get_args(annotation) or (annotation,)


def _type_text(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if get_args(annotation):
        return " | ".join(_type_text(choice) for choice in get_args(annotation))
    names = {int: "integer", float: "number", bool: "true | false", type(None): "none"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _value_text(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "none"}[value]
        if value is None or value is True or value is False
        else str(value)
    )


def seed_update(seed: Adapter | None, name: str, updates: Sequence[LoraFactors | None]) -> LoraFactors | None:
    """The seed's update of a module: zero where it does not have the module, None where there is no seed at all."""
    if seed is None or name in seed:
        return None if seed is None else seed[name]
    return _zero_like(next(update for update in updates if update is not None))


def _zero_like(update: LoraFactors) -> LoraFactors:
    return LoraFactors(torch.zeros_like(update.A[:1]), torch.zeros_like(update.B[:, :1]), 1.0)


_MIXED = "Use the method 'average', which takes adapters of different ranks, scalings and modules."


def common_dtype(updates: Iterable[LoraFactors]) -> torch.dtype:
    """The dtype of a result: that of the inputs, the wider one where they differ."""
    return reduce(torch.promote_types, (update.A.dtype for update in updates))
