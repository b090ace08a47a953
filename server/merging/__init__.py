"""Methods that make one adapter of several, as rows of one table.

Each is a pure function in a file of its own, over the values and the algebra of `seedbed.common`; no files, no network.
"""

from __future__ import annotations

from seedbed.common.errors import ConfigError, nearest
from seedbed.server.merging.aligned import CoreOptions, KnotsOptions, TsvOptions, core, knots, tsv_m
from seedbed.server.merging.average import SeedOptions, average
from seedbed.server.merging.factor_mean import factor_mean
from seedbed.server.merging.iterative import IterativeOptions, iterative
from seedbed.server.merging.linear import cat, linear
from seedbed.server.merging.method import MergeFunction, Method, Module, Options, option_rows
from seedbed.server.merging.random_control import RandomOptions, random
from seedbed.server.merging.sparse import (
    DareOptions,
    DareTiesOptions,
    PruneOptions,
    TiesOptions,
    dare_linear,
    dare_ties,
    magnitude_prune,
    ties,
)
from seedbed.server.merging.svd import SvdOptions, svd

__all__ = ["METHODS", "MergeFunction", "Method", "Module", "Options", "method_named", "option_rows"]

_ENTRIES = "N passes over out · in entries, then 4 or more passes for the rank; small in space factors or core"
_CUT = "as given, else the largest rank of an input"
_BASIS = "Entries depend on the basis: spaces dense, factors and core give different results."

_ROWS = (
    Method(
        name="average",
        summary="exact mean of the experts' outputs",
        function=average,
        source="Seeded LoRA (OpenReview U3UtvOYMiw, 2024)",
        cost="copies R d numbers",
        rank="R = Σ r_i",
        options=SeedOptions,
    ),
    Method(
        name="factor_mean",
        summary="means of A and of B apart; not the mean of the outputs",
        function=factor_mean,
        source="FedIT (ICASSP 2024)",
        cost="N r d additions",
        rank="r",
        takes_mixed=False,
    ),
    Method(
        name="svd",
        summary="exact mean of the outputs, cut to the best approximation of a given rank",
        function=svd,
        source="Eckart-Young, as in PEFT's add_weighted_adapter",
        cost="O(d R² + R³)",
        rank="as given",
        options=SvdOptions,
        within_inputs=True,
    ),
    Method(
        name="cat",
        summary="sum of the updates with the weights as given (PEFT's cat, task arithmetic)",
        function=cat,
        source="PEFT's add_weighted_adapter; task arithmetic (Ilharco et al., ICLR 2023)",
        cost="copies R d numbers",
        rank="R = Σ r_i",
        normalizes=False,
        idempotent=False,
        warning="Weights are not divided by their sum: without weights this is N times the average.",
    ),
    Method(
        name="linear",
        summary="weighted sums of A and of B apart, as PEFT's linear has them",
        function=linear,
        source="PEFT's add_weighted_adapter",
        cost="N r d additions",
        rank="r",
        takes_mixed=False,
        normalizes=False,
        idempotent=False,
        warning="Has cross terms: for experts of one seed and weights 1/N the result is N times too large.",
    ),
    Method(
        name="ties",
        summary="trim to the largest entries, elect signs, mean of the entries that agree",
        function=ties,
        source="TIES-Merging (Yadav et al., NeurIPS 2023)",
        cost=_ENTRIES,
        rank=_CUT,
        options=TiesOptions,
        warning=_BASIS,
    ),
    Method(
        name="dare_linear",
        summary="drop random entries, rescale the others, mean",
        function=dare_linear,
        source="DARE (Yu et al., ICML 2024)",
        cost=_ENTRIES,
        rank=_CUT,
        options=DareOptions,
        ordered=True,
        warning=_BASIS,
    ),
    Method(
        name="dare_ties",
        summary="drop random entries, rescale the others, elect signs, mean of the entries that agree",
        function=dare_ties,
        source="DARE (Yu et al., ICML 2024) with TIES-Merging (Yadav et al., NeurIPS 2023)",
        cost=_ENTRIES,
        rank=_CUT,
        options=DareTiesOptions,
        ordered=True,
        warning=_BASIS,
    ),
    Method(
        name="magnitude_prune",
        summary="keep each update's largest entries, mean",
        function=magnitude_prune,
        source="PEFT's add_weighted_adapter, after Han et al. (NeurIPS 2015)",
        cost=_ENTRIES,
        rank=_CUT,
        options=PruneOptions,
        warning=_BASIS,
    ),
    Method(
        name="iterative",
        summary="cut spectra, fold adapters in one by one by the larger entry, cut again",
        function=iterative,
        source="I-LoRA (OpenReview CRkoMdDlFh, 2024)",
        cost="N − 1 times: one dense update formed, 4 or more passes over it; small in space factors or core",
        rank="as given, else the most singular values kept of an input; full where it is never cut again",
        options=IterativeOptions,
        ordered=True,
        warning="The order of the adapters matters by some percent, unless it is cut only at the end or never.",
    ),
    Method(
        name="knots",
        summary="common left singular vectors of all updates; their right factors are merged by a rule",
        function=knots,
        source="KnOTS (Stoica et al., ICLR 2025)",
        cost="O(d R² + R³)",
        rank="as given, else R = Σ r_i",
        options=KnotsOptions,
        warning="With rule dare the order matters, since it draws in that order.",
    ),
    Method(
        name="tsv_m",
        summary="each update's leading singular vectors, made orthogonal to each other's",
        function=tsv_m,
        source="TSV-M (Gargiulo et al., CVPR 2025)",
        cost="O(d R² + R³)",
        rank="as given, else R = Σ r_i",
        options=TsvOptions,
        takes_weights=False,
        idempotent=False,
        warning="Updates are added, not averaged; what experts of one seed share is pushed apart into noise.",
    ),
    Method(
        name="core",
        summary="the updates as small cores in common bases, merged by a rule",
        function=core,
        source="Core Space (Panariello et al., NeurIPS 2025)",
        cost="O(d R² + R³)",
        rank="as given, else R = Σ r_i",
        options=CoreOptions,
        warning="With rule dare the order matters, since it draws in that order.",
    ),
    Method(
        name="random",
        summary="control: random directions of the exact average's size",
        function=random,
        source="arXiv 2602.12323 (random LoRAs merge about as well)",
        cost="draws r d numbers",
        rank="as given, else the largest rank of an input",
        options=RandomOptions,
        idempotent=False,
        warning="Knows nothing that the experts learned: a merge must beat it.",
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def method_named(name: str) -> Method:
    """The row called `name`.

    Raises:
        ConfigError: if there is none, with the nearest name.
    """
    if name not in METHODS:
        raise ConfigError(f"there is no merge method '{name}'", nearest(name, METHODS))
    return METHODS[name]
