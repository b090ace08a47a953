"""Shared set-up of all tests: shapes in signatures are checked, hubs are never asked, threads are few."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

# What a machine may have set for its own sake: a terminal's colours in what is read as words, and a proxy before loopback.
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
os.environ.update(dict.fromkeys(("FORCE_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "GITHUB_ACTIONS"), ""))
os.environ.update(dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"), ""))
os.environ.update(dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "GRPC_PROXY"), ""))

import pytest
import pytest_timeout
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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that is tried once more has its time limit again: pytest-timeout sets it once for all tries."""
    if getattr(item, "execution_count", 1) > 1:
        item.ihook.pytest_timeout_set_timer(item=item, settings=pytest_timeout._get_item_settings(item))
