"""What training makes small: the cross-entropy of the tokens that an example asks for, and what routing tuning adds.

    L  =  w_task · LM(task)  +  w_kl · KL(p_base ‖ p_adapted; general)  +  w_norm · mean ‖s B A x‖₂ (general)

The last two keep an adapter silent off its task: I-LoRA's objective (OpenReview CRkoMdDlFh, 2024). The direction of the
divergence, the weights and the share of general text are not published; they are our choices, named in
`RoutingTuningSettings`. Every term is a sum over tokens divided by the number of those tokens in the whole optimizer step, so
that the loss does not depend on how the step is cut into passes and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from seedbed.client.data import IGNORED, Batch
from seedbed.client.trainee import Trainee
from seedbed.common.config import RoutingTuningSettings

TERMS = ("task", "kl", "norm", "balance")
"""Names of the terms, in the order of their reports."""
_SAME = {torch.float32: 1e-3}
_NEARLY_SAME = 0.25
"""Difference of one label's loss that rounding explains, in float32 and in the half precisions."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of an optimizer step: examples of the task, or general text."""

    batch: Batch
    general: bool = False

    def to(self, device: torch.device) -> Pass:
        return Pass(self.batch.to(device), self.general)


@dataclass(frozen=True, slots=True)
class Totals:
    """Numbers of tokens that are predicted in a whole optimizer step, over all passes and ranks."""

    task: int
    general: int = 0


class Objective:
    """The terms of the loss and their weights.

    Args:
        trainee: what is trained; it knows how to be silenced, and its auxiliary loss.
        tuning: the weights of routing tuning; none is the plain cross-entropy.
        balance: weight of the trainee's auxiliary (load-balancing) loss.
    """

    def __init__(self, trainee: Trainee, tuning: RoutingTuningSettings | None = None, balance: float = 0.0) -> None:
        self.trainee = trainee
        self.tuned = tuning is not None and tuning.needs_general_text
        """Whether a step has passes over general text."""
        self.weights = {
            "task": 1.0 if tuning is None else tuning.task_weight,
            "kl": 0.0 if tuning is None else tuning.kl_weight,
            "norm": 0.0 if tuning is None else tuning.norm_weight,
            "balance": balance,
        }

    def terms(self, model: nn.Module, one: Pass, totals: Totals) -> dict[str, Tensor]:
        """What one pass adds to each term of the step, unweighted.

        Args:
            model: what is called: the trainee's model, or an engine around it.
        """
        head = self.trainee.head
        if one.general:
            return self._general(model, head, one.batch, totals.general)
        losses = label_losses(model, head, one.batch)
        terms = {"task": losses.sum() / totals.task}
        if self.weights["balance"]:
            # The balance within each pass, which counts by its share of the step's labels: unlike the other terms it does
            # depend on how a step is cut.
            terms["balance"] = self.trainee.auxiliary() * (len(losses) / totals.task)
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum; a term of weight 0 takes no part, not even as 0 · NaN."""
        weighted = [self.weights[name] * value for name, value in terms.items() if self.weights[name]]
        return torch.stack(weighted).sum() if weighted else torch.stack(list(terms.values())).sum() * 0.0

    def _general(self, model: nn.Module, head: nn.Module | None, batch: Batch, tokens: int) -> dict[str, Tensor]:
        terms = {}
        base = self._base(model, head, batch) if self.weights["kl"] else None
        with self.trainee.update_norms(batch.labels != IGNORED) as norms:
            logits = label_logits(model, head, batch)
        if base is not None:
            terms["kl"] = divergence(base, logits).sum() / tokens
        if self.weights["norm"]:
            terms["norm"] = torch.stack([norm.sum() for norm in norms]).mean() / tokens
        return terms

    @torch.no_grad()
    def _base(self, model: nn.Module, head: nn.Module | None, batch: Batch) -> Tensor:
        """Logits of the base model: the same weights with the adapter silenced, so nothing is in memory twice."""
        model.eval()
        try:
            with self.trainee.silenced():
                return label_logits(model, head, batch)
        finally:
            model.train()


def divergence(base: Float[Tensor, "tokens vocab"], adapted: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """``KL(p_base ‖ p_adapted)`` of every token, in nats and float32, from logits."""
    p, q = base.float().log_softmax(-1), adapted.float().log_softmax(-1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def label_losses(model: nn.Module, head: nn.Module | None, batch: Batch) -> Float[Tensor, " labels"]:
    """Cross-entropy of every label of a batch, in float32, row after row; see `label_logits`."""
    labels = batch.labels[batch.labels != IGNORED]
    return F.cross_entropy(label_logits(model, head, batch).float(), labels, reduction="none")


def label_logits(model: nn.Module, head: nn.Module | None, batch: Batch) -> Float[Tensor, "labels vocab"]:
    """Logits where there is a label, row after row.

    Args:
        model: a causal LM, bare or wrapped.
        head: its output projection; with it, logits are computed only where there is a label. A hook on the head rather
            than a product of our own, so that scaling and soft-capping of logits stay the model's business.
    """
    wanted = batch.labels != IGNORED
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if head is None:
        chosen: Tensor = model(**inputs).logits[wanted]
        return chosen
    handle = head.register_forward_pre_hook(
        lambda _head, arguments: (arguments[0][wanted].unsqueeze(0), *arguments[1:])
    )
    try:
        logits: Tensor = model(**inputs).logits[0]
    finally:
        handle.remove()
    return logits


@torch.no_grad()
def is_same(model: nn.Module, head: nn.Module | None, one: Batch, other: Batch) -> bool:
    """Whether two layouts of the same examples give the same loss of every label: tried out, since some models (of
    state-space or ALiBi kind) do not keep packed examples apart, or take no positions."""
    tolerance = _SAME.get(next(model.parameters()).dtype, _NEARLY_SAME)
    expected = label_losses(model, head, one)
    try:
        found = label_losses(model, head, other)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        NotImplementedError,
    ):  # what models raise at positions they cannot take
        return False
    return bool(torch.allclose(found, expected, rtol=0, atol=tolerance))


def summed(objective: Objective, values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The terms of a step from those of its passes, and their weighted total as `loss`."""
    found = {name: sum(value.get(name, 0.0) for value in values) for name in TERMS}
    kept = {name: found[name] for name in TERMS if any(name in value for value in values)}
    return {
        "loss": sum(objective.weights[name] * value for name, value in kept.items() if objective.weights[name]),
        **kept,
    }
