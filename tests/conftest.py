"""Shared set-up of all tests: shapes in signatures are checked, hubs are never asked, threads are few."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from jaxtyping import install_import_hook

# Before any seedbed module is imported: array shapes in annotations become runtime checks.
install_import_hook(
    [
        "seedbed.common.adapter",
        "seedbed.common.algebra",
        "seedbed.common.lowrank",
        "seedbed.common.partial_svd",
        "seedbed.server.merging",
    ],
    "beartype.beartype",
)
