"""What a layer must know of the forward pass it is in: which tokens are padding, and which precede which.

A router by sequence averages over "the tokens so far", so every token needs to know its predecessors: those that the model
lets it attend to (but for a sliding window of its own making, which the average does not have). A hook on the model reads them
off the inputs of the pass:

| inputs | predecessors of a token |
| --- | --- |
| attention mask ``[rows, tokens]``, or none | earlier tokens of its row that are not padding |
| none, `position_ids` that start anew (packed rows) | earlier tokens since the last start |
| attention mask ``[rows, 1, tokens, tokens]`` (trees) | those that the mask shows |
| a key/value cache | as above, and what the cache holds |

For the last, the running sums of every layer are kept on the cache itself: they live, are copied, and are reordered with it.
"""

from __future__ import annotations

import inspect
import uuid
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from seedbed.common.errors import ConfigError
from seedbed.common.routing.cache_state import CacheState, Sums, recall, remember
from seedbed.common.routing.gates import Gate, Project


@dataclass(eq=False)
class Pass:
    """One forward pass."""

    shape: tuple[int, int]
    """Rows and tokens."""
    mask: Tensor | None = None
    """``[rows, tokens]``: whether a token is one, not padding."""
    visible: Tensor | None = None
    """``[rows, tokens, tokens]``: whether the first token attends to the second."""
    positions: Tensor | None = None
    """``[rows, tokens]``, of packed rows."""
    ids: Tensor | None = None
    past: CacheState | None = None
    kept: dict[str, Sums] = field(default_factory=dict)

    @cached_property
    def starts(self) -> Tensor | None:
        """``[rows, tokens]``: where the packed sequence of a token begins in its row."""
        if self.positions is None:
            return None
        begins = self.positions.diff(prepend=self.positions[:, :1] - 1) != 1
        places = torch.arange(self.shape[1], device=begins.device).expand(begins.shape)
        return torch.where(begins, places, 0).cummax(-1).values

    def valid(self, padding: int | None) -> Tensor | None:
        """``[rows, tokens]``: whether a token counts, as far as the inputs say.

        Args:
            padding: id of the padding token; where there is no mask by token, a run of it that ends a row is padding.
        """
        if self.mask is not None:
            return self.mask
        if self.visible is not None:
            # A tree's nodes hang together; whoever sees only itself and is seen by no other is padding.
            alone = (self.visible.sum(-1) == 1) & (self.visible.sum(-2) == 1)
            return ~alone | (torch.arange(self.shape[1], device=alone.device) == 0)
        if padding is not None and self.ids is not None:
            return (self.ids != padding).flip(-1).cummax(-1).values.flip(-1)
        return None

    def running_mean(self, name: str, p: Tensor) -> Tensor:
        """The mean of ``p [rows, tokens, N]`` over each token's predecessors and itself, for the layer called `name`."""
        sums, counts = self._tree_sums(p) if self.visible is not None else self._row_sums(p)
        if self.past is not None:
            total, count = self.past.sums[name]
            sums, counts = sums + total[:, None], counts + count[:, None]
        self.kept[name] = (sums[:, -1].detach(), counts[:, -1])
        # Padding on the left has no predecessors, not even itself; what it gets is of no consequence but must be finite.
        return torch.where(counts > 0, sums / counts.clamp(min=1), p).to(p.dtype)

    def _tree_sums(self, p: Tensor) -> Sums:
        assert self.visible is not None
        weights = self.visible.to(device=p.device, dtype=p.dtype)
        return weights @ p, weights.sum(-1, keepdim=True)

    def _row_sums(self, p: Tensor) -> Sums:
        # Differences of running sums, of thousands of tokens: they need digits to spare.
        wide = torch.float32 if p.device.type == "mps" else torch.float64
        if self.mask is None:
            counts = torch.arange(1, self.shape[1] + 1, device=p.device, dtype=wide).view(1, -1, 1)
            counts, counted = counts.expand(self.shape[0], -1, 1), p.to(wide)
        else:
            used = self.mask.unsqueeze(-1).to(device=p.device, dtype=wide)
            counts, counted = used.cumsum(1), p * used
        sums = counted.cumsum(1)
        if self.starts is not None:
            starts = self.starts.unsqueeze(-1).to(p.device)
            before = (sums - counted).gather(1, starts.expand(-1, -1, p.shape[-1]))
            sums, counts = sums - before, counts - starts
        return sums, counts


class PassWatch:
    """Hooks on a model that keep `current`, the pass that is under way.

    Args:
        model: a transformers causal LM.
        carry: whether running sums are to be carried along in key/value caches.
    """

    def __init__(self, model: nn.Module, *, carry: bool) -> None:
        # Not the object itself: it would be copied along with a cache.
        self._owner = uuid.uuid4().hex if carry else None
        self.current: Pass | None = None
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.current = None

    def of(self, x: Tensor) -> Pass | None:
        """The current pass, if x is the activations ``[rows, tokens, …]`` of all its tokens."""
        now = self.current
        return now if now is not None and x.ndim == 3 and tuple(x.shape[:2]) == now.shape else None

    def _begin(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if arguments:
            named = {**inspect.signature(model.forward).bind_partial(*arguments).arguments, **named}
        self.current = read_pass(model, named, self._owner)

    def _end(self, _model: nn.Module, _arguments: Any, named: dict[str, Any], output: Any) -> None:
        now = self.current
        if not torch.is_grad_enabled():
            # With gradients it stays until the next pass: checkpointing computes layers again in the backward pass.
            self.current = None
        if self._owner is None or now is None or not now.kept:
            return
        cache = named.get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is not None:
            remember(cache, self._owner, now.kept)


class SequenceGate(Gate):
    """The mean of another gate's probabilities over the sequence so far, after SMEAR (Muqeeth et al., 2023), which routes
    a whole example at once; causal, so that it can be trained and generated with.

    Raises:
        ConfigError: in a pass that does not show which tokens precede which.
    """

    def __init__(self, gate: Gate, watch: PassWatch, name: str) -> None:
        super().__init__()
        self.gate, self.name = gate, name
        self._watch = watch

    def rows(self) -> Tensor | None:
        return self.gate.rows()

    def forward(self, x: Tensor, project: Project = F.linear) -> Tensor:
        now = self._watch.of(x)
        if now is None:
            raise ConfigError(
                f"a router by sequence cannot tell the sequences apart at module {self.name}",
                "Call the model itself with token ids, and route only layers that see [rows, tokens, in].",
            )
        return now.running_mean(self.name, self.gate(x, project))

    def tensors(self) -> dict[str, Tensor]:
        return self.gate.tensors()


def read_pass(model: nn.Module, inputs: dict[str, Any], owner: str | None) -> Pass | None:
    """What the inputs of a transformers model say of a pass; none where they hold no tokens.

    Args:
        owner: of the sums that a cache carries; none leaves caches alone.

    Raises:
        ConfigError: if the cache holds tokens that the owner did not route, or not all that it did.
    """
    ids = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if ids is None else ids
    if tokens is None:
        return None
    rows, width = tokens.shape[:2]
    cache = inputs.get("past_key_values")
    found = Pass((rows, width), ids=ids, past=recall(cache, owner) if owner is not None and cache is not None else None)
    mask = inputs.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is not None and mask.ndim == 2:
        found.mask = mask[:, -width:].bool()
    elif mask is not None:
        first = found.past.tokens if found.past is not None else 0
        shown = mask[:, 0, :, first : first + width]
        shown = shown if shown.dtype == torch.bool else shown > torch.finfo(shown.dtype).min / 2
        found.visible = shown.expand(rows, -1, -1)
    elif inputs.get("position_ids") is not None and cache is None and not _uses_cache(model, inputs):
        # As transformers does: without a mask and a cache, positions that start anew begin another sequence.
        found.positions = inputs["position_ids"].expand(rows, -1)
    return found


def _uses_cache(model: nn.Module, inputs: dict[str, Any]) -> bool:
    asked = inputs.get("use_cache")
    return bool(getattr(getattr(model, "config", None), "use_cache", False) if asked is None else asked)
