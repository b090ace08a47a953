"""The weighted sums of PEFT: of the updates (`cat`), and of the factors (`linear`); both take the weights as given."""

from __future__ import annotations

import math

from seedbed.common import algebra
from seedbed.common.adapter import LoraFactors
from seedbed.common.errors import AdapterMismatchError
from seedbed.server.merging.average import stack
from seedbed.server.merging.method import Module, Options


def cat(module: Module, options: Options) -> LoraFactors:
    """``dW = Σ w_i dW_i`` by concatenation of the factors: exact, of rank ``Σ r_i``.

    Unlike `average` the weights are not divided by their sum: 1 each is the plain sum (task arithmetic with λ = 1), and a
    negative one takes an update away.

    Source: the `cat` of PEFT's `add_weighted_adapter`; task arithmetic (Ilharco et al., ICLR 2023).
    """
    return stack(module.terms)


def linear(module: Module, options: Options) -> LoraFactors:
    """``B = Σ √|w_i s_i| B_i`` and ``A = Σ ±√|w_i s_i| A_i``, the sign of w_i in A: has cross terms ``B_i A_j``.

    N identical adapters of weight 1/N come out N times too large.

    Source: the `linear` of PEFT's `add_weighted_adapter`.

    Raises:
        AdapterMismatchError: if ranks differ.
    """
    require_one_rank(module, "linear")
    dtype = algebra.wide(module.updates)
    coefficients = [weight * update.scaling for update, weight in module.terms]
    A, B = module.updates[0].A.to(dtype) * 0, module.updates[0].B.to(dtype) * 0
    for update, coefficient in zip(module.updates, coefficients, strict=True):
        root = math.sqrt(abs(coefficient))
        A = A + update.A.to(dtype) * math.copysign(root, coefficient)
        B = B + update.B.to(dtype) * root
    return LoraFactors(A, B, 1.0)


def require_one_rank(module: Module, what: str) -> None:
    """Refuse updates whose factors cannot be combined entry by entry.

    Raises:
        AdapterMismatchError: naming the module and the ranks.
    """
    expected = module.updates[0].rank
    for update in module.updates:
        if update.rank != expected:
            raise AdapterMismatchError(
                f"module {module.name}: '{what}' needs one rank, expected {expected}, got {update.rank}",
                "Use a method or space that takes adapters of different ranks, such as 'average' or space 'dense'.",
            )
