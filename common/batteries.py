"""Named sets of lm-eval tasks that are measured together.

`zero-shot-16` is measured without examples in the prompt. The metric of each task is the one that is commonly reported for it
from lm-eval: `acc_norm` (the likelihood of an answer divided by its length) where answers are texts of unequal length, else
`acc`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Metric = Literal["acc", "acc_norm"]

BATTERIES: Mapping[str, Mapping[str, Metric]] = MappingProxyType(
    {
        "zero-shot-16": MappingProxyType(
            {
                "arc_easy": "acc",
                "arc_challenge": "acc_norm",
                "boolq": "acc",
                "hellaswag": "acc_norm",
                "openbookqa": "acc_norm",
                "piqa": "acc",
                "winogrande": "acc",
                "sciq": "acc",
                "sglue_rte": "acc",
                "cb": "acc",
                "copa": "acc",
                "wic": "acc",
                "wsc": "acc",
                "anli_r1": "acc",
                "logiqa": "acc_norm",
                "mmlu": "acc",
            }
        )
    }
)
"""By name: lm-eval's names of the tasks, and the metric that counts. A group, such as mmlu's 57 subjects, is one task."""


def expand(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of tasks, with each battery replaced by its own."""
    return tuple(one for name in names for one in (BATTERIES.get(name) or (name,)))
