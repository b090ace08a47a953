"""Log-likelihoods of a base model under any adapter, as an lm-eval model.

The same numbers as lm-eval's own `HFLM` with less work: what requests have in common is computed once (`packing`),
the vocabulary projection runs only where a token is scored, and one loaded base model serves every adapter in turn
(`attach`). Importing this module imports lm-eval's model interface (half a second).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM
from numpy.typing import NDArray
from torch import Tensor

from seedbed.common.adapter import Adapter
from seedbed.common.attach import AdapterSlot
from seedbed.common.errors import DataError
from seedbed.common.packing import Collated, Request, Tree, batches, collate, grow_trees
from seedbed.common.routing import Mixture, MixtureSlot

Progress = Callable[[int, int], None]
"""Called with the number of requests that are done and the number of all."""

LOGITS = 1 << 26
"""Most logits of one forward pass: 256 MB in float32."""

CPU_TOKENS = 2048
"""Most tokens of one forward pass on a CPU, where larger ones fall out of the caches and are slower, not faster."""


class SeedbedLM(LM):  # type: ignore[misc]
    """A causal language model for lm-eval's evaluator.

    Args:
        model: a transformers causal LM, on any device, in any dtype; it is put into evaluation mode.
        tokenizer: its tokenizer.
        batch_tokens: bound on the tokens of one forward pass, padding included (one request may exceed it).
        progress: called after every forward pass.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_tokens: int = 8192, progress: Progress | None = None
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.progress = progress
        self._device = model.device
        self._slot = AdapterSlot(model)
        self.routing = MixtureSlot(model)
        """Of a mixture: what its router does can be recorded here."""
        self._worn: Adapter | Mixture | None = None
        self._branches: bool | None = None

    def set_adapter(self, worn: Adapter | Mixture | None) -> None:
        """Score with an adapter, or with a mixture of experts, from now on, or with the bare base model.

        Raises:
            AdapterMismatchError: if it does not fit the model; what was on before then stays.
        """
        if isinstance(worn, Mixture):
            self.routing.put(worn)
            self._slot.put(None)
        else:
            self._slot.put(worn)
            self.routing.put(None)
        if isinstance(worn, Mixture) or isinstance(self._worn, Mixture):
            self._branches = None  # a router may look at the whole sequence, so this is tried out again
        self._worn = worn

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Within the body the model is the bare base model; then what it wore before is on again."""
        worn = self._worn
        self.set_adapter(None)
        try:
            yield
        finally:
            self.set_adapter(worn)

    def update_norms(self) -> AbstractContextManager[list[Tensor]]:
        """See `AdapterSlot.norms`."""
        return self._slot.norms()

    # --- lm-eval's interface ----------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """``(log-probability, whether greedy decoding gives it)`` of each continuation after its context.

        Raises:
            DataError: if a continuation has no token of its own or does not fit into the model.
        """
        return self.score([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-probability of whole texts; one longer than the model is cut into windows of full context."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        texts = [request.args[0] for request in requests]
        windows: list[Request] = []
        owners: list[int] = []
        for owner, tokens in enumerate(self.encode(texts)):
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(window)
                windows.append(Request((*context, *continuation), len(continuation)))
                owners.append(owner)
        totals = np.zeros(len(texts))
        np.add.at(totals, owners, self._score_requests(windows)[0])
        return [float(total) for total in totals]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Continue each context until a stop sequence; equal generation settings run as one batch."""
        from seedbed.common.generation import generate

        return generate(self, [request.args for request in requests])

    # --- scoring ----------------------------------------------------------------------------------------------------

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """`loglikelihood` of plain ``(context, continuation)`` pairs."""
        sums, greedy = self._score_requests(self._requests(pairs))
        return [(float(total), bool(flag)) for total, flag in zip(sums, greedy, strict=True)]

    def _score_requests(self, requests: list[Request]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        sums = np.zeros(len(requests))
        greedy = np.ones(len(requests), dtype=np.bool_)
        budget = min(self.batch_tokens, CPU_TOKENS) if self._device.type == "cpu" else self.batch_tokens
        trees = grow_trees(
            requests,
            pair_cost=1 / (2 * self._config.hidden_size),
            limit=min(budget, self._window or budget),
            branches=self._can_branch(),
        )
        done = 0
        predictions = max(1, LOGITS // int(self._config.vocab_size))
        for batch in batches(trees, tokens=budget, predictions=predictions, window=self._window):
            collated = collate(batch, requests, self.pad_token_id)
            values, hits = self._forward(collated)
            np.add.at(sums, collated.requests, values)
            np.logical_and.at(greedy, collated.requests, hits)
            done += sum(len(tree.paths) for tree in batch)
            if self.progress is not None:
                self.progress(done, len(requests))
        return sums, greedy

    @torch.inference_mode()
    def _forward(self, batch: Collated) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Log-probability of every predicted token, and whether it is the likeliest."""
        values = np.empty(len(batch.rows))
        hits = np.empty(len(batch.rows), dtype=np.bool_)
        start = 0
        for logits in self._logits(batch):
            here = np.flatnonzero((batch.rows >= start) & (batch.rows < start + len(logits)))
            rows = torch.from_numpy(batch.rows[here] - start).to(logits.device)
            targets = torch.from_numpy(batch.targets[here]).to(logits.device)
            step = max(1, LOGITS // 4 // logits.shape[-1])
            # Chunks, because logsumexp needs scratch of its input's size, in float32 whatever the model's dtype.
            normalizer = torch.cat([chunk.float().logsumexp(-1) for chunk in torch.split(logits, step)])
            likeliest = logits.argmax(-1)
            values[here] = (logits[rows, targets].float() - normalizer[rows]).double().cpu().numpy()
            hits[here] = (likeliest[rows] == targets).cpu().numpy()
            start += len(logits)
        return values, hits

    def _logits(self, batch: Collated) -> Iterator[Tensor]:
        """Logits ``[scored nodes, vocabulary]`` in parts of at most `LOGITS`, so that a long text takes no more memory.

        Hidden states are gathered just before the vocabulary projection. The model's body runs once.
        """
        scored = torch.from_numpy(batch.scored).to(self._device)
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(batch.ids).to(self._device), "use_cache": False}
        if batch.mask is not None:
            inputs["position_ids"] = torch.from_numpy(batch.positions).to(self._device)
            allowed = torch.from_numpy(batch.mask).to(self._device)
            # Additive, in the model's dtype: what every attention implementation with a 4-D mask understands.
            bias = torch.zeros(allowed.shape, dtype=self.model.dtype, device=self._device)
            inputs["attention_mask"] = bias.masked_fill_(~allowed, torch.finfo(self.model.dtype).min)

        head, body = self.model.get_output_embeddings(), self.model.base_model
        parts = torch.split(scored, max(1, LOGITS // int(self._config.vocab_size)))
        if len(parts) == 1 or body is self.model:
            with _gathering(head, scored):
                yield self.model(**inputs).logits[0]
            return
        with _computed_once(body):
            for part in parts:
                with _gathering(head, part):
                    yield self.model(**inputs).logits[0]

    def _can_branch(self) -> bool:
        """Whether the model gives the same numbers under a tree mask; tried out once on two branches.

        Models without attention masks or without explicit positions (state-space models, ALiBi, flash attention) do
        not.
        """
        if self._branches is None:
            top = int(self._config.vocab_size) - 1
            probe = [Request(tuple(min(token, top) for token in tokens), 2) for tokens in _PROBE]
            tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.25
            chains = [_tree([index], probe) for index in range(len(probe))]
            try:
                forked = self._sums([_tree(range(len(probe)), probe)], probe)
                self._branches = bool(np.allclose(forked, self._sums(chains, probe), rtol=0, atol=tolerance))
            except (
                TypeError,
                ValueError,
                RuntimeError,
                NotImplementedError,
            ):  # what models raise at masks they cannot take
                self._branches = False
        return self._branches

    def _sums(self, trees: list[Tree], requests: list[Request]) -> NDArray[np.float64]:
        collated = collate(trees, requests, self.pad_token_id)
        sums = np.zeros(len(requests))
        np.add.at(sums, collated.requests, self._forward(collated)[0])
        return sums

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _requests(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Encode pairs as `HFLM` does: together, then split where the context alone would end; cut on the left."""
        moved = [_move_spaces(context, continuation) for context, continuation in pairs]
        texts = list(dict.fromkeys(text for pair in moved for text in (pair[0], pair[0] + pair[1]) if pair[0]))
        encoded = dict(zip(texts, self.encode(texts), strict=True))
        longest = self.max_length
        requests = []
        for context, continuation in moved:
            if context:
                before = encoded[context]
                after = encoded[context + continuation][len(before) :]
            else:
                before, after = self._without_context(continuation)
            _check(context, continuation, before, after, longest)
            requests.append(Request(tuple([*before, *after][-(longest + 1) :]), len(after)))
        return requests

    def _without_context(self, text: str) -> tuple[list[int], list[int]]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if tokens and tokens[0] == self.prefix_token_id:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the tokenizer's own special tokens, unless the text already begins with the prefix token."""
        prefix = self.tokenizer.decode([self.prefix_token_id])
        encoded: list[list[int]] = [[]] * len(texts)
        for special in (True, False):
            chosen = [index for index, text in enumerate(texts) if text.startswith(prefix) != special]
            if chosen:
                options = {} if special else {"add_special_tokens": False}
                rows = self.tokenizer([texts[index] for index in chosen], **options)["input_ids"]
                for index, row in zip(chosen, rows, strict=True):
                    encoded[index] = list(row)
        return encoded

    # --- facts of the model -----------------------------------------------------------------------------------------

    @property
    def _config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def _window(self) -> int | None:
        """Width of the sliding attention window, where some layers have one."""
        window = getattr(self._config, "sliding_window", None)
        return int(window) if window and getattr(self._config, "use_sliding_window", True) else None

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the beginning-of-text token, else the end-of-text token."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens that the model can read."""
        from lm_eval.models.utils import resolve_max_length

        return int(resolve_max_length(self.model.config, self.tokenizer))

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")


_PROBE = ((1, 2, 3, 4, 5, 6), (1, 2, 3, 7, 8, 9))


@contextmanager
def _gathering(head: torch.nn.Module, places: Tensor) -> Iterator[None]:
    """Within the body, the head sees only the hidden states at some places of the flattened batch.

    A hook on the head, not a product of our own: soft-capping and scaling of logits stay the model's business.
    """

    def gather(_head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].reshape(-1, args[0].shape[-1])[places].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _computed_once(module: torch.nn.Module) -> Iterator[None]:
    """Within the body, the module computes when it is called first, and then gives the same answer again."""
    replaced, forward, answers = module.__dict__.get("forward"), module.forward, list[Any]()

    def once(*args: Any, **kwargs: Any) -> Any:
        if not answers:
            answers.append(forward(*args, **kwargs))
        return answers[0]

    object.__setattr__(module, "forward", once)
    try:
        yield
    finally:
        object.__delattr__(module, "forward")
        if replaced is not None:  # another library's wrapper
            object.__setattr__(module, "forward", replaced)


def _tree(indices: Iterable[int], requests: Sequence[Request]) -> Tree:
    tree = Tree()
    for index in indices:
        tree.insert(index, requests[index], tree.common(requests[index].inputs))
    return tree


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Move the context's trailing white space to the continuation, as tokenizers attach it to the next word."""
    bare = context.rstrip()
    return (bare, context[len(bare) :] + continuation) if context else (context, continuation)


def _check(context: str, continuation: str, before: list[int], after: list[int], longest: int) -> None:
    if not before or not after:
        raise DataError(
            f"the continuation {continuation!r} after {context[-40:]!r} has no token of its own to score",
            "Give every choice at least one visible character.",
        )
    if len(after) > longest:
        raise DataError(
            f"the continuation {continuation[:40]!r}… has {len(after)} tokens, the model reads {longest}",
            "Shorten the choice.",
        )
