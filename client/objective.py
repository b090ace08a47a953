"""What training makes small: the cross-entropy of the tokens that an example asks for."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from seedbed.client.data import IGNORED, Batch

_SAME = {torch.float32: 1e-3}
_NEARLY_SAME = 0.25
"""Difference of one label's loss that rounding explains, in float32 and in the half precisions."""


def label_losses(model: nn.Module, head: nn.Module | None, batch: Batch) -> Float[Tensor, " labels"]:
    """Cross-entropy of every label of a batch, in float32, row after row.

    They are summed and divided by the number of labels in a whole optimizer step, so that the loss does not depend on
    how that step is cut into passes and ranks.

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
        logits = model(**inputs).logits[wanted]
    else:
        handle = head.register_forward_pre_hook(
            lambda _head, arguments: (arguments[0][wanted].unsqueeze(0), *arguments[1:])
        )
        try:
            logits = model(**inputs).logits[0]
        finally:
            handle.remove()
    return F.cross_entropy(logits.float(), batch.labels[wanted], reduction="none")


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
