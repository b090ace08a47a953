"""What a merge will do, settled before anything is read: method, options, weights, base model, modules and their order.

    plan = plan_merge(inputs, "ties", options={"density": 0.3})
    for name, update in plan.modules(plan.names): ...

Modules are merged one at a time: while one is merged and written, the next is read, and files are hashed behind the
reading, each by a thread. Memory is that of two modules of all inputs, whatever the size of the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.adapter_writer import file_order
from seedbed.common.errors import AdapterMismatchError, ConfigError, nearest
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import AdapterFile, require_base
from seedbed.server.merging import Method, Options, method_named
from seedbed.server.merging.method import seed_update

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
_CUT_TO_FIT = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Methods whose result is dense, and cut only so that it is an adapter."""


@dataclass(frozen=True)
class MergePlan:
    """A merge that is about to happen; see `plan_merge`."""

    method: Method
    options: Options
    files: tuple[AdapterFile, ...]
    weights: tuple[float, ...]
    """Summing to 1 where the method normalizes them."""
    seed: AdapterFile | None
    """Where the options refer to it."""
    base: BaseIdentity
    dtype: torch.dtype | None
    """Of the result, if not that of the inputs."""

    @property
    def names(self) -> list[str]:
        """All modules, in the order of the result's file."""
        names = {name for file in self._opened for name in file.names}
        return file_order({name: self.dtype_of(name) for name in names})

    def dtype_of(self, name: str) -> torch.dtype:
        """Of the module in the result."""
        return self.dtype or reduce(torch.promote_types, (file.dtype(name) for file in self.holders(name)))

    @property
    def _opened(self) -> list[AdapterFile]:
        """All adapters, and the seed last if it takes part."""
        return [*self.files, *([self.seed] if self.seed else [])]

    def holders(self, name: str) -> list[AdapterFile]:
        """The adapters that have a module, or the seed where it alone has it."""
        found = [file for file in self.files if name in file.names]
        return found or [file for file in self._opened if name in file.names]

    def modules(self, names: Sequence[str]) -> Iterator[tuple[str, LoraFactors]]:
        """Merge these modules, one after the other.

        Raises:
            AdapterError: if an input is damaged or does not suit the method.
            ConfigError: if an option needs a seed and there is none.
        """
        opened = self._opened
        later = deque(names[1:])
        with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "sha256") as hasher:
            reading = reader.submit(self._read, names[0]) if names else None
            behind: deque[Future[None]] = deque()
            for name in names:
                assert reading is not None
                inputs = reading.result()
                if later:
                    reading = reader.submit(self._read, later.popleft())
                if later:
                    _prefetch(opened, later[0])
                merged = self._merged(name, *inputs)
                del inputs  # not held while the result is written
                yield name, merged
                del merged
                behind.append(hasher.submit(_hash_behind, opened, name))
                if len(behind) > 2:
                    behind.popleft().result()
            for hashing in behind:
                hashing.result()

    def digests(self) -> tuple[str, ...]:
        """Of the inputs, and of the seed last if there is one; verifies what has not been verified.

        Raises:
            AdapterMismatchError: if an input's tensors are not those that its manifest vouches for.
        """
        return tuple(file.manifest.digest for file in self._opened)

    def settings(self) -> dict[str, Any]:
        """What is written into the result's manifest."""
        found: dict[str, Any] = {
            "method": self.method.name,
            "weights": list(self.weights),
            "options": self.options.model_dump(mode="json"),
        }
        if self.dtype is not None:
            found["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.seed is not None:
            found["seed"] = self.seed.manifest.digest
        return found

    def base_path(self) -> str:
        """What PEFT shall load as the base: as it stands in the first input that says it."""
        stated = (str(file.config.get("base_model_name_or_path") or "") for file in self.files)
        return next((path for path in stated if path), self.base.name)

    def task_type(self) -> str | None:
        """PEFT's name of what the inputs do: as it stands in the first that says it."""
        return next((file.task_type for file in self.files if file.task_type), None)

    def notes(self) -> list[str]:
        """What a user must know of the result, in sentences."""
        notes = [self.method.warning] if self.method.warning else []
        names = set(self.names)
        lacking = [(file, sorted(names - set(file.names))) for file in self.files if names - set(file.names)]
        if lacking:
            told = [f"{file.directory.name} lacks {_briefly(missing)} of {len(names)}" for file, missing in lacking[:3]]
            more = f", and {len(lacking) - 3} more adapters lack some" if len(lacking) > 3 else ""
            notes.append(f"Modules that an adapter lacks are counted as zero: {'; '.join(told)}{more}.")
        return notes

    def _read(self, name: str) -> tuple[list[LoraFactors | None], LoraFactors | None]:
        """One module's updates, and the seed's."""
        # Widened before the arithmetic where the result shall be wider, so that it is rounded once.
        widened = torch.float32 if self.dtype == torch.float32 else None
        updates = [_read(file, name, widened) if name in file.names else None for file in self.files]
        if self.seed is None:
            return updates, None
        held = Adapter({name: self.seed.factors(name)} if name in self.seed.names else {})
        return updates, seed_update(held, name, updates)

    def _merged(self, name: str, updates: Sequence[LoraFactors | None], seed: LoraFactors | None) -> LoraFactors:
        merged = self.method.merge_module(name, updates, self.weights, self.options, seed)
        return merged.to(dtype=self.dtype)


def plan_merge(
    inputs: Sequence[Path],
    method: str,
    *,
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    seed: Path | None = None,
    dtype: str | None = None,
    exact: bool = False,
) -> MergePlan:
    """Check everything that can be checked before tensors are read; arguments are those of `merge_directories`.

    Args:
        exact: a result that would be cut only to be an adapter is not cut, unless a rank is asked for. Where the cut is
            the method (`svd`, `iterative`), it is made.

    Raises:
        ConfigError: if method, rank, options, weights or dtype make no sense.
        AdapterError: if an input is malformed or does not fit the others.
    """
    row = method_named(method)
    shares = row.shares(weights, len(inputs))
    target = _torch_dtype(dtype)
    row.parse({**(options or {}), **({"rank": 1} if rank is not None and row.takes_rank else {})})
    files = tuple(AdapterFile(path, verify_later=True) for path in inputs)
    start = AdapterFile(seed, verify_later=True) if seed is not None else None
    opened = (*files, *([start] if start else []))
    base = common_base(opened)
    require_same_shapes(opened)
    if exact and rank is None and row.name in _CUT_TO_FIT and "rank" not in (options or {}):
        rank = max(min(file.shape(name)) for file in opened for name in file.names)
    chosen = _options(row, rank, options or {}, opened)
    return MergePlan(row, chosen, files, tuple(shares), _needed_seed(row, chosen, start), base, target)


def common_base(files: Sequence[AdapterFile]) -> BaseIdentity:
    """The base model of all, as the input says it that knows it best.

    Raises:
        AdapterMismatchError: if there are several.
    """
    best = max((file.unverified.base for file in files), key=lambda base: (bool(base.digest), bool(base.name)))
    for file in files:
        require_base(file.unverified, best, str(file.directory))
    return best


def require_same_shapes(files: Sequence[AdapterFile]) -> None:
    """Refuse files of which two have a module in different shapes.

    Raises:
        AdapterMismatchError: naming the module and both files.
    """
    first: dict[str, AdapterFile] = {}
    for file in files:
        for name in file.names:
            other = first.setdefault(name, file)
            if file.shape(name) != other.shape(name):
                raise AdapterMismatchError(
                    f"module {name}: expected shape {list(other.shape(name))} as in {other.directory}, "
                    f"got {list(file.shape(name))} in {file.directory}",
                    "Merge adapters of one base model.",
                )


def _options(row: Method, rank: int | None, values: Mapping[str, Any], files: Sequence[AdapterFile]) -> Options:
    if rank is not None and not row.takes_rank:
        raise ConfigError(
            f"method '{row.name}' does not take a rank: it gives rank {row.rank}", "Use the method 'svd'."
        )
    if rank is not None and "rank" in values:
        raise ConfigError("the rank is given twice, as --rank and as --opt rank", "Give it once.")
    options = row.parse({**values, **({"rank": rank} if rank is not None else {})})
    given = getattr(options, "rank", None)
    if given is not None:
        largest = max(_largest_rank(row, name, files) for name in {name for file in files for name in file.names})
        if given > largest:
            reason = "which is what the inputs have together" if row.within_inputs else "as modules have"
            raise ConfigError(
                f"expected a rank from 1 to {largest}, {reason}, got {given}", "Use 'average' to keep everything."
            )
    return options


def _largest_rank(row: Method, name: str, files: Sequence[AdapterFile]) -> int:
    holders = [file for file in files if name in file.names]
    full = min(holders[0].shape(name))
    return min(sum(file.rank(name) for file in holders), full) if row.within_inputs else full


def _needed_seed(row: Method, options: Options, seed: AdapterFile | None) -> AdapterFile | None:
    """The seed if the options refer to it: in a plain mean it cancels."""
    if seed is not None and not row.takes_seed:
        raise ConfigError(f"merge method '{row.name}' uses no seed", "Leave it out, or use 'average' or 'svd'.")
    values = options.model_dump()
    refers = values.get("task_scale", 1.0) != 1.0 or values.get("include_seed", False)
    if refers and seed is None:
        what = "include_seed" if values.get("include_seed") else f"task_scale {values['task_scale']:g}"
        raise ConfigError(f"{what} needs the seed adapter", "Give it with --seed, or leave this option out.")
    return seed if refers else None


def _torch_dtype(name: str | None) -> torch.dtype | None:
    if name is None or name == "auto":
        return None
    if name not in DTYPES:
        raise ConfigError(f"there is no dtype '{name}' to write", nearest(name, DTYPES))
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _read(file: AdapterFile, name: str, at_least: torch.dtype | None) -> LoraFactors:
    factors = file.factors(name)
    return factors if at_least is None else factors.to(dtype=torch.promote_types(factors.A.dtype, at_least))


def _prefetch(files: Sequence[AdapterFile], name: str) -> None:
    for file in files:
        if name in file.names:
            file.prefetch(name)


def _hash_behind(files: Sequence[AdapterFile], name: str) -> None:
    for file in files:
        if name in file.names:
            file.hash_behind(name)


def _briefly(modules: Sequence[str]) -> str:
    """Such as ``6 modules (model.layers.0.mlp.down_proj, …)``."""
    count = f"{len(modules)} module{'s' if len(modules) > 1 else ''}"
    return f"{count} ({modules[0]}{', …' if len(modules) > 1 else ''})"
