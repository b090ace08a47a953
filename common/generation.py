"""Free generation for lm-eval's `generate_until` tasks: batched, padded on the left, cut at the first stop sequence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seedbed.common.errors import DataError

if TYPE_CHECKING:
    from seedbed.common.scoring import SeedbedLM

DEFAULT_NEW_TOKENS = 256


def generate(lm: SeedbedLM, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Continue every context with its own settings (`until`, `max_gen_toks`, `do_sample`, `temperature`, …).

    Returns:
        The continuations, in the order of `requests`, without the stop sequences.

    Raises:
        DataError: if `max_gen_toks` leaves no room for a context.
    """
    groups: dict[str, list[int]] = {}
    for index, (_, settings) in enumerate(requests):
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(index)
    texts = [""] * len(requests)
    done = 0
    for indices in groups.values():
        settings = requests[indices[0]][1]
        for batch in _batches(lm, [requests[index][0] for index in indices], settings):
            contexts = [requests[indices[place]][0] for place in batch]
            for place, text in zip(batch, _generate_batch(lm, contexts, settings), strict=True):
                texts[indices[place]] = text
            done += len(batch)
            if lm.progress is not None:
                lm.progress(done, len(requests))
    return texts


def _batches(lm: SeedbedLM, contexts: list[str], settings: dict[str, Any]) -> list[list[int]]:
    """Indices of `contexts`, longest first, so many to a batch that context and new tokens stay within the budget."""
    lengths = [len(row) for row in lm.encode(contexts)]
    _, _, new = _options(lm, settings)
    rows: list[list[int]] = []
    for index in sorted(range(len(contexts)), key=lambda index: -lengths[index]):
        if rows and (len(rows[-1]) + 1) * (min(lengths[rows[-1][0]], lm.max_length) + new) <= lm.batch_tokens:
            rows[-1].append(index)
        else:
            rows.append([index])
    return rows


def _options(lm: SeedbedLM, settings: dict[str, Any]) -> tuple[dict[str, Any], list[str], int]:
    """lm-eval's settings as arguments of `model.generate`, stop sequences, and the number of new tokens."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    options = dict(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
    until = handle_stop_sequences(options.pop("until", None), eos=lm.tokenizer.decode([lm.eot_token_id]))
    new = int(options.pop("max_gen_toks"))
    options.pop("max_length", None)
    if not options.get("do_sample"):
        options = {"do_sample": False}
    return options, [stop for stop in until if stop], new


@torch.inference_mode()
def _generate_batch(lm: SeedbedLM, contexts: list[str], settings: dict[str, Any]) -> list[str]:
    options, until, new = _options(lm, settings)
    room = lm.max_length - new
    if room < 1:
        raise DataError(
            f"max_gen_toks {new} leaves no room for a context: the model reads {lm.max_length} tokens",
            "Ask for fewer new tokens.",
        )
    rows = [row[-room:] or [lm.prefix_token_id] for row in lm.encode(contexts)]
    width = max(len(row) for row in rows)
    ids = torch.tensor([[lm.pad_token_id] * (width - len(row)) + row for row in rows], device=lm.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)

    def stop(tokens: Tensor, _scores: Any, **_: Any) -> Tensor:
        written = lm.tokenizer.batch_decode(tokens[:, width:])
        return torch.tensor([any(end in text for end in until) for text in written], device=tokens.device)

    output = lm.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new,
        stopping_criteria=_criteria(stop),
        pad_token_id=lm.pad_token_id,
        **options,
    )
    return [_cut(lm, row, until) for row in output[:, width:].tolist()]


def _criteria(stop: Any) -> Any:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Stop(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            result: Tensor = stop(input_ids, scores, **kwargs)
            return result

    return StoppingCriteriaList([Stop()])


def _cut(lm: SeedbedLM, tokens: list[int], until: list[str]) -> str:
    if lm.eot_token_id in tokens:
        tokens = tokens[: tokens.index(lm.eot_token_id)]
    text: str = lm.tokenizer.decode(tokens, skip_special_tokens=True)
    for end in until:
        text = text.split(end)[0]
    return text
