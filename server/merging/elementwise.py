"""Rules that merge entry by entry, as a literal table: how entries are left out × how those that remain are combined.

A rule sees N matrices of one shape, whatever they stand for (dense updates, factors, cores, right singular vectors), and
reads them in slices of rows, so that dense updates are never all in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from seedbed.common.adapter import LoraFactors
from seedbed.common.errors import NonFiniteError

Majority = Literal["total", "frequency"]
_TILE_BYTES = 1 << 20
"""A slice of rows is so large: it then stays in a core's cache while a rule works on it."""
_SAMPLED = 1024
"""So many rows and columns, evenly spread, say roughly where a threshold must be."""
_SPREAD = 0.05
"""A threshold is looked for so far around the sample's quantile: three standard deviations of it."""


class LowRank:
    """``s · B · A``, formed a slice at a time."""

    def __init__(self, update: LoraFactors, dtype: torch.dtype) -> None:
        self.shape = update.shape
        self.dtype = dtype
        self._A = update.A.to(dtype)
        self._B = update.B.to(dtype) * update.scaling

    def rows(self, part: slice) -> Tensor:
        """A slice of rows, as a new tensor."""
        return self._B[part] @ self._A


class Dense:
    """A tensor that is in memory anyway."""

    def __init__(self, values: Float[Tensor, "rows columns"]) -> None:
        self.shape = (values.shape[0], values.shape[1])
        self.dtype = values.dtype
        self._values = values

    def rows(self, part: slice) -> Tensor:
        """A slice of rows, as a new tensor."""
        return self._values[part].clone()


Matrix = LowRank | Dense


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to make one matrix of N."""

    leave_out: Literal["nothing", "small", "random"]
    """`small`: keep the share `density` of the largest magnitude (TIES). `random`: keep each entry with probability `density`
    and divide it by that (DARE, Yu et al., ICML 2024)."""
    combine: Literal["mean", "agreeing", "max_abs"]
    """`mean`: ``Σ w_i x_i``. `agreeing`: elect the sign of greatest mass, then the mean of the entries that have it (TIES,
    Yadav et al., NeurIPS 2023). `max_abs`: the entry of largest magnitude, with its sign (I-LoRA)."""
    density: float = 1.0
    majority_sign: Majority = "total"


def merge_entries(
    matrices: Sequence[Matrix], weights: Sequence[float], rule: Rule, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """Apply a rule to N matrices of one shape.

    Args:
        matrices: at least one.
        weights: shares, one for each. `max_abs` does not look at them.
        rule: what to do.
        generator: on the CPU; drawn from only by `random`, slice by slice and within it matrix by matrix.

    Returns:
        In the dtype of the matrices.
    """
    rows, columns = matrices[0].shape
    cuts = [_cut(matrix, rule.density) for matrix in matrices] if rule.leave_out == "small" else []
    result: Tensor | None = None
    for part in slices(rows, columns * len(matrices), matrices[0].dtype):
        stack = torch.stack([matrix.rows(part) for matrix in matrices])
        if rule.leave_out == "small":
            limits = torch.tensor(cuts, dtype=stack.dtype, device=stack.device)[:, None, None]
            stack.mul_(stack.abs() >= limits)
        elif rule.leave_out == "random":
            drop_(stack, rule.density, generator)
        merged = _combined(stack, stack.new_tensor(weights)[:, None, None], rule)
        result = stack.new_empty(rows, columns) if result is None else result
        result[part] = merged
    assert result is not None  # a module has rows
    return result


def slices(rows: int, columns: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of rows of about a megabyte; `columns` are those of all matrices that are worked on together."""
    height = max(1, _TILE_BYTES // (columns * dtype.itemsize))
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def drop_(stack: Tensor, density: float, generator: torch.Generator) -> None:
    """Keep each entry with probability `density`, and divide what is kept by it, so that the mean stays."""
    if density == 1:
        return
    if density == 0:
        stack.zero_()
        return
    kept = torch.empty(stack.shape, dtype=torch.bool).bernoulli_(density, generator=generator)
    stack.mul_(kept.to(stack.device)).div_(density)


def keep_larger_(kept: Tensor, other: Tensor, scratch: Tensor) -> None:
    """Overwrite `kept` with whichever entry has the larger magnitude, with its sign; of x and −x the positive one.

    With ``sum = a + b`` and ``difference = a − b`` it is ``(sum ± |difference|) / 2``, the sign that of the sum: no masks and
    no new memory, four times as fast as a choice by comparison, exact to one unit in the last place.
    """
    torch.add(kept, other, out=scratch)
    kept.sub_(other)
    torch.copysign(kept, scratch, out=kept)
    kept.add_(scratch).mul_(0.5)


def _combined(stack: Float[Tensor, "N h w"], weights: Float[Tensor, "N 1 1"], rule: Rule) -> Float[Tensor, "h w"]:
    if rule.combine == "mean":
        return (stack * weights).sum(dim=0)
    if rule.combine == "max_abs":
        kept, scratch = stack[0], torch.empty_like(stack[0])
        for other in stack[1:]:
            keep_larger_(kept, other, scratch)
        return kept
    votes = stack if rule.majority_sign == "total" else stack.sign()
    # A draw among the numbers of adapters elects plus, and rounding must not decide that it is none.
    draw = 0.0 if rule.majority_sign == "total" else -1e-6
    elected = (votes * weights).sum(dim=0).ge(draw).to(stack.dtype).mul_(2).sub_(1)
    agree = (stack * elected).gt_(0).mul_(weights)
    # Where no entry agrees, and none does where all are zero, the sum is zero whatever it is divided by.
    total = agree.sum(dim=0)
    return stack.mul_(agree).sum(dim=0).div_(total.add_(total == 0))


def _cut(matrix: Matrix, density: float) -> float:
    """The magnitude from which on entries are kept: that of entry number ``⌊density · size⌋``. Equal ones are all kept."""
    rows, columns = matrix.shape
    count = int(density * rows * columns + 1e-6)
    if count == 0:
        return float("inf")
    return 0.0 if count == rows * columns else _magnitude_of_rank(matrix, count)


def _magnitude_of_rank(matrix: Matrix, count: int) -> float:
    """The `count`-th largest magnitude, exact: a sample says where it must be, so that few entries are sorted."""
    rows, columns = matrix.shape
    sample = matrix.rows(slice(0, rows, max(1, rows // _SAMPLED)))[:, :: max(1, columns // _SAMPLED)].abs().flatten()
    place = 1 - count / (rows * columns)
    low, high = int((place - _SPREAD) * len(sample)), int((place + _SPREAD) * len(sample))
    lower = float(sample.kthvalue(low).values) if low > 0 else 0.0
    upper = float(sample.kthvalue(high).values) if high < len(sample) else float("inf")
    for bounds in ((lower, upper), (0.0, float("inf"))):
        above, within = _counted(matrix, *bounds)
        rank = count - above
        if 1 <= rank <= len(within):
            return float(within.kthvalue(len(within) - rank + 1).values)
    # Between 0 and infinity there is every number.
    raise NonFiniteError("an update to be merged holds NaN", "Check the adapters that are merged.")


def _counted(matrix: Matrix, lower: float, upper: float) -> tuple[int, Tensor]:
    """How many magnitudes are above `upper`, and all those from `lower` to `upper`."""
    above, within = 0, []
    for part in slices(*matrix.shape, matrix.dtype):
        magnitudes = matrix.rows(part).abs_()
        above += int((magnitudes > upper).sum())
        within.append(magnitudes[(magnitudes >= lower) & (magnitudes <= upper)])
    return above, torch.cat(within)
