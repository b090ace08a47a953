"""How far an adapter moves its base model on text that has nothing to do with its task.

    drift = Drift(lm, texts)            the base model's distributions
    lm.set_adapter(adapter)
    found = drift.measure()             KL(p_base ‖ p_adapted), perplexity and size of the updates

Generalization in the sense of I-LoRA (OpenReview CRkoMdDlFh, 2024): an adapter should be silent where it is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from seedbed.common.errors import DataError
from seedbed.common.manifest import Record
from seedbed.common.scoring import SeedbedLM

_KEPT_BYTES = 1 << 30
"""The base model's distributions are kept up to this size, beyond it computed again for every adapter."""


class TextDrift(Record):
    """Means over texts, each token of a text counting once, and the numbers of every text."""

    kl: float
    """``KL(p_base ‖ p_adapted)`` of a token, in nats."""
    perplexity: float
    """``exp`` of the mean negative log-likelihood of a token."""
    update_norm: float | None = None
    """``‖s B A x‖₂``, mean over tokens and adapted modules; 0 for the base, none where it is not measured (mixtures)."""
    tokens: tuple[int, ...]
    """Predicted tokens of each text."""
    kls: tuple[float, ...]
    """Mean divergence of each text."""
    losses: tuple[float, ...]
    """Mean negative log-likelihood of each text."""


class Drift:
    """Texts with what the bare base model says of them.

    Args:
        lm: the scorer; its adapter is taken off while the base is asked.
        texts: at least one; those with fewer than two tokens are left out, long ones are cut at `max_tokens`.

    Raises:
        DataError: if no text is left.
    """

    def __init__(self, lm: SeedbedLM, texts: Sequence[str], *, max_tokens: int = 256) -> None:
        self._lm = lm
        encoded = [self._with_prefix(tokens)[:max_tokens] for tokens in lm.encode(texts)]
        rows = sorted((row for row in encoded if len(row) > 1), key=len)
        if not rows:
            raise DataError("there is no general text to measure drift on", "Give texts of two tokens or more.")
        self._batches = list(self._batched(rows))
        tokens = sum(len(row) - 1 for row in rows)
        self._keep = 4 * tokens * int(lm.model.config.get_text_config().vocab_size) <= _KEPT_BYTES
        self._base: dict[int, Tensor] = {}

    def measure(self) -> TextDrift:
        """Compare the scorer's current adapter with its base model."""
        kls, losses, counts = [], [], []
        sizes: list[tuple[float, int]] = []
        for index, rows in enumerate(self._batches):
            base = self._base_of(index, rows)
            with self._lm.update_norms() as norms:
                adapted = self._log_probabilities(rows)
            targets = torch.tensor([token for row in rows for token in row[1:]], device=adapted.device)
            kl = (base.exp() * (base - adapted)).sum(-1)
            loss = -adapted.gather(1, targets[:, None])[:, 0]
            lengths = [len(row) - 1 for row in rows]
            kls += [float(part.mean()) for part in torch.split(kl, lengths)]
            losses += [float(part.mean()) for part in torch.split(loss, lengths)]
            counts += lengths
            sizes += [(_mean_of(norm, lengths), sum(lengths)) for norm in norms]
        total = sum(counts)
        weight = sum(count for _, count in sizes)
        return TextDrift(
            kl=sum(kl * count for kl, count in zip(kls, counts, strict=True)) / total,
            perplexity=math.exp(sum(loss * count for loss, count in zip(losses, counts, strict=True)) / total),
            update_norm=sum(size * count for size, count in sizes) / weight if weight else None,
            tokens=tuple(counts),
            kls=tuple(kls),
            losses=tuple(losses),
        )

    def _with_prefix(self, tokens: list[int]) -> list[int]:
        prefix = self._lm.prefix_token_id
        return tokens if tokens[:1] == [prefix] else [prefix, *tokens]

    def _batched(self, rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        """Rows of like length together, each batch within the scorer's budget of tokens and of logits."""
        budget = min(self._lm.batch_tokens, 2048)
        batch: list[list[int]] = []
        for row in rows:
            if batch and (len(batch) + 1) * len(row) > budget:
                yield batch
                batch = []
            batch.append(row)
        yield batch

    def _base_of(self, index: int, rows: Sequence[list[int]]) -> Tensor:
        if index in self._base:
            return self._base[index]
        with self._lm.bare():
            found = self._log_probabilities(rows)
        if self._keep:
            self._base[index] = found
        return found

    @torch.inference_mode()
    def _log_probabilities(self, rows: Sequence[list[int]]) -> Tensor:
        """``[predicted tokens, vocabulary]`` in float32, text after text."""
        width = max(map(len, rows)) - 1
        ids = torch.full((len(rows), width), self._lm.pad_token_id)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row) - 1] = torch.tensor(row[:-1])
            mask[place, : len(row) - 1] = 1
        device = self._lm.model.device
        logits = self._lm.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        chosen: Tensor = logits[mask.bool().to(device)].float().log_softmax(-1)
        return chosen


def _mean_of(norm: Tensor, lengths: Sequence[int]) -> float:
    """Mean over the tokens that are not padding, of norms ``[rows, tokens]``."""
    return sum(float(row[:length].sum()) for row, length in zip(norm, lengths, strict=True)) / sum(lengths)
