"""Methods that make one adapter of several, as rows of one table.

Each is a pure function in a file of its own, over the values and the algebra of `seedbed.common`; no files, no network.
"""

from __future__ import annotations

from seedbed.common.errors import ConfigError, nearest
from seedbed.server.merging.average import SeedOptions, average
from seedbed.server.merging.factor_mean import factor_mean
from seedbed.server.merging.method import MergeFunction, Method, Module, Options
from seedbed.server.merging.svd import SvdOptions, svd

__all__ = ["METHODS", "MergeFunction", "Method", "Module", "Options", "method_named"]

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
