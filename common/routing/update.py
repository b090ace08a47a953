"""ONE routed linear layer for all routers: two products, however many experts there are.

    [z, g] = x [A; G]ᵀ ,  A = [A_1; …; A_N]  [R, in] ,  G [N, in] the gate's rows          R = Σ r_i
    z ← z · p(g), each probability over the columns of its expert
    y ← y + B z ,  B = [s_1 B_1 | … | s_N B_N]  [out, R]

A loop over experts reads x and writes y N times. Here x is read once and y is written once, in place where no gradient is
taken, and nothing of the size ``[tokens, N, out]`` exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
    """Where experts are trained, ``[R, in]``."""
    stacked: Tensor
    """Where they are frozen, ``[R + N, in]``: A and the gate's rows; of a gate that is trained, a copy."""
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
        present = [own for own in factors if own is not None]
        dtype = dtype or wide(present)
        self.gate = gate
        self.experts = len(factors)
        self.ranks = tuple(own.rank if own is not None else 0 for own in factors)
        self.scalings = tuple(own.scaling if own is not None else 0.0 for own in factors)
        self._trains, self._even = trainable_experts, len(set(self.ranks)) == 1
        A = torch.cat([own.A.detach().to(dtype) for own in present])
        B = torch.cat(
            [own.B.detach().to(dtype) * (1.0 if trainable_experts else own.scaling) for own in present], dim=1
        )
        if trainable_experts:
            hold(self, {"A": A, "B": B}, trainable=True)
        else:
            rows = gate.rows()
            stacked = A if rows is None else torch.cat([A, rows.detach().to(A)])
            hold(self, {"stacked": stacked, "B": B})
        counts = torch.tensor(self.ranks)
        scales = torch.tensor(self.scalings, dtype=dtype).repeat_interleave(counts)
        hold(self, {"columns": torch.arange(self.experts).repeat_interleave(counts), "scales": scales})
        self.observer: Observer | None = None
        """Told ``p [..., N]`` in every forward pass."""

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """``output + update``; `output` itself where it could be changed in place.

        Args:
            x: input of the linear layer, ``[..., in]``.
            output: what the layer gave, ``[..., out]``.
        """
        x = x.to(self.B.dtype)
        p, z = self._route(x)
        if self.observer is not None:
            self.observer(p)
        z = self._weigh(z, p)
        if output.dtype != z.dtype or not output.is_contiguous():
            return output + F.linear(z, self.B).to(output.dtype)
        flat, rows = output.view(-1, output.shape[-1]), z.reshape(-1, z.shape[-1])
        if torch.is_grad_enabled():
            return torch.addmm(flat, rows, self.B.T).view(output.shape)
        flat.addmm_(rows, self.B.T)
        return output

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``p [..., N]`` and ``z = A x [..., R]``, from one product if the gate looks at x."""
        found: list[Tensor] = []

        def project(x: Tensor, rows: Tensor) -> Tensor:
            z, products = self._products(x, rows)
            found.append(z)
            return products

        # The gate is called as a module, with its own parameters: DeepSpeed's ZeRO 3 gathers them just there.
        p = self.gate(x, project)
        return p, found[0] if found else F.linear(x, self.down)

    def _products(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self._trains:
            both = F.linear(x, torch.cat([self.A, rows]))
            return both[..., : -len(rows)], both[..., -len(rows) :]
        if isinstance(rows, nn.Parameter) or rows.requires_grad:
            with torch.no_grad():
                self.stacked[-len(rows) :].copy_(rows)
        found: tuple[Tensor, Tensor] = _Products.apply(x, rows, self.stacked)  # type: ignore[no-untyped-call]
        return found

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

    @property
    def down(self) -> Tensor:
        """A of all experts, ``[R, in]``."""
        return self.A if self._trains else self.stacked[: len(self.columns)]

    def factors(self) -> list[LoraFactors | None]:
        """The experts, read back in float32 on the CPU; scalings are folded into B unless experts are trained."""
        found: list[LoraFactors | None] = []
        A, first = self.down, 0
        for rank, scaling in zip(self.ranks, self.scalings, strict=True):
            own = slice(first, first + rank)
            found.append(
                LoraFactors(stored(A[own]), stored(self.B[:, own]), scaling if self._trains else 1.0) if rank else None
            )
            first += rank
        return found


class _Products(torch.autograd.Function):
    """``x · stackedᵀ``, cut before its last rows, which are a copy of `rows` and alone may take a gradient.

    Autograd by itself would need a second product with x, whose gradient is again as large as x, or a gradient for all rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, stacked: Tensor) -> tuple[Tensor, Tensor]:
        # Not saved the usual way: every forward pass copies the same rows in again, until the optimizer's next step.
        ctx.stacked = stacked
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(x)
        both = F.linear(x, stacked)
        return both[..., : -len(rows)], both[..., -len(rows) :]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, by_z: Tensor, by_products: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        by_x = torch.cat([by_z, by_products], dim=-1) @ ctx.stacked if ctx.needs_input_grad[0] else None
        by_rows = None
        if ctx.needs_input_grad[1]:
            (x,) = ctx.saved_tensors
            by_rows = by_products.reshape(-1, by_products.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return by_x, by_rows, None
