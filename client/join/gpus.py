"""Which GPUs a participant may use: what `--gpus` means."""

from __future__ import annotations

import re

from seedbed.common.errors import ConfigError

_GPU = re.compile(r"\d+|(GPU|MIG)-[0-9A-Za-z-]+(/\d+/\d+)?")


def parse_gpus(text: str) -> tuple[str, ...] | None:
    """Read a list of GPUs.

    Args:
        text: `auto` for all, `none` for the CPU, or indices or UUIDs separated by commas.

    Returns:
        none for all; else the GPUs, none of them for the CPU.

    Raises:
        ConfigError: if it is no such list.
    """
    if text.strip() in ("auto", "all"):
        return None
    if text.strip() in ("none", "cpu", ""):
        return ()
    gpus = tuple(part.strip() for part in text.split(","))
    for gpu in gpus:
        if not _GPU.fullmatch(gpu):
            raise ConfigError(f"--gpus: '{gpu}' is no GPU", "Give auto, none, or indices such as 0,1.")
        if gpus.count(gpu) > 1:
            raise ConfigError(f"--gpus names GPU {gpu} twice", "Name each once.")
    return gpus
