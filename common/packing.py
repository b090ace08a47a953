"""Pack scoring requests into trees, so that tokens which several requests share are computed once.

A request is a token sequence of which the last few are scored. The choices of a multiple-choice item share their
context; items share instructions and few-shot examples. Requests become a prefix tree: every distinct token of a path
is one node, a node attends to its ancestors and to itself, and its position is its depth. One forward pass over the
nodes with that mask gives exactly the hidden states that each path alone would give (tree attention, as in SpecInfer,
ASPLOS 2024; the rule that decides when sharing pays is ours). Numpy only: no model in here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

ROOT = -1


@dataclass(frozen=True, slots=True)
class Request:
    """Tokens of one request: the model reads `tokens[:-1]`, and the last `scored` of `tokens` are predicted."""

    tokens: tuple[int, ...]
    scored: int

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.tokens[:-1]


@dataclass(slots=True)
class Tree:
    """Nodes, parents before children; `paths[i]` holds the nodes that predict the scored tokens of request i."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)
    is_chain: bool = True
    """Whether no node has two children; then the ordinary causal mask is the right one."""

    def __len__(self) -> int:
        return len(self.tokens)

    def common(self, inputs: Sequence[int]) -> list[int]:
        """Nodes of the longest prefix of `inputs` that is in the tree."""
        node, nodes = ROOT, []
        for token in inputs:
            child = self._children.get((node, token))
            if child is None:
                break
            nodes.append(child)
            node = child
        return nodes

    def insert(self, index: int, request: Request, shared: list[int]) -> None:
        """Add the request's inputs below `shared`, the nodes that `common` found."""
        nodes = list(shared)
        for token in request.inputs[len(shared) :]:
            parent = nodes[-1] if nodes else ROOT
            self.is_chain &= parent == len(self.tokens) - 1
            self._children[parent, token] = len(self.tokens)
            nodes.append(len(self.tokens))
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(len(nodes) - 1)
        self.paths[index] = nodes[-request.scored :]

    def mask(self) -> NDArray[np.bool_]:
        """``[nodes, nodes]``: whether the row's node attends to the column's."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                mask[node] |= mask[parent]
        return mask


def grow_trees(requests: Sequence[Request], *, pair_cost: float, limit: int, branches: bool = True) -> list[Tree]:
    """Put requests into trees wherever sharing saves more than the larger attention costs.

    Appending b new nodes to a tree of T instead of a row of its own of l tokens saves l − b tokens and turns ``T² +
    l²`` attended pairs into ``(T + b)²``.

    Args:
        requests: any number, in any order; a tree's `paths` are keyed by the index in this sequence.
        pair_cost: work of one attended pair, in units of the work of one token.
        limit: largest number of nodes in a tree (a single request may be longer).
        branches: False keeps every tree a chain, for models that cannot take a tree mask.
    """
    trees: list[Tree] = []
    # Sorted, sharers of a prefix are neighbours, and a sequence precedes its extensions.
    for index in sorted(range(len(requests)), key=lambda index: requests[index].tokens):
        request = requests[index]
        tree = trees[-1] if trees else Tree()
        shared = tree.common(request.inputs)
        if not trees or not _pays(tree, shared, len(request.inputs), pair_cost, limit, branches):
            tree, shared = Tree(), []
            trees.append(tree)
        tree.insert(index, request, shared)
    return trees


def _pays(tree: Tree, shared: list[int], length: int, pair_cost: float, limit: int, branches: bool) -> bool:
    new = length - len(shared)
    if new == 0:
        return True
    extends = bool(shared) and shared[-1] == len(tree) - 1
    if not shared or len(tree) + new > limit or not (branches or (tree.is_chain and extends)):
        return False
    more_pairs = (len(tree) + new) ** 2 - len(tree) ** 2 - length**2
    return pair_cost * more_pairs <= len(shared)


def batches(trees: Sequence[Tree], *, tokens: int, predictions: int, window: int | None = None) -> Iterator[list[Tree]]:
    """Group trees of like size so that a batch, padded, stays within `tokens` and scores at most `predictions` nodes.

    The largest come first, so that a lack of memory shows at once. Trees beyond `window` nodes (a model's sliding
    attention window) are never mixed with others, so that a batch of chains can leave masking to the model.
    """
    batch: list[Tree] = []
    scored = 0
    for tree in sorted(trees, key=len, reverse=True):
        own = len({node for path in tree.paths.values() for node in path})
        full = batch and ((len(batch) + 1) * len(batch[0]) > tokens or scored + own > predictions)
        crosses = batch and window is not None and (len(batch[0]) > window) != (len(tree) > window)
        if full or crosses:
            yield batch
            batch, scored = [], 0
        batch.append(tree)
        scored += own
    if batch:
        yield batch


@dataclass(frozen=True, slots=True, eq=False)
class Collated:
    """A padded batch of trees."""

    ids: NDArray[np.int64]
    """``[trees, nodes]``, padded on the right."""
    positions: NDArray[np.int64]
    """``[trees, nodes]``."""
    mask: NDArray[np.bool_] | None
    """``[trees, 1, nodes, nodes]``, or none where every tree is a chain and causal masking does."""
    scored: NDArray[np.int64]
    """Flat indices into ``[trees · nodes]`` of the nodes whose logits are needed, each once."""
    requests: NDArray[np.int64]
    """For every predicted token, the index of its request…"""
    rows: NDArray[np.int64]
    """…and of its logits in `scored`…"""
    targets: NDArray[np.int64]
    """…and the token itself."""


def collate(trees: Sequence[Tree], requests: Sequence[Request], pad: int) -> Collated:
    """Pad `trees` to one length and list what is to be predicted from where."""
    width = max(len(tree) for tree in trees)
    ids = np.full((len(trees), width), pad, dtype=np.int64)
    positions = np.zeros((len(trees), width), dtype=np.int64)
    flat: list[int] = []
    owners: list[int] = []
    targets: list[int] = []
    for row, tree in enumerate(trees):
        ids[row, : len(tree)] = tree.tokens
        positions[row, : len(tree)] = tree.depths
        for index, path in tree.paths.items():
            flat.extend(row * width + node for node in path)
            owners.extend([index] * len(path))
            targets.extend(requests[index].tokens[-len(path) :])
    scored, rows = np.unique(np.array(flat, dtype=np.int64), return_inverse=True)
    mask = None if all(tree.is_chain for tree in trees) else _padded_mask(trees, width)
    return Collated(ids, positions, mask, scored, np.array(owners), rows, np.array(targets))


def _padded_mask(trees: Sequence[Tree], width: int) -> NDArray[np.bool_]:
    mask = np.zeros((len(trees), 1, width, width), dtype=np.bool_)
    # Padding attends to itself: a row that attends to nothing would be NaN.
    mask[:, 0, np.arange(width), np.arange(width)] = True
    for row, tree in enumerate(trees):
        mask[row, 0, : len(tree), : len(tree)] = tree.mask()
    return mask
