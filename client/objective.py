"""What training makes small: the cross-entropy of the tokens that an example asks for."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from seedbed.client.data import IGNORED, Batch


def token_losses(model: nn.Module, head: nn.Module | None, batch: Batch) -> Float[Tensor, ""]:
    """Sum, not mean, of the cross-entropy over all labels of a batch, in float32.

    A sum can be divided by the number of labels in a whole optimizer step, and so does not depend on how that step is
    cut into passes and ranks.

    Args:
        model: a causal LM, bare or wrapped.
        head: its output projection; with it, logits are computed only where there is a label. A hook on the head rather
            than a product of our own, so that scaling and soft-capping of logits stay the model's business.
    """
    ids, mask = batch.input_ids[:, :-1], batch.attention_mask[:, :-1]  # the last token predicts nothing
    targets = batch.labels[:, 1:]
    wanted = targets != IGNORED
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if head is None:
        return _cross_entropy(model(**inputs).logits[wanted], targets[wanted])

    def gather(_head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][wanted].unsqueeze(0), *arguments[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        logits = model(**inputs).logits[0]
    finally:
        handle.remove()
    return _cross_entropy(logits, targets[wanted])


def _cross_entropy(logits: Float[Tensor, "labels vocabulary"], targets: Int[Tensor, " labels"]) -> Float[Tensor, ""]:
    return F.cross_entropy(logits.float(), targets, reduction="sum")
