"""Which software made something."""

from __future__ import annotations

import importlib.metadata

_PACKAGES = ("seedbed", "torch", "transformers", "peft", "flwr", "deepspeed", "lm-eval", "safetensors")


def software_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a number."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
