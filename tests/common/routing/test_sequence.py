"""A router by sequence gives the same numbers however the tokens are laid out: padded, packed, in trees, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from seedbed.common.errors import ConfigError
from seedbed.common.routing import Mixture, MixtureSlot, RoutedModel, RouterSettings, arrow_router, by_sequence

Make = Callable[..., Any]
LONG, SHORT = [5, 17, 42, 8, 99, 3, 61, 12, 33], [7, 7, 30, 12]
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


@pytest.fixture
def slot(model: Any, mixture: Make) -> Any:
    slot = MixtureSlot(model)
    slot.put(mixture("sequence"))
    yield slot
    slot.put(None)


@torch.inference_mode()
def run(model: Any, ids: list[list[int]], **inputs: Any) -> Any:
    return model(input_ids=torch.tensor(ids), **{"use_cache": False, **inputs})


def alone(model: Any, tokens: list[int]) -> torch.Tensor:
    result: torch.Tensor = run(model, [tokens]).logits[0]
    return result


def test_it_is_the_running_mean_of_the_routers_probabilities(slot: MixtureSlot, model: Any, reference: Make) -> None:
    got, made = alone(model, LONG), slot.mixture
    slot.put(None)
    torch.testing.assert_close(got, reference(model, made, LONG), rtol=1e-3, atol=1e-3)


def test_it_is_not_the_router_by_token(slot: MixtureSlot, model: Any, mixture: Make) -> None:
    by_sequence = alone(model, LONG)
    slot.put(mixture("learned"))
    assert (alone(model, LONG) - by_sequence).abs().max() > 0.01


def test_it_is_causal(slot: MixtureSlot, model: Any) -> None:
    torch.testing.assert_close(alone(model, LONG)[:4], alone(model, LONG[:4]), **CLOSE)


def test_padding_on_either_side_changes_nothing(slot: MixtureSlot, model: Any) -> None:
    gap = len(LONG) - len(SHORT)
    ones, zeros = [1] * len(SHORT), [0] * gap
    right = run(model, [LONG, SHORT + zeros], attention_mask=torch.tensor([[1] * len(LONG), ones + zeros])).logits
    torch.testing.assert_close(right[0], alone(model, LONG), **CLOSE)
    torch.testing.assert_close(right[1, : len(SHORT)], alone(model, SHORT), **CLOSE)
    mask = torch.tensor([[1] * len(LONG), zeros + ones])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    left = run(model, [LONG, zeros + SHORT], attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(left[1, gap:], alone(model, SHORT), **CLOSE)
    assert left.isfinite().all()


def test_packed_examples_do_not_see_each_other(slot: MixtureSlot, model: Any) -> None:
    positions = torch.tensor([[*range(len(LONG)), *range(len(SHORT)), *range(2)]])
    packed = run(model, [[*LONG, *SHORT, 0, 0]], position_ids=positions).logits[0]
    torch.testing.assert_close(packed[: len(LONG)], alone(model, LONG), **CLOSE)
    torch.testing.assert_close(packed[len(LONG) : len(LONG) + len(SHORT)], alone(model, SHORT), **CLOSE)


@pytest.mark.parametrize("boolean", [False, True], ids=["additive", "boolean"])
def test_branches_of_a_tree_see_their_own_ancestors(slot: MixtureSlot, model: Any, boolean: bool) -> None:
    """A trunk of four tokens, and two branches of two: nodes 4, 5 and 6, 7; node 8 is padding."""
    seen = torch.eye(9, dtype=torch.bool)
    seen[:8, :4] |= torch.ones(8, 4, dtype=torch.bool).tril()
    seen[5, 4] = seen[7, 6] = True
    mask = seen if boolean else torch.zeros(9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5, 0]])
    trunk, first, second = [5, 17, 42, 8], [99, 3], [61, 12]
    ids = [[*trunk, *first, *second, 0]]
    tree = run(model, ids, attention_mask=mask[None, None], position_ids=positions).logits[0]
    torch.testing.assert_close(tree[:6], alone(model, trunk + first), **CLOSE)
    torch.testing.assert_close(tree[6:8], alone(model, trunk + second)[4:], **CLOSE)


def test_a_cache_carries_the_sums(slot: MixtureSlot, model: Any) -> None:
    expected = alone(model, LONG)
    first = run(model, [LONG[:5]], use_cache=True)
    torch.testing.assert_close(first.logits[0], expected[:5], **CLOSE)
    branch = copy.deepcopy(first.past_key_values)
    rest = run(model, [LONG[5:7]], use_cache=True, past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits[0], expected[5:7], **CLOSE)
    last = run(model, [LONG[7:]], use_cache=True, past_key_values=rest.past_key_values)
    torch.testing.assert_close(last.logits[0], expected[7:], **CLOSE)
    # A copy of the cache goes its own way.
    other = run(model, [[9, 9]], use_cache=True, past_key_values=branch)
    torch.testing.assert_close(other.logits[0], alone(model, [*LONG[:5], 9, 9])[5:], **CLOSE)


def greedy(model: Any, tokens: list[int], new: int) -> list[int]:
    for _ in range(new):
        tokens = [*tokens, int(alone(model, tokens)[-1].argmax())]
    return tokens[-new:]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_writes_what_whole_passes_would(slot: MixtureSlot, model: Any, cache: str) -> None:
    """Padded on the left, with a key/value cache, six tokens each."""
    gap = len(LONG) - len(SHORT)
    ids, mask = torch.tensor([LONG, [0] * gap + SHORT]), torch.tensor([[1] * len(LONG), [0] * gap + [1] * len(SHORT)])
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    with torch.inference_mode():
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            **options,
        )
    assert written[0, len(LONG) :].tolist() == greedy(model, LONG, 6)
    assert written[1, len(LONG) :].tolist() == greedy(model, SHORT, 6)


@pytest.mark.parametrize(
    ("move", "argument", "order"),
    [
        ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
    ],
)
def test_the_sums_move_with_the_rows_of_a_cache(
    slot: MixtureSlot, model: Any, move: str, argument: Any, order: list[int]
) -> None:
    """As beam search moves them."""
    rows = [[5, 17, 42, 8], [99, 61, 12, 33]]
    cache = run(model, rows, use_cache=True).past_key_values
    getattr(cache, move)(argument)
    got = run(model, [[7, 30]] * len(order), use_cache=True, past_key_values=cache).logits
    for place, row in enumerate(order):
        torch.testing.assert_close(got[place], alone(model, [*rows[row], 7, 30])[4:], **CLOSE)


def test_beam_search_reports_the_score_of_what_it_wrote(slot: MixtureSlot, model: Any) -> None:
    with torch.inference_mode():
        found = model.generate(
            input_ids=torch.tensor([LONG]),
            attention_mask=torch.ones(1, len(LONG), dtype=torch.long),
            max_new_tokens=5,
            num_beams=4,
            do_sample=False,
            length_penalty=0.0,
            pad_token_id=0,
            eos_token_id=None,
            output_scores=True,
            return_dict_in_generate=True,
        )
    tokens = found.sequences[0].tolist()
    rows = alone(model, tokens).log_softmax(-1)
    expected = sum(float(rows[place - 1, tokens[place]]) for place in range(len(LONG), len(tokens)))
    assert float(found.sequences_scores[0]) == pytest.approx(expected, abs=1e-3)


def test_a_cache_that_was_not_routed_or_was_cut_is_refused(slot: MixtureSlot, model: Any, mixture: Make) -> None:
    made = slot.mixture
    slot.put(None)
    foreign = run(model, [LONG], use_cache=True).past_key_values
    slot.put(made)
    with pytest.raises(ConfigError, match="holds 9 tokens, of which the router by sequence has seen 0"):
        run(model, [[1]], use_cache=True, past_key_values=foreign)
    own = run(model, [LONG], use_cache=True).past_key_values
    slot.put(mixture("sequence", temperature=0.5))
    with pytest.raises(ConfigError, match="has seen 0"):  # another mixture
        run(model, [[1]], use_cache=True, past_key_values=own)
    own = run(model, [LONG], use_cache=True).past_key_values
    own.crop(-3)
    with pytest.raises(ConfigError, match="holds 6 tokens, of which the router by sequence has seen 9"):
        run(model, [[1]], use_cache=True, past_key_values=own)


def test_it_says_so_where_it_cannot_tell_sequences_apart(slot: MixtureSlot, model: Any) -> None:
    with pytest.raises(ConfigError, match="cannot tell the sequences apart"):
        model.model(input_ids=torch.tensor([LONG]))  # not the model that the mixture is on


def test_other_routers_can_be_averaged_too(model: Any, experts: Any, reference: Make) -> None:
    made = Mixture(("a", "b", "c"), experts, by_sequence(arrow_router(experts, RouterSettings(kind="arrow", top_k=2))))
    slot = MixtureSlot(model)
    slot.put(made)
    got = alone(model, LONG)
    slot.put(None)
    torch.testing.assert_close(got, reference(model, made, LONG), rtol=1e-3, atol=1e-3)


def test_training_sees_the_same_in_packed_and_in_padded_batches(model: Any, experts: Any, router: Make) -> None:
    start = router("sequence", experts)
    gap = [0] * (len(LONG) - len(SHORT))
    padded = {
        "input_ids": torch.tensor([LONG, SHORT + gap]),
        "attention_mask": torch.tensor([[1] * len(LONG), [1] * len(SHORT) + gap]),
    }
    packed = {
        "input_ids": torch.tensor([LONG + SHORT]),
        "position_ids": torch.tensor([[*range(len(LONG)), *range(len(SHORT))]]),
    }
    gradients = []
    for inputs in (padded, packed):
        routed = RoutedModel.learned(model, experts, start.settings, start=start)
        flat = routed(**inputs, use_cache=False).logits.flatten(0, 1)
        chosen = torch.cat([flat[: len(LONG)], flat[len(LONG) : len(LONG) + len(SHORT)]])
        chosen.logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in routed.named_parameters() if p.requires_grad})
        routed.remove()
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-3)
