"""Requests packed into trees, in numbers small enough to draw."""

from __future__ import annotations

import numpy as np
import pytest

from seedbed.common.packing import Request, Tree, batches, collate, grow_trees

FREE = 0.0
"""Attended pairs cost nothing: share whatever can be shared."""


def request(*tokens: int, scored: int = 1) -> Request:
    return Request(tokens, scored)


def test_two_choices_share_their_context_and_branch_after_it() -> None:
    (tree,) = grow_trees([request(7, 8, 1, 2, scored=2), request(7, 8, 3, 4, scored=2)], pair_cost=FREE, limit=99)
    assert tree.tokens == [7, 8, 1, 3], "the context once, then each choice without its last token"
    assert tree.parents == [-1, 0, 1, 1]
    assert tree.depths == [0, 1, 2, 2]
    assert tree.paths == {0: [1, 2], 1: [1, 3]}, "the first token of both is predicted from the context's end"


def test_a_branch_sees_the_context_but_not_its_sister() -> None:
    (tree,) = grow_trees([request(7, 1, 2), request(7, 3, 4)], pair_cost=FREE, limit=99)
    assert tree.mask().astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


def test_single_token_choices_need_no_node_of_their_own() -> None:
    (tree,) = grow_trees([request(7, 8, token) for token in range(4)], pair_cost=FREE, limit=99)
    assert tree.tokens == [7, 8]
    assert tree.is_chain
    assert set(map(tuple, tree.paths.values())) == {(1,)}


def test_requests_without_a_common_prefix_stay_apart() -> None:
    assert [tree.tokens for tree in grow_trees([request(1, 2, 3), request(4, 5, 6)], pair_cost=FREE, limit=99)] == [
        [1, 2],
        [4, 5],
    ]


def test_long_texts_with_one_shared_token_stay_apart() -> None:
    # 100 + 99 nodes in one tree attend 199² = 39,601 pairs, two rows of 100 only 20,000; sharing saves 1 token.
    texts = [request(0, *range(1, 101)), request(0, *range(201, 301))]
    assert len(grow_trees(texts, pair_cost=0.001, limit=999)) == 2
    assert len(grow_trees(texts, pair_cost=FREE, limit=999)) == 1


def test_a_tree_never_exceeds_its_limit_by_sharing() -> None:
    choices = [request(1, 2, 3, 10 * choice, 0) for choice in range(1, 6)]
    assert all(len(tree) <= 5 for tree in grow_trees(choices, pair_cost=FREE, limit=5))


def test_without_branches_only_extensions_are_shared() -> None:
    requests = [request(1, 2, 3), request(1, 2, 4, 5), request(1, 2, 6, 7)]
    trees = grow_trees(requests, pair_cost=FREE, limit=99, branches=False)
    assert all(tree.is_chain for tree in trees)
    assert sorted(tree.tokens for tree in trees) == [[1, 2, 4], [1, 2, 6]], "the first request lies on the second's way"


def test_every_request_lands_in_exactly_one_tree_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    requests = [request(*rng.integers(0, 3, size=rng.integers(2, 9)).tolist()) for _ in range(50)]
    trees = grow_trees(requests, pair_cost=0.01, limit=20)
    owners = [index for tree in trees for index in tree.paths]
    assert sorted(owners) == list(range(50))
    for tree in trees:
        for index, path in tree.paths.items():
            walked, node = [], path[-1]
            while node != -1:
                walked.append(tree.tokens[node])
                node = tree.parents[node]
            assert tuple(reversed(walked)) == requests[index].inputs


def test_batches_respect_the_budget_and_lose_nothing() -> None:
    trees = grow_trees(
        [request(*range(100 * index, 100 * index + size)) for index, size in enumerate([3, 30, 9, 12, 4])],
        pair_cost=FREE,
        limit=99,
    )
    found = list(batches(trees, tokens=30, predictions=99))
    assert sum(len(batch) for batch in found) == 5
    assert len(found[0][0]) == 29, "the largest first"
    assert all(len(batch) * max(map(len, batch)) <= 30 for batch in found)


def test_batches_respect_the_number_of_predictions() -> None:
    trees = grow_trees([request(10 * n, 10 * n + 1, 10 * n + 2, scored=2) for n in range(4)], pair_cost=FREE, limit=9)
    assert [len(batch) for batch in batches(trees, tokens=999, predictions=4)] == [2, 2]


def test_trees_beyond_the_attention_window_get_batches_of_their_own() -> None:
    trees = grow_trees(
        [request(*range(100 * n, 100 * n + size)) for n, size in enumerate([6, 12])], pair_cost=0, limit=9
    )
    assert [[len(tree) for tree in batch] for batch in batches(trees, tokens=999, predictions=99, window=8)] == [
        [11],
        [5],
    ]


def test_collated_indices_point_at_what_they_should() -> None:
    requests = [request(7, 1, 2, scored=2), request(7, 3, 4, scored=2), request(5, 6)]
    trees = grow_trees(requests, pair_cost=FREE, limit=99)
    batch = collate(trees, requests, pad=0)
    assert batch.ids.tolist() == [[5, 0, 0], [7, 1, 3]]
    assert batch.positions.tolist() == [[0, 0, 0], [0, 1, 1]]
    assert batch.scored.tolist() == [0, 3, 4, 5], "row 0 node 0, then row 1 nodes 0, 1 and 2"
    told = sorted(zip(batch.requests.tolist(), batch.scored[batch.rows].tolist(), batch.targets.tolist(), strict=True))
    assert told == [(0, 3, 1), (0, 4, 2), (1, 3, 3), (1, 5, 4), (2, 0, 6)]
    assert batch.mask is not None
    assert batch.mask.any(axis=-1).all(), "padding attends to itself, or it would be NaN"


def test_chains_leave_masking_to_the_model() -> None:
    requests = [request(1, 2, 3), request(4, 5)]
    assert collate(grow_trees(requests, pair_cost=FREE, limit=9), requests, pad=0).mask is None


def test_an_empty_tree_is_a_chain_of_nothing() -> None:
    assert len(Tree()) == 0
    assert grow_trees([], pair_cost=FREE, limit=9) == []
    assert list(batches([], tokens=9, predictions=9)) == []


@pytest.mark.parametrize("scored", [1, 2, 3])
def test_as_many_nodes_predict_as_tokens_are_scored(scored: int) -> None:
    (tree,) = grow_trees([request(1, 2, 3, 4, scored=scored)], pair_cost=FREE, limit=9)
    assert len(tree.paths[0]) == scored
