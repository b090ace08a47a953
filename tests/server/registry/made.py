"""Small adapters that a test can make in its head."""

from __future__ import annotations

from pathlib import Path

import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.manifest import BaseIdentity, Kind
from seedbed.common.storage import write_adapter

BASE = BaseIdentity(name="tiny", digest="b" * 64)
MEGABYTE = 1 << 20


def written(path: Path, value: float = 1.0, recipe: str = "") -> Path:
    """One module of shape (3, 2) and rank 1."""
    adapter = Adapter({"m": LoraFactors(torch.full((1, 2), float(value)), torch.ones(3, 1), 1.0)})
    write_adapter(path, adapter, kind="expert", base=BASE, recipe=recipe)
    return path


def large(path: Path, megabytes: int, kind: Kind = "expert") -> Path:
    """One module of rank 1 with so many megabytes of random numbers in A."""
    columns = megabytes * MEGABYTE // 4
    factors = LoraFactors(torch.randn(1, columns), torch.ones(1, 1), 1.0)
    write_adapter(path, Adapter({"m": factors}), kind=kind, base=BASE)
    return path
