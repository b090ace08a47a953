"""Adapters in fewer bytes for the way to the store: bfloat16 (half) or int8 (a quarter), and what that costs, exactly.

    bfloat16    every entry rounded to 8 bits of mantissa
    int8        every rank's direction, a row of A or a column of B, as integers q in -127 … 127 and one float32 scale:
                a = scale · q with scale = max|a| / 127 (symmetric quantization, round to nearest)

The scales go along the rank, not along the output: a row of B has only r entries, beside which a scale of four bytes would
not be small.

The error is that of the update itself, ``‖s(BA - B'A')‖ / ‖sBA‖`` (Frobenius), and is computed without forming BA:

    BA - B'A'  =  [B - B' | B'] · [A; A - A']

a product of small factors in which nothing large cancels, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.config import Transfer

INT8 = "int8"
"""What a manifest calls the dtype of an adapter in a form that only Seedbed reads."""
_LEVELS = 127


def transfer_of(kind: str, asked: Transfer) -> Transfer:
    """In what the result of a job is handed in: as asked, but a seed, from which everybody trains on, never in int8."""
    return "bfloat16" if kind == "seed" and asked == "int8" else asked


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A matrix in 8 bits with one scale for each row (of A) or column (of B)."""

    values: Int8[Tensor, "rows columns"]
    scales: Tensor
    """``[rows, 1]`` or ``[1, columns]``."""

    def expanded(self) -> Float[Tensor, "rows columns"]:
        return self.values.to(torch.float32) * self.scales


def quantized(matrix: Float[Tensor, "rows columns"], along: Literal["rows", "columns"]) -> Quantized:
    """Each row (or column) as integers and its own scale; one of zeros has scale 0."""
    dim = 1 if along == "rows" else 0
    wide = matrix.to(torch.float32)
    scales = wide.abs().amax(dim=dim, keepdim=True) / _LEVELS
    steps = wide / torch.where(scales > 0, scales, torch.ones_like(scales))
    return Quantized(steps.round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scales)


def compress(adapter: Adapter, transfer: Transfer) -> Adapter:
    """The adapter as a receiver has it: of bfloat16 in that dtype, of int8 expanded to float32 again."""
    if transfer == "float32":
        return adapter.map(lambda factors: factors.to(dtype=torch.float32))
    if transfer == "bfloat16":
        return adapter.map(lambda factors: factors.to(dtype=torch.bfloat16))
    return adapter.map(
        lambda f: LoraFactors(quantized(f.A, "rows").expanded(), quantized(f.B, "columns").expanded(), f.scaling)
    )


@dataclass(frozen=True, slots=True)
class TransferError:
    """What compression changed, relative to the update's Frobenius norm; 0 is exact."""

    total: float
    """Of all modules together."""
    modules: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest of one module."""
        return max(self.modules.values(), default=0.0)


def transfer_error(exact: Adapter, received: Adapter) -> TransferError:
    """The error of every module and of the whole; both adapters have the same modules and shapes."""
    squares = {name: _squares(factors, received[name]) for name, factors in exact.items()}
    lost, whole = (math.fsum(pair[index] for pair in squares.values()) for index in (0, 1))
    return TransferError(_ratio(lost, whole), {name: _ratio(*pair) for name, pair in squares.items()})


def _squares(exact: LoraFactors, received: LoraFactors) -> tuple[float, float]:
    """``‖s(BA - B'A')‖²`` and ``‖sBA‖²``, in float64."""
    A, B = exact.A.double(), exact.B.double()
    # The receiver's scaling counts, too, should it differ.
    near_A, near_B = received.A.double(), received.B.double() * (received.scaling / exact.scaling)
    lost = _square(torch.cat([B - near_B, near_B], dim=1), torch.cat([A, A - near_A], dim=0))
    return exact.scaling**2 * lost, exact.scaling**2 * _square(B, A)


def _square(B: Tensor, A: Tensor) -> float:
    """``‖BA‖² = tr(BᵀB · AAᵀ)``, from two small Gram matrices."""
    return max(0.0, float(((B.T @ B) * (A @ A.T)).sum()))


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole > 0 else 0.0
