"""ONE routed linear layer for all routers: two products, however many experts there are.

    z = A x ,  A = [A_1; …; A_N]  [R, in]          R = Σ r_i
    z ← z · p(x), each probability over the columns of its expert
    y ← y + B z ,  B = [s_1 B_1 | … | s_N B_N]  [out, R]

A loop over experts reads x and writes y N times. Here y is written once, in place where no gradient is taken, and
nothing of the size ``[tokens, N, out]`` exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seedbed.common.adapter import LoraFactors
from seedbed.common.algebra import wide
from seedbed.common.routing.gates import Gate, hold, stored

Observer = Callable[[Tensor], None]


class RoutedUpdate(nn.Module):
    """Adds ``Σ_i p_i(x) s_i B_i A_i x`` to a linear layer's output.

    Args:
        factors: of every expert, none where it lacks this module (a zero update, which still takes part in the
            routing); ranks may differ, shapes may not; at least one is there.
        gate: gives ``p [..., N]``.
        dtype: to compute in; none is float32, or float64 if a factor has it.
        trainable_experts: whether A and B are parameters. They then keep their scalings apart, so that an optimizer's
            step means what it means for a plain LoRA.
    """

    A: Tensor
    B: Tensor
    columns: Tensor
    scales: Tensor

    def __init__(
        self,
        factors: Sequence[LoraFactors | None],
        gate: Gate,
        *,
        dtype: torch.dtype | None = None,
        trainable_experts: bool = False,
    ) -> None:
        super().__init__()
        present = [(index, own) for index, own in enumerate(factors) if own is not None]
        dtype = dtype or wide(own for _, own in present)
        self.gate = gate
        self.experts = len(factors)
        self.ranks = tuple(own.rank if own is not None else 0 for own in factors)
        self.scalings = tuple(own.scaling if own is not None else 0.0 for own in factors)
        fold = [1.0 if trainable_experts else own.scaling for _, own in present]
        A = torch.cat([own.A.detach().to(dtype) for _, own in present])
        B = torch.cat([own.B.detach().to(dtype) * s for (_, own), s in zip(present, fold, strict=True)], dim=1)
        hold(self, {"A": A, "B": B}, trainable_experts)
        counts = torch.tensor(self.ranks)
        scales = torch.tensor(self.scalings, dtype=dtype).repeat_interleave(counts)
        hold(self, {"columns": torch.arange(self.experts).repeat_interleave(counts), "scales": scales})
        self._trains = trainable_experts
        self._even = len(set(self.ranks)) == 1
        self.observer: Observer | None = None
        """Told ``p [..., N]`` in every forward pass."""

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """``output + update``; `output` itself where it could be changed in place.

        Args:
            x: input of the linear layer, ``[..., in]``.
            output: what the layer gave, ``[..., out]``.
        """
        x = x.to(self.A.dtype)
        p = self.gate(x)
        if self.observer is not None:
            self.observer(p)
        z = self._weigh(F.linear(x, self.A), p)
        if output.dtype != z.dtype or not output.is_contiguous():
            return output + F.linear(z, self.B).to(output.dtype)
        flat, rows = output.view(-1, output.shape[-1]), z.view(-1, z.shape[-1])
        if torch.is_grad_enabled():
            return torch.addmm(flat, rows, self.B.T).view(output.shape)
        flat.addmm_(rows, self.B.T)
        return output

    def _weigh(self, z: Tensor, p: Tensor) -> Tensor:
        """Each expert's columns of ``z [..., R]`` times its probability."""
        if self._trains:
            z = z * self.scales
        if self._even:
            # A view instead of an index: the probabilities are never written out R wide.
            apart = z.view(*z.shape[:-1], self.experts, self.ranks[0])
            weighted = apart * p.unsqueeze(-1) if torch.is_grad_enabled() else apart.mul_(p.unsqueeze(-1))
            return weighted.view(z.shape)
        wide_p = p.index_select(-1, self.columns)
        return z * wide_p if torch.is_grad_enabled() else z.mul_(wide_p)

    def factors(self) -> list[LoraFactors | None]:
        """The experts, read back in float32 on the CPU; scalings are folded into B unless experts are trained."""
        found: list[LoraFactors | None] = []
        first = 0
        for rank, scaling in zip(self.ranks, self.scalings, strict=True):
            own = slice(first, first + rank)
            found.append(
                LoraFactors(stored(self.A[own]), stored(self.B[:, own]), scaling if self._trains else 1.0)
                if rank
                else None
            )
            first += rank
        return found
